"""The gate over compiled CUDA kernels: registers, spills, width of global accesses, instructions
for a unit of work. Needs no GPU.

    python tests/cuda_gate.py [LIBRARY] [--table]

Reads the machine code in a built library with NVIDIA's disassembler and compares every kernel, for
every architecture, with its row in `cuda_budgets.py`, and fast paths of aggregations with theirs in
`cuda_work.py`. By default the library is the installed one, which is imported, and must name all
architectures of the default list in `build_info()`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from cuda_budgets import BUDGETS, Budget
from cuda_instructions import Part, parts_of
from cuda_work import WORK, Work

ROOT = Path(__file__).resolve().parents[1]
WIDE = 16  # bytes of the widest access of one thread


@dataclass
class Kernel:
    """One kernel as compiled for one architecture."""

    name: str  # demangled, with template arguments, without parameters
    arch: int  # such as 90
    registers: int = 0
    stack: int = 0  # bytes of a thread in memory: spills and arrays that did not fit into registers
    loads: Counter = field(default_factory=Counter)  # instructions by bytes of one thread's access
    stores: Counter = field(default_factory=Counter)
    bulk: int = 0  # copies by the copy engine, which have any size
    instructions: int = 0
    parts: list[Part] = field(default_factory=list)  # of an aggregation: what runs equally often

    def __str__(self) -> str:
        return f"{self.name} for sm_{self.arch}"


# ---- the rule ------------------------------------------------------------------------------------


def judge(
    kernels: Iterable[Kernel], budgets: Iterable[Budget] = BUDGETS, work: Iterable[Work] = WORK
) -> list[str]:
    """One line for everything that breaks a budget; empty when all is well."""
    kernels, budgets, work = list(kernels), list(budgets), list(work)
    complaints, used = [], set()
    for kernel in kernels:
        row = _row(kernel, budgets)
        if row is None:
            complaints.append(f"{kernel}: no row in cuda_budgets.py")
            continue
        used.add(row.kernel)
        complaints += [f"{kernel}: {what}" for what in _faults(kernel, row)]
        if task := _row(kernel, work):
            used.add(task.kernel)
            complaints += [f"{kernel}: {what}" for what in _too_much(kernel, task)]
        elif row.work:
            complaints.append(f"{kernel}: no row in cuda_work.py")
    for file, rows in (("cuda_budgets.py", budgets), ("cuda_work.py", work)):
        unused = [row.kernel for row in rows if row.kernel not in used]
        complaints += [f"{pattern}: row in {file}, no kernel" for pattern in unused]
    return complaints


Row = TypeVar("Row", Budget, Work)


def _row(kernel: Kernel, rows: Iterable[Row]) -> Row | None:
    return next((row for row in rows if re.search(row.kernel, str(kernel))), None)


def _too_much(kernel: Kernel, work: Work) -> Iterator[str]:
    if work.turns > 1 and not any(part.sums for part in kernel.parts):
        yield "no loop of sums"
    size = 4 if "_kernel<float" in kernel.name else 2
    found, most = work.per_unit(kernel.parts, size), work.ceiling(size)
    if found > most:
        yield f"{found:.0f} instructions for each unit, at most {most:.0f}: {work.why}"


def _faults(kernel: Kernel, budget: Budget) -> Iterator[str]:
    if kernel.registers > budget.registers:
        yield f"{kernel.registers} registers, at most {budget.registers}: {budget.why}"
    if kernel.stack > budget.stack:
        yield f"{kernel.stack} bytes of registers in memory, at most {budget.stack}"
    if kernel.arch < budget.since:
        return
    if budget.instructions is not None and kernel.instructions > budget.instructions:
        yield f"{kernel.instructions} instructions, at most {budget.instructions}: {budget.why}"
    for kind in ("loads", "stores"):
        widths = getattr(kernel, kind)
        wide = sum(count for size, count in widths.items() if size >= WIDE)
        narrow = sum(widths.values()) - wide
        least, most = getattr(budget, f"wide_{kind}"), getattr(budget, f"narrow_{kind}")
        if wide < least and not kernel.bulk:
            yield f"{wide} global {kind} of {WIDE} bytes, at least {least}: {_widths(widths)}"
        if most is not None and narrow > most:
            yield f"{narrow} global {kind} below {WIDE} bytes, at most {most}: {_widths(widths)}"


def _widths(counts: Counter) -> str:
    """ "4 of 2 bytes, 1 of 16 bytes" """
    return ", ".join(f"{counts[size]} of {size} bytes" for size in sorted(counts)) or "none"


# ---- reading machine code ------------------------------------------------------------------------


def find_tool(name: str) -> str:
    """cuobjdump or nvdisasm: from PATH, the toolkit, or the triton package beside torch."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    folders = [os.environ["PATH"], str(Path(home, "bin"))]
    packages = [*sys.path, *ROOT.glob(".venv-cuda/lib/python*/site-packages")]
    folders += [str(Path(path, "triton/backends/nvidia/bin")) for path in packages]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if not found:
        raise SystemExit(f"{name} was not found: set CUDA_HOME to a full toolkit")
    return found


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def read_library(library: Path) -> list[Kernel]:
    """Every kernel of a library, an object file or a cubin, for every architecture in it."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        run(cuobjdump, "--extract-elf", "all", library.resolve(), cwd=Path(folder))
        cubins = sorted(Path(folder).glob("*.cubin"))
        if not cubins:
            raise SystemExit(f"{library} holds no CUDA machine code")

        def read(cubin: Path) -> list[Kernel]:
            usage = parse_usage(run(cuobjdump, "--dump-resource-usage", cubin))
            return merge(usage, parse_code(run(nvdisasm, "-c", cubin)))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            kernels = [kernel for found in pool.map(read, cubins) for kernel in found]
    names = demangled([kernel.name for kernel in kernels])
    for kernel in kernels:
        kernel.name = names[kernel.name]
    return kernels


def parse_usage(text: str) -> dict[str, Kernel]:
    """Registers and stack out of what `cuobjdump --dump-resource-usage` prints of one cubin."""
    usage = r"^ Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)"
    return {
        name: Kernel(name, 0, int(registers), int(stack) + int(local))
        for name, registers, stack, local in re.findall(usage, text, re.MULTILINE)
    }


INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+|@!?U?PT\s+)?([A-Z][A-Z0-9_.]*)")
SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")


def parse_code(text: str) -> dict[str, Kernel]:
    """Global accesses and instructions out of what `nvdisasm -c` prints, by mangled name."""
    arch = int(re.search(r"^\s*\.target\s+sm_(\d+)", text, re.MULTILINE).group(1))
    kernels: dict[str, Kernel] = {}
    lines: dict[str, list[str]] = {}
    current = None
    for line in text.splitlines():
        if section := SECTION.match(line):
            current = kernels.setdefault(section.group(1), Kernel(section.group(1), arch))
        elif current:
            lines.setdefault(current.name, []).append(line)
            if instruction := INSTRUCTION.match(line):
                _count(current, instruction.group(1).split("."))
    for name, code in lines.items():
        if "aggregation_" in name:
            kernels[name].parts = parts_of(code)
    return kernels


def _count(kernel: Kernel, words: list[str]) -> None:
    """Add one instruction, such as LDG.E.128.CONSTANT in its words."""
    kernel.instructions += words[0] != "NOP"
    if words[0] in ("UBLKCP", "UTMALDG", "UTMASTG"):
        kernel.bulk += 1
    elif words[0] in ("LDG", "LD", "LDGSTS"):
        kernel.loads[_bytes(words)] += 1
    elif words[0] in ("STG", "ST"):
        kernel.stores[_bytes(words)] += 1


def _bytes(words: list[str]) -> int:
    """Bytes of one thread's access: 4 unless the instruction names another width."""
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32, "ENL2": 32}
    return next((widths[word] for word in words[1:] if word in widths), 4)


def merge(usage: dict[str, Kernel], code: dict[str, Kernel]) -> list[Kernel]:
    """What both tools know of the kernels of one cubin."""
    both = []
    for name, kernel in code.items():
        used = usage[name]
        both.append(replace(kernel, registers=used.registers, stack=used.stack))
    return both


def demangled(names: list[str]) -> dict[str, str]:
    """Names as in the source, without `void` in front and the parameters at the end."""
    unique = sorted(set(names))
    done = subprocess.run(
        ["c++filt"], input="\n".join(unique), capture_output=True, text=True, check=True
    )
    return {a: _short(b) for a, b in zip(unique, done.stdout.splitlines(), strict=True)}


def _short(name: str) -> str:
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    depth = 0
    for position, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:position]
    return name


# ---- the command ---------------------------------------------------------------------------------


def table(kernels: Iterable[Kernel]) -> str:
    """Every kernel and architecture in a line."""
    lines = [
        f"sm_{k.arch:<4}{k.registers:>4} registers {k.stack:>5} stack"
        f" {k.instructions:>6} instructions  {k.bulk} bulk"
        f"; loads {_widths(k.loads)}; stores {_widths(k.stores)}  {k.name}"
        for k in sorted(kernels, key=lambda k: (k.name, k.arch))
    ]
    return "\n".join(lines)


def summary(kernels: Iterable[Kernel]) -> str:
    """A line for every kernel, over all its template arguments and architectures."""
    families: dict[str, list[Kernel]] = {}
    for kernel in sorted(kernels, key=lambda k: k.name):
        families.setdefault(kernel.name.partition("<")[0], []).append(kernel)
    lines = [f"{'':<52} compiled registers   stack  instructions  wide loads"]
    for name, members in families.items():
        columns = (
            f"{len(members):>8}",
            _range(kernel.registers for kernel in members),
            f"{max(kernel.stack for kernel in members):>7}",
            _range((kernel.instructions for kernel in members), 13),
            _range((kernel.loads[WIDE] for kernel in members), 11),
        )
        lines.append(f"{name:<52} {' '.join(columns)}")
    return "\n".join(lines)


def _range(numbers: Iterable[int], width: int = 9) -> str:
    found = sorted(numbers)
    return f"{found[0]}-{found[-1]}".rjust(width)


def installed_library() -> Path:
    """The library that `import cotnet_ext` loads, after what it says of itself is checked."""
    sys.path.insert(0, str(ROOT / "build_backend"))
    import cotnet_ext_native as native

    import cotnet_ext

    info = cotnet_ext.build_info()
    print(f"{cotnet_ext._C.__file__}: CUDA {info['cuda_version']}, {' '.join(info['cuda_archs'])}")
    nvcc = shutil.which("nvcc") or "nvcc"
    known = native.output_of(nvcc, "--list-gpu-arch").split()
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or native.default_arch_list(known)
    wanted = wanted.replace(";", " ").split()
    if info["cuda_archs"] != wanted:
        raise SystemExit(f"built for {info['cuda_archs']}, expected {wanted}")
    if missing := operators_without_cuda():
        raise SystemExit(f"no CUDA kernels: {', '.join(missing)}")
    return Path(cotnet_ext._C.__file__)


def operators_without_cuda() -> list[str]:
    """Those of ours that a CUDA tensor would look for in vain."""
    import torch

    names = sorted(torch._C._dispatch_get_all_op_names())
    ours = [name for name in names if name.startswith("cotnet_ext::")]
    computing = [name for name in ours if name != "cotnet_ext::build_info"]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in computing if not has_kernel(name, "CUDA")]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", nargs="?", type=Path)
    parser.add_argument("--table", action="store_true", help="a line for every kernel compiled")
    chosen = parser.parse_args(arguments)
    kernels = read_library(chosen.library or installed_library())
    print(table(kernels) if chosen.table else summary(kernels))
    complaints = judge(kernels)
    print(*(f"{line}\n" for line in complaints), sep="", end="")
    archs = sorted({kernel.arch for kernel in kernels})
    names = {kernel.name for kernel in kernels}
    print(f"{len(names)} kernels for {archs}: {len(complaints)} outside of their budget")
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
