"""`cotnet-ext info`: what was built, and the PyTorch it runs in."""

from __future__ import annotations

import argparse
import json
import sys

from .command import Command, UsageError


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for other programs to read")
    parser.add_argument(
        "--explain",
        metavar="MODEL",
        help="for each contextual layer of a network, whether a training step of it is one "
        "function, and why not; for a model of yours: set the logger cotnet_ext to DEBUG",
    )


def _explain(name: str, as_json: bool) -> int:
    """Prints which path a training step of each contextual layer of a network takes."""
    from .._fusable import explain
    from ..models import create_model

    try:
        reasons = explain(create_model(name))
    except ValueError as error:
        raise UsageError(f"--explain: {error}") from None
    if as_json:
        print(json.dumps(reasons, indent=2))
        return 0
    width = max(map(len, reasons))
    for layer, reason in reasons.items():
        print(f"{layer:<{width}}  {f'composed: {reason}' if reason else 'fused'}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    """Prints what was built, and the PyTorch it runs in."""
    if arguments.explain:
        return _explain(arguments.explain, arguments.json)
    import torch

    from .._ops import build_info

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


COMMAND = Command("info", "show what was built, and the PyTorch it runs in", _add_arguments, _run)
