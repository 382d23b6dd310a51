"""The console script `cotnet-ext`.

A command is one function that takes the parsed arguments and returns the exit code, one that
declares its arguments, and a line in `COMMANDS`. Exit codes: 0 done, 1 the command ran and found
a failure, 2 it could not run as asked; then stderr says why in one line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

PROGRAM = "cotnet-ext"


class UsageError(Exception):
    """The command cannot run as asked; the message is the line that the user sees."""


@dataclass(frozen=True)
class Command:
    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


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


# ---- info ----------------------------------------------------------------------------------------


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for other programs to read")


def _info(arguments: argparse.Namespace) -> int:
    """Prints what was built, and the PyTorch it runs in."""
    import torch

    from ._ops import build_info

    build = build_info()
    facts = {
        **build,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
        "threads": torch.get_num_threads(),
    }
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    labels = [LABELS.get(name, name.replace("_", " ")) for name in facts]
    width = max(map(len, labels))
    for label, value in zip(labels, facts.values(), strict=True):
        print(f"{label:<{width}}  {_readable(value)}")
    if not build["cuda"]:
        print(f"\n{CUDA_HINT}")
    return 0


LABELS = {
    "version": "cotnet_ext",
    "cuda": "CUDA kernels",
    "cuda_version": "built with CUDA",
    "cuda_archs": "for architectures",
    "torch_target": "oldest torch",
    "cpu_capability": "CPU kernels",
    "torch_cuda": "CUDA of torch",
    "cuda_available": "GPU visible",
}
CUDA_HINT = """\
This build holds CPU kernels only. To build CUDA kernels, install a CUDA build of PyTorch and the
CUDA toolkit (nvcc), then run this in the source folder:
  COTNET_EXT_CUDA=1 pip install --no-build-isolation --no-deps --force-reinstall ."""


def _readable(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value)


# ---- demo ----------------------------------------------------------------------------------------


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_output"),
        metavar="DIR",
        help="folder for the picture, made if missing (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_whole(0, 2**32 - 1),  # what NumPy takes
        default=0,
        metavar="N",
        help="random seed (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=_whole(1),
        metavar="N",
        help="epochs of each training (default: 15, with --quick 3); "
        "the accuracy is judged from 15 on",
    )
    parser.add_argument("--quick", action="store_true", help="fewer photographs, repeats, epochs")
    parser.add_argument(
        "--threads", type=_whole(1), metavar="N", help="CPU threads (default: as PyTorch chooses)"
    )


def _demo(arguments: argparse.Namespace) -> int:
    """Runs every module beside its reference on photographs, and trains a small network."""
    _require("demo", "sklearn", "matplotlib", "rich")
    _make_folder("--out", arguments.out)
    from .demo.run import Options, run

    options = Options(
        out=arguments.out,
        seed=arguments.seed,
        epochs=arguments.epochs,
        quick=arguments.quick,
        threads=arguments.threads,
    )
    return 0 if run(options) else 1


COMMANDS = (
    Command("info", "show what was built, and the PyTorch it runs in", _info_arguments, _info),
    Command(
        "demo",
        "compare every module with its reference on photographs, train a small network on "
        "handwritten digits, and draw a picture of it all",
        _demo_arguments,
        _demo,
    ),
)


# ---- arguments -----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM, description="Contextual transformer blocks for PyTorch, in C++ kernels."
    )
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


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
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


def _require(extra: str, *packages: str) -> None:
    """Refuses to start when packages of an optional extra cannot be imported."""
    missing = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append({"sklearn": "scikit-learn"}.get(package, package))
    if missing:
        raise UsageError(
            f'needs {", ".join(missing)}; install with: pip install "cotnet_ext[{extra}]"'
        )


def _make_folder(option: str, folder: Path) -> None:
    """Makes the folder and proves that files can be written there, before the work begins."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"{option}: cannot write to {str(folder)!r}: {reason}") from None


if __name__ == "__main__":
    sys.exit(main())
