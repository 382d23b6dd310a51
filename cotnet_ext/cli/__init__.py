"""The console script `cotnet-ext`.

A command is a file of this folder: a function that declares its arguments, one that takes them
parsed and returns the exit code, and both in `COMMAND`. Exit codes: 0 done, 1 the command ran and
found a failure, 2 it could not run as asked; then stderr says why in one line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from .._version import __version__
from . import convert, demo, export, info, predict
from .command import UsageError

PROGRAM = "cotnet-ext"
COMMANDS = tuple(command.COMMAND for command in (info, demo, convert, predict, export))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `cotnet-ext` with these arguments (default: those of the process)."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except UsageError as error:
        print(f"{PROGRAM} {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM} {arguments.command}: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM, description="Contextual transformer blocks for PyTorch, in C++ kernels."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name, help=command.summary, description=_sentence(command.summary)
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _sentence(summary: str) -> str:
    return summary[0].upper() + summary[1:] + "."
