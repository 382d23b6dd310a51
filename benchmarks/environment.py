"""Where a number comes from: device, versions, commit, command."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
import uuid
from pathlib import Path

import torch

import cotnet_ext

ROOT = Path(__file__).resolve().parent.parent


def device_name(device: str) -> str:
    """`NVIDIA H200` for a CUDA device, else the processor and its cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {os.cpu_count()} cores"


def slug(name: str) -> str:
    """`name` as a file name: lower case, words joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(device: str, threads: int, arguments: list[str]) -> dict:
    """The fields shared by all rows of one run."""
    build = cotnet_ext.build_info()
    return {
        "run": uuid.uuid4().hex[:12],
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks", *arguments]),
        "commit": _commit(),
        "device": device_name(device),
        "gpu": torch.device(device).type == "cuda",
        "threads": threads,
        "versions": {
            "cotnet_ext": cotnet_ext.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "compiler": build["compiler"],
            "cpu_capability": build["cpu_capability"],
        },
    }


def child_python(code: str) -> str:
    """What `code` prints in a fresh interpreter that sees this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def _commit() -> str | None:
    """The commit of this checkout, with `+changes` when files differ from it; None outside git.

    The results of earlier runs decide nothing, and a run writes them as it goes.
    """
    head = _git("rev-parse", "--short=12", "HEAD")
    changes = _git("status", "--porcelain", "-uno", "--", ".", ":(exclude)benchmarks/results")
    return head and head + ("+changes" if changes else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return re.sub(r"\s+", " ", names[0]) if names else platform.processor() or platform.machine()
