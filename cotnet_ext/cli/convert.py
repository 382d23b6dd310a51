"""`cotnet-ext convert`: the weights of a PyTorch file as a safetensors file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Command, UsageError, require

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, metavar="IN", help="the file to read: .pth.tar, .pth, .pt"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the .safetensors file to write")
    parser.add_argument(
        "--model", metavar="NAME", help="refuse weights of any other network than this one"
    )
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="take the weights themselves where the file also has their moving average",
    )


def _run(arguments: argparse.Namespace) -> int:
    """Reads the weights, compares them with the network that they are of, writes them."""
    require("models", "safetensors")
    from .. import checkpoints
    from ..models import get_variant

    path, out = arguments.checkpoint, arguments.out
    if out.suffix != ".safetensors":
        raise UsageError(f"OUT must end in .safetensors, got {str(out)!r}")
    try:
        if arguments.model is not None:
            get_variant(arguments.model)
        checkpoint = checkpoints.read(path, ema=not arguments.no_ema)
        network = _network(checkpoint, arguments.model)
    except OSError as error:
        raise UsageError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    count = sum(value.numel() for value in checkpoint.tensors.values())
    part = f" in {checkpoint.part!r}" if checkpoint.part else ""
    average = ", a moving average" if checkpoint.averaged else ""
    metadata = {"part": checkpoint.part, **({"model": network} if network else {})}
    try:
        checkpoints.write(checkpoint.tensors, out, metadata)
    except OSError as error:
        raise UsageError(f"cannot write {str(out)!r}: {error.strerror or error}") from None
    print(f"read     {path}: {len(checkpoint.tensors)} tensors, {count:,} numbers{part}{average}")
    print(f"network  {network or 'none of cotnet_ext.models; written as it is'}")
    print(f"wrote    {out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


def _network(checkpoint: Checkpoint, name: str | None) -> str | None:
    """The network whose weights these are, `name` if given; None if they are of none of ours."""
    import torch

    from ..checkpoints import CheckpointError, fit
    from ..models import create_model, get_variant, identify
    from ..models.weights import naming_the_owner

    tensors = checkpoint.tensors
    wanted = name or next(iter(identify(tensors)), None)
    if wanted is None:
        return None
    first = tensors.get(f"{get_variant(wanted).first_conv}.weight")
    classifier = tensors.get("fc.weight")
    with torch.device("meta"):
        model = create_model(
            wanted,
            num_classes=0 if classifier is None else len(classifier),
            in_chans=3 if first is None or first.dim() != 4 else first.shape[1],
        )
    try:
        with naming_the_owner(wanted):
            fit(checkpoint, model)
    except CheckpointError:
        if name is not None:
            raise
        return None
    return wanted


COMMAND = Command(
    "convert",
    "read the weights of a PyTorch file, such as the official .pth.tar, without running code of "
    "the file, and write them as safetensors",
    _add_arguments,
    _run,
)
