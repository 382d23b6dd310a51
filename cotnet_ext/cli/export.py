"""`cotnet-ext export`: a network as a file for onnxruntime, TensorRT, `torch.export` or C++."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

from torch import Tensor

from .command import Command, UsageError, make_folder, require, whole

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".pt2"}
DTYPES = ("float32", "float16", "bfloat16")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="NAME", help="such as cotnet50")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="its weights: .safetensors, .pth, .pth.tar (default: random ones)",
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=SUFFIXES,
        help="onnx: standard operators; pt2: a program of torch.export; aoti: machine code",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="what to write: .onnx or .pt2"
    )
    parser.add_argument(
        "--num-classes", type=whole(1), default=1000, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and images (%(default)s)"
    )
    parser.add_argument(
        "--size", type=whole(32), metavar="N", help="height and width (default: the network's)"
    )
    parser.add_argument("--batch", type=whole(1), default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--dynamic",
        choices=("none", "batch", "all"),
        default="batch",
        help="what stays open: nothing, the batch, or height and width (from 33) too "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--opset", type=whole(1), metavar="N", help="of onnx (default: 18, in bfloat16 22)"
    )
    parser.add_argument(
        "--decompose",
        action="store_true",
        help="of pt2 and aoti: without the operators of this package, for a PyTorch without it",
    )


def _run(arguments: argparse.Namespace) -> int:
    """Builds, traces and writes the network, and compares what was written with it."""
    _check(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            return _export(arguments)
    except OSError as error:
        if error.filename is None or Path(error.filename).parent != arguments.out.parent:
            raise
        reason = error.strerror or str(error)
        raise UsageError(f"--out: cannot write {str(arguments.out)!r}: {reason}") from None


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what cannot be done before anything is built."""
    suffix = SUFFIXES[arguments.format]
    if arguments.out.suffix != suffix:
        raise UsageError(
            f"--out: a file of --format {arguments.format} ends in {suffix}, "
            f"got {str(arguments.out)!r}"
        )
    if arguments.format == "onnx":
        require("export", "onnx", "onnxscript", "onnxruntime")
        if arguments.decompose:
            raise UsageError("--decompose: an ONNX file has standard operators only in any case")
        from ..export._onnx import choose_opset

        try:
            choose_opset(arguments.opset, arguments.dtype == "bfloat16")
        except ValueError as error:
            raise UsageError(f"--{error}") from None
    elif arguments.opset is not None:
        raise UsageError(f"--opset: a file of --format {arguments.format} has none")
    if arguments.format == "aoti":
        _require_compiler()
    if arguments.out.is_dir():
        raise UsageError(f"--out: {str(arguments.out)!r} is a folder")
    make_folder("--out", arguments.out.parent)


def _require_compiler() -> None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise UsageError(
            "--format aoti: needs a C++ compiler, and found none; install g++ or set CXX"
        ) from None


def _export(arguments: argparse.Namespace) -> int:
    import torch

    from .. import export
    from ..models import create_model, get_variant

    try:
        size = arguments.size or get_variant(arguments.model).input_size[1]
        model = create_model(
            arguments.model, num_classes=arguments.num_classes, checkpoint=arguments.checkpoint
        )
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None
    model.eval().to(getattr(torch, arguments.dtype))
    options, images = _what_is_open(arguments, size)
    if arguments.format == "onnx":
        options |= {"input_names": ["images"], "output_names": ["logits"]}
        options["opset"] = arguments.opset
    else:
        options["decompose"] = arguments.decompose
    print(f"{arguments.model}: writing {arguments.out} ...", flush=True)
    start = time.perf_counter()
    try:
        error = getattr(export, arguments.format)(model, (images,), arguments.out, **options)
    except export.ExportError as failure:
        print(f"cotnet-ext export: {failure}", file=sys.stderr)
        return 1
    print(
        f"{os.path.getsize(arguments.out) / 1e6:.1f} MB in {time.perf_counter() - start:.0f} s, "
        f"{_signature(arguments, size)}\n"
        f"results differ from the network's by {error:.1e} of their norm"
    )
    return 0


def _what_is_open(arguments: argparse.Namespace, size: int) -> tuple[dict, Tensor]:
    """Options of the exporting function that say what stays open, and images to trace with."""
    import torch
    from torch.export import Dim

    def images(batch: int, *map_size: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(batch, 3, *map_size, generator=generator)
        return values.to(getattr(torch, arguments.dtype))

    if arguments.dynamic == "none":
        return {}, images(arguments.batch, size, size)
    # What is 1 while the network is traced is taken for a 1 that never changes: the batch, and the
    # last map, which has a pixel for 32 x 32 of the image.
    batch = max(arguments.batch, 2)
    axes = {0: Dim("batch", min=1)}
    sample = images(1, size, size)
    if arguments.dynamic == "all":
        axes |= {2: Dim("height", min=33), 3: Dim("width", min=33)}
        size = max(size, 64)
        sample = images(1, size + 32, size + 17)
    return {"dynamic_shapes": (axes,), "samples": [(sample,)]}, images(batch, size, size)


def _signature(arguments: argparse.Namespace, size: int) -> str:
    """What the file takes and gives."""
    batch = "batch" if arguments.dynamic != "none" else arguments.batch
    sides = "height, width" if arguments.dynamic == "all" else f"{size}, {size}"
    dtype, classes = arguments.dtype, arguments.num_classes
    return f"{dtype} images [{batch}, 3, {sides}] to logits [{batch}, {classes}]"


COMMAND = Command(
    "export",
    "write a network as a file for onnxruntime, TensorRT, torch.export or C++",
    _add_arguments,
    _run,
)
