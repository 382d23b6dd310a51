"""`cotnet-ext demo`: every module beside its reference, and a small training."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import Command, make_folder, require, whole


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_output"),
        metavar="DIR",
        help="folder for the picture, made if missing (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=whole(0, 2**32 - 1),  # what NumPy takes
        default=0,
        metavar="N",
        help="random seed (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=whole(1),
        metavar="N",
        help="epochs of each training (default: 15, with --quick 3); "
        "the accuracy is judged from 15 on",
    )
    parser.add_argument("--quick", action="store_true", help="fewer photographs, repeats, epochs")
    parser.add_argument(
        "--threads", type=whole(1), metavar="N", help="CPU threads (default: as PyTorch chooses)"
    )


def _run(arguments: argparse.Namespace) -> int:
    """Runs every module beside its reference on photographs, and trains a small network."""
    require("demo", "sklearn", "matplotlib", "rich")
    make_folder("--out", arguments.out)
    from ..demo.run import Options, run

    options = Options(
        out=arguments.out,
        seed=arguments.seed,
        epochs=arguments.epochs,
        quick=arguments.quick,
        threads=arguments.threads,
    )
    return 0 if run(options) else 1


COMMAND = Command(
    "demo",
    "compare every module with its reference on photographs, train a small network on "
    "handwritten digits, and draw a picture of it all",
    _add_arguments,
    _run,
)
