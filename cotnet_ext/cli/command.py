"""What a command is, and the types and checks of arguments that several commands share."""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class UsageError(Exception):
    """The command cannot run as asked; the message is the line that the user sees."""


@dataclass(frozen=True)
class Command:
    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number within these bounds."""

    def parse(text: str) -> int:
        expected = f"a whole number >= {least}" + (f" and <= {most}" if most else "")
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least or (most and value > most):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def require(extra: str, *packages: str) -> None:
    """Refuses to start when packages of an optional extra cannot be imported."""
    missing = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append({"PIL": "pillow", "sklearn": "scikit-learn"}.get(package, package))
    if missing:
        raise UsageError(
            f'needs {", ".join(missing)}; install with: pip install "cotnet_ext[{extra}]"'
        )


def make_folder(option: str, folder: Path) -> None:
    """Makes the folder and proves that files can be written there, before the work begins."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"{option}: cannot write to {str(folder)!r}: {reason}") from None
