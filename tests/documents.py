"""Runs what documents show: their Python and bash blocks, as they stand and in their order.

A test prepares a folder with the files that the document speaks of, then calls `run_document`. In
that folder `cotnet-ext` and `python` are those of this repository, whatever is installed. Blocks of
other languages (`text`, `console`) are pictures of something and are not run.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPERATORS = ROOT / "tests" / "torchvision_operators"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the document that it starts in."""

    document: Path
    language: str
    code: str
    line: int

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def blocks(document: Path, *languages: str) -> list[Block]:
    """The blocks of a document in these languages (default: python and bash), in their order."""
    text = document.read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    wanted = languages or ("python", "bash")
    return [
        Block(document, match[1], match[2], text.count("\n", 0, match.start(2)) + 1)
        for match in found
        if match[1] in wanted
    ]


def run_python(block: Block, names: dict[str, object] | None = None) -> None:
    """Runs a Python block in this process; `names` are what earlier blocks left behind."""
    # Lines are those of the document, also in a traceback.
    code = "\n" * (block.line - 1) + block.code
    names = {} if names is None else names
    names.setdefault("__name__", "document")
    exec(compile(code, str(block.document), "exec"), names)


def environment(folder: Path) -> dict[str, str]:
    """Variables for a process whose `cotnet-ext`, `python` and `cotnet_ext` are ours."""
    programs = folder / ".programs"
    programs.mkdir(exist_ok=True)
    for name, arguments in (("cotnet-ext", "-m cotnet_ext.cli"), ("python", "")):
        script = programs / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        script.chmod(0o755)
    paths = [str(ROOT), str(OPERATORS), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PATH": os.pathsep.join(
            [str(programs), os.path.dirname(sys.executable), os.environ["PATH"]]
        ),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def run_bash(block: Block, folder: Path) -> str:
    """Runs a bash block in `folder`; what it printed. A command that fails is an AssertionError."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=folder,
        env=environment(folder),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{block.code}\n{done.stdout}"
    return done.stdout


def run_document(document: Path, folder: Path) -> list[str]:
    """Runs all blocks of a document in `folder`, Python in one namespace; what bash printed."""
    names: dict[str, object] = {}
    printed = []
    with working_in(folder):
        for block in blocks(document):
            if block.language == "python":
                run_python(block, names)
            else:
                printed.append(run_bash(block, folder))
    return printed


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def broken_links(document: Path) -> list[str]:
    """Links of a document to files of the repository that are not there."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", document.read_text())
    return [link for link in links if not (document.parent / link).exists()]
