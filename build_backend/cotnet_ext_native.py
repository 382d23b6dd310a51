"""How the C++ of cotnet_ext is built: sources, macros, and the choice between CPU and CUDA.

Shared by setup.py, by CMakeLists.txt (which runs this file and includes what it prints) and by
tests/test_build.py. Nothing here imports torch, and nothing asks whether a GPU is visible.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The oldest torch that the built library runs on. The C++ sees only what that version's stable ABI
# offers, so one binary serves this version and all later ones.
TORCH_TARGET = (2, 10)
# The oldest Python whose limited API the library uses: the tag of the wheel and of PEP 384 symbols.
PYTHON_TARGET = (3, 10)

# GPU generations for which code is generated. A GPU runs the nearest entry of its own major
# version; the last is also kept as PTX, which GPUs newer than all of them compile at run time.
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def version() -> str:
    """`__version__`, read as text because importing the package needs the library being built."""
    text = (ROOT / "cotnet_ext" / "_version.py").read_text()
    return re.search(r'__version__ = "(.+)"', text).group(1)


def sources(cuda: bool) -> list[str]:
    """Every file to compile, relative to the repository: a new operator edits no build file."""
    patterns = ["csrc/*.cpp", "csrc/host/*.cpp", "csrc/cpu/*.cpp"] + ["csrc/cuda/*.cu"] * cuda
    found = (path for pattern in patterns for path in ROOT.glob(pattern))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def torch_target_macro() -> str:
    """`TORCH_TARGET_VERSION` as torch's headers want it: one byte each for major and minor."""
    major, minor = TORCH_TARGET
    return f"0x{major:02x}{minor:02x}000000000000"


def definitions(cuda_version: str = "", archs: str = "") -> dict[str, str]:
    """Macros for the C++ compiler; the strings among them are what `build_info()` reports."""
    strings = {
        "COTNET_EXT_VERSION": version(),
        "COTNET_EXT_TORCH_TARGET": ".".join(map(str, TORCH_TARGET)),
        "COTNET_EXT_CUDA_VERSION": cuda_version,
        "COTNET_EXT_CUDA_ARCHS": archs,
    }
    return {
        "TORCH_TARGET_VERSION": torch_target_macro(),
        **{name: f'"{value}"' for name, value in strings.items()},
    }


def check_torch(torch_version: str) -> None:
    """Stop unless this torch has the stable ABI that the library is built for."""
    found = tuple(int(number) for number in re.match(r"(\d+)\.(\d+)", torch_version).groups())
    if found < TORCH_TARGET:
        target = ".".join(map(str, TORCH_TARGET))
        raise SystemExit(
            f"cotnet_ext needs torch {target} or newer to build, found torch {torch_version}: "
            f'run `pip install --upgrade "torch>={target}"` first'
        )


def cuda_obstacle(torch_cuda: str | None, nvcc_release: str | None, cuda_sources: int) -> str:
    """Why CUDA cannot be built, or "" when it can.

    torch_cuda: `torch.version.cuda`. nvcc_release: such as "12.8", None when there is no nvcc.
    """
    if torch_cuda is None:
        return "the installed torch is not a CUDA build"
    if nvcc_release is None:
        return "nvcc was not found (set CUDA_HOME, or put nvcc on PATH)"
    if nvcc_release.split(".")[0] != torch_cuda.split(".")[0]:
        return f"nvcc is {nvcc_release} but torch was built with CUDA {torch_cuda}"
    if not cuda_sources:
        return "csrc/cuda has no kernels yet"
    return ""


def choose_cuda(mode: str, obstacle: str) -> tuple[bool, str]:
    """Whether CUDA is built, and why; `mode` is the value of COTNET_EXT_CUDA.

    "auto" builds what it can, "0" never builds CUDA, "1" stops rather than leave it out.
    """
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"COTNET_EXT_CUDA must be auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return False, "COTNET_EXT_CUDA=0"
    if mode == "1" and obstacle:
        raise SystemExit(f"COTNET_EXT_CUDA=1, but CUDA cannot be built: {obstacle}")
    return not obstacle, obstacle


def default_arch_list(known: Iterable[str]) -> str:
    """ARCHITECTURES that this nvcc knows, as TORCH_CUDA_ARCH_LIST writes them.

    known: the words of `nvcc --list-gpu-arch`, such as "compute_90".
    """
    numbers = {word.removeprefix("compute_") for word in known}
    chosen = [arch for arch in ARCHITECTURES if arch.replace(".", "") in numbers]
    if not chosen:
        raise SystemExit(
            f"nvcc compiles for none of {', '.join(ARCHITECTURES)}: set TORCH_CUDA_ARCH_LIST"
        )
    return ";".join(chosen) + "+PTX"


def nvcc_flags(release: str, jobs: int, files: int) -> list[str]:
    """Flags that depend on nvcc's release, the processors to use and the files to compile.

    One nvcc compiles several GPU generations at a time when there are fewer files than processors;
    otherwise files side by side are enough and need less memory. Machine code for seven
    generations with line numbers takes a sixth of its size when packed well, which every driver of
    CUDA 13 can unpack.
    """
    flags = [f"--threads={max(1, jobs // max(1, files))}"]
    return flags + ["--compress-mode=size"] * (int(release.split(".")[0]) >= 13)


def nvcc_release(text: str) -> str | None:
    """ "12.8" out of what `nvcc --version` prints."""
    match = re.search(r"release (\d+\.\d+)", text)
    return match and match.group(1)


def toolkit_of(dry_run: str) -> str | None:
    """The toolkit folder out of what `nvcc --dryrun` prints.

    Only nvcc knows it when the nvcc on PATH is a link or a script outside the toolkit.
    """
    match = re.search(r"^#\$ _HERE_=(.+)[/\\]bin$", dry_run, re.MULTILINE)
    return match and match.group(1)


def output_of(*command: str) -> str:
    """What a command prints on both streams; "" when it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout + done.stderr


def cmake_inputs() -> str:
    """The inputs of CMakeLists.txt, as CMake code."""
    import torch
    from torch.utils import cpp_extension

    check_torch(torch.__version__)
    lists = {
        "COTNET_EXT_SOURCES": sources(cuda=False),
        "COTNET_EXT_DEFINITIONS": [f"{name}={value}" for name, value in definitions().items()],
        "TORCH_INCLUDE_DIRS": cpp_extension.include_paths()[:1],
        "TORCH_LIBRARY_DIRS": cpp_extension.library_paths(),
    }
    lines = (
        f"set({name} {' '.join(f'[==[{value}]==]' for value in values)})"
        for name, values in lists.items()
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(cmake_inputs() + "\n")
