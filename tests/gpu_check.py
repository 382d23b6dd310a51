"""Build, test, sanitize and measure on a CUDA machine: offline, and within ten minutes.

    make gpu-check           # or: python tests/gpu_check.py [--out DIR] [--only STAGE ...]

Needs nvcc, a GPU, and a Python with a CUDA build of torch, pytest, setuptools, wheel and ninja;
fetches nothing. Every stage runs whatever became of those before it, and within its own share of
the time. Writes `gpu-check.jsonl` (a row for every stage, then the rows of the benchmarks) and
`gpu-check.txt` (a line for every stage, then the end of what each printed).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 9.5  # of the ten, so that reports are written in time
LINES = 120  # of each stage in the text report


@dataclass(frozen=True)
class Stage:
    """A command, and how long it may take."""

    name: str
    command: list[str]
    limit_s: float
    env: dict[str, str] = field(default_factory=dict)
    rows: Path | None = None  # JSON lines that the command leaves behind
    program: str = ""  # without it on PATH the stage is left out


@dataclass
class Outcome:
    stage: Stage
    verdict: str  # "passed", "failed ...", "skipped ..."
    seconds: float = 0.0
    output: str = ""

    @property
    def bad(self) -> bool:
        return self.verdict.startswith("failed")


# ---- running -------------------------------------------------------------------------------------


def run_all(stages: Iterable[Stage], seconds: float) -> list[Outcome]:
    """Every stage in turn, in so many seconds altogether."""
    end = time.monotonic() + seconds
    outcomes = []
    for stage in stages:
        outcome = run_stage(stage, end - time.monotonic())
        print(f"{outcome.stage.name:<12} {outcome.verdict}, {outcome.seconds:.0f} s", flush=True)
        outcomes.append(outcome)
    return outcomes


def run_stage(stage: Stage, left_s: float) -> Outcome:
    """One stage; it and everything that it started is ended when its time is over."""
    if stage.program and not shutil.which(stage.program, path=stage.env.get("PATH")):
        return Outcome(stage, f"skipped: no {stage.program} on PATH")
    limit = min(stage.limit_s, left_s)
    if limit <= 1:
        return Outcome(stage, "failed: no time was left")
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env={**os.environ, **stage.env}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", preexec_fn=_heed_interrupts,
        )  # fmt: skip
    except OSError as error:
        return Outcome(stage, f"failed: {error}")
    try:
        output, _ = process.communicate(timeout=limit)
        verdict = "passed" if process.returncode == 0 else f"failed: exit {process.returncode}"
    except subprocess.TimeoutExpired:
        output = _end(process)
        verdict = f"failed: not done after {limit:.0f} s"
    return Outcome(stage, verdict, time.monotonic() - start, output)


def _heed_interrupts() -> None:
    """What a shell script starts with `&` ignores Ctrl-C, and so does whatever that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen) -> str:
    """As Ctrl-C would, so that pytest says what failed so far; by force if that is ignored."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        return process.communicate(timeout=5)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


# ---- reports -------------------------------------------------------------------------------------


def write_reports(outcomes: list[Outcome], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rows, text = folder / "gpu-check.jsonl", folder / "gpu-check.txt"
    with rows.open("w") as file:
        for outcome in outcomes:
            file.write(json.dumps(_row(outcome)) + "\n")
        for path in dict.fromkeys(outcome.stage.rows for outcome in outcomes):
            for row in _rows_in(path):
                file.write(json.dumps({"kind": "benchmark", **row}) + "\n")
    text.write_text("\n".join([summary(outcomes), *map(_log, outcomes)]))
    return [rows, text]


def _row(outcome: Outcome) -> dict:
    return {
        "kind": "stage",
        "stage": outcome.stage.name,
        "verdict": outcome.verdict,
        "seconds": round(outcome.seconds, 1),
        "limit_s": outcome.stage.limit_s,
        "command": " ".join(outcome.stage.command),
        "last_line": _last_line(outcome.output),
    }


def _rows_in(path: Path | None) -> list[dict]:
    """The rows that stages wrote, up to where the last was ended."""
    if path is None or not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # the line that was being written
            break
    return found


def summary(outcomes: list[Outcome]) -> str:
    lines = [
        f"{o.stage.name:<12} {o.seconds:6.1f} s  {o.verdict:<28} {_last_line(o.output)}"
        for o in outcomes
    ]
    bad = [o.stage.name for o in outcomes if o.bad]
    return "\n".join([*lines, f"failed: {', '.join(bad)}" if bad else "nothing failed", ""])


def _last_line(output: str) -> str:
    return next((line for line in reversed(output.splitlines()) if line.strip()), "")[:160]


def _log(outcome: Outcome) -> str:
    lines = outcome.output.splitlines()
    head = f"==== {outcome.stage.name}: {' '.join(outcome.stage.command)}"
    cut = [f"... {len(lines) - LINES} lines before"] if len(lines) > LINES else []
    return "\n".join([head, *cut, *lines[-LINES:], ""])


# ---- what is checked -----------------------------------------------------------------------------

MACHINE = """
import sys, torch
print(sys.version.split()[0], torch.__version__, torch.version.cuda, torch.cuda.get_device_name())
print(torch.cuda.get_device_properties(0))
"""


def stages(folder: Path, official: Path | None = None) -> list[Stage]:
    """The stages for this machine; `folder` holds the environment that is built into, `official` a
    checkout of the official repository."""
    python = str(folder / "venv" / "bin" / "python")
    paths = [Path(python).parent, Path(sysconfig.get_path("scripts")), Path(sys.executable).parent]
    path = os.pathsep.join([*map(str, paths), os.environ["PATH"], "/usr/local/cuda/bin"])
    env = {"PATH": path, "COTNET_EXT_CUDA": "1", "PYTHONUNBUFFERED": "1", **_architecture()}
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--device=cuda", "--tb=short"]
    pytest += ["--maxfail=50"]  # what breaks everything must not take all the time
    parallel = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadfile"] * _has("xdist")
    small = ["-k", SMALL, *(f"tests/test_{name}.py" for name in (*FUNCTIONS, "batch_norm"))]
    sanitizer = ["compute-sanitizer", "--error-exitcode=9", "--report-api-errors=no"]
    # Each tensor in an allocation of its own, so that a step beyond its end is seen.
    alone = {**env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    rows = folder / "benchmarks.jsonl"
    bench = [python, "-m", "benchmarks", "--device=cuda", f"--out={rows}", "--budget=0.1"]
    bench += [f"--official={official.resolve()}"] if official else []
    one, most = ["--only", FUNCTIONS[0]], ["--only", *FUNCTIONS, "modules"]

    def sanitized(tool: str) -> Stage:
        command = [*sanitizer, f"--tool={tool}", python, *pytest, "-x", *small]
        return Stage(tool, command, 50, alone, program="compute-sanitizer")

    return [
        Stage("environment", [sys.executable, __file__, "--environment", str(folder / "venv")], 30),
        Stage("machine", [python, "-c", MACHINE], 60, env),
        Stage("build", [python, "-m", "pip", *INSTALL], 240, env),
        Stage("gate", [python, "tests/cuda_gate.py"], 60, env),
        Stage("tests", [python, *pytest, *parallel], 180, env),
        sanitized("memcheck"),
        sanitized("racecheck"),
        Stage("warm", [*bench, "--warm", "--no-compile", *one], 40, env, rows),
        Stage("benchmarks", [*bench, "--no-compile", *most], 120, env, rows),
        # Compilation takes most of the time, so it comes last, for two dtypes.
        Stage("compiled", [*bench, *one, "--dtypes", "float32", "bfloat16"], 200, env, rows),
    ]


INSTALL = ["--disable-pip-version-check", "install", "--no-index", "--no-deps"]
INSTALL += ["--no-build-isolation", "--editable", "."]
# Every kernel in two dtypes and both layouts on a few maps: what a sanitizer gets through.
FUNCTIONS = ("local_aggregation", "softmax_aggregation", "group_norm_aggregation")
FUNCTIONS += ("spatial_softmax_gate", "context_fusion")
SMALL = "test_values_and_gradients and (stage1 or stage4 or odd_9x11) and (float32 or bfloat16)"
SMALL += " or test_defined_values and bfloat16 and 130"


def _architecture() -> dict[str, str]:
    """The generation of the GPU that is here; the others would only take time."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"TORCH_CUDA_ARCH_LIST": "{}.{}".format(*torch.cuda.get_device_capability())}


def _has(module: str) -> bool:
    return find_spec(module) is not None


def make_environment(folder: Path) -> None:
    """An environment of its own that sees what this Python has installed, and needs no download."""
    venv.EnvBuilder(clear=True, symlinks=True).create(folder)
    site = next(folder.glob("lib/python*/site-packages"))
    lent = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "lent.pth").write_text("".join(f"{path}\n" for path in lent))


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 when a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT / "build" / "gpu-check"
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help="for the reports")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages only")
    parser.add_argument("--official", type=Path, metavar="DIR", help="checkout of JDAI-CV/CoTNet")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all stages together")
    parser.add_argument("--environment", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.environment:
        make_environment(chosen.environment)
        return 0
    todo = stages(default, chosen.official)
    unknown = set(chosen.only or ()) - {stage.name for stage in todo}
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))}: {[stage.name for stage in todo]}")
    todo = [stage for stage in todo if not chosen.only or stage.name in chosen.only]
    for old in {stage.rows for stage in todo if stage.rows}:
        old.unlink(missing_ok=True)
    outcomes = run_all(todo, 60 * chosen.minutes)
    print(summary(outcomes), *write_reports(outcomes, chosen.out.resolve()), sep="\n")
    return int(any(outcome.bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
