"""CMake builds of the C++ for tests, kept in build/ so that the next run compiles what changed."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def search_path() -> str:
    """PATH with the scripts of this environment in front: cmake and ninja may come from pip."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])


def run(*command: str | Path, **options) -> str:
    """What a command prints; its failure is an AssertionError that shows all of it."""
    env = {**os.environ, "PATH": search_path(), **options.pop("env", {})}
    program = shutil.which(command[0], path=env["PATH"]) or command[0]
    done = subprocess.run(
        [program, *command[1:]],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        **options,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def cmake_build(name: str, *targets: str, **definitions: str) -> Path:
    """Configure build/<name> with the definitions, build the targets (or all); the folder."""
    folder = ROOT / "build" / name
    settings = [f"-D{key}={value}" for key, value in definitions.items()]
    # One of the processes of pytest-xdist builds what all of them use.
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    wanted = " ".join((str(session), *targets, *settings))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "built", "a+") as built:
        fcntl.flock(built, fcntl.LOCK_EX)
        built.seek(0)
        if session and wanted in built.read().splitlines():
            return folder
        # --fresh: a folder of another checkout or another Python must not decide anything.
        run("cmake", "--fresh", "-S", ROOT, "-B", folder, "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}", *settings)  # fmt: skip
        run("cmake", "--build", folder, *(["--target", *targets] if targets else []))
        if session:
            built.write(f"{wanted}\n")
    return folder
