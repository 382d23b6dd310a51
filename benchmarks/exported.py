"""Exported CoTNet-50 against the reference network in PyTorch, on a CPU.

    python -m benchmarks.exported

Exports the network (a minute of compiling) to a folder that goes away, then measures like all
other benchmarks: checked, interleaved, cold. Needs the extra `cotnet_ext[export]` and a C++
compiler. The exit status is 1 when a figure is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.export import Dim

from cotnet_ext import export, models
from cotnet_ext.export._onnx import Session

from .__main__ import _line
from .comparison import Comparison, Contender, Function, Options, Tensors
from .harness import measure
from .shapes import Shape


@dataclass(frozen=True)
class Images:
    """Random images, and a seed of them."""

    batch: int
    size: int
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    def __call__(self) -> Tensors:
        return (torch.randn(self.batch, 3, self.size, self.size),)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exported", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--size", type=int, default=224, help="of the images (default: 224)")
    parser.add_argument("--budget", type=float, default=10.0, metavar="S", help="per comparison")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    options = Options(threads=chosen.threads, budget_s=chosen.budget, turn_calls=1)
    failures = 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        for rows, target in _measure_all(Path(folder), chosen.size, options):
            print(*map(_line, rows), sep="\n")
            reached = rows[-1]["ratio"] is not None and rows[-1]["ratio"] >= target
            verdict = "reached" if reached else "MISSED"
            print(f"  {verdict}: at least {target} times as fast as {rows[-1]['provider']}")
            failures += not reached or any(row["error"] for row in rows)
    return int(failures > 0)


def _measure_all(folder: Path, size: int, options: Options):
    """Rows and target of both figures; what is measured against stands last."""
    network, reference = (_network(reference) for reference in (False, True))
    path = folder / "network.onnx"
    images = torch.randn(2, 3, size, size)
    batch = ({0: Dim("batch", min=1)},)
    export.onnx(network, (images,), path, dynamic_shapes=batch)
    run = Session(path, options.threads)
    yield _compare(1, size, "onnxruntime", lambda x: run(x)[0], reference, options, False), 1.0
    path = folder / "network.pt2"
    export.aoti(network, (images,), path, dynamic_shapes=batch)
    run_package = torch._inductor.aoti_load_package(str(path))
    yield _compare(4, size, "AOTInductor", run_package, reference, options, True), 1.1


def _network(reference: bool) -> nn.Module:
    torch.manual_seed(0)
    return models.create_model("cotnet50", reference=reference).eval()


def _compare(
    batch: int,
    size: int,
    provider: str,
    run: Function,
    reference: nn.Module,
    options: Options,
    compiled: bool,
) -> list[dict]:
    make = Images(batch, size)
    contenders = [
        Contender(provider, run, reference, make),
        Contender("reference", reference, reference, make),
    ]
    if compiled:
        contenders.append(Contender("reference, compiled", _frozen(reference), reference, make))
    shape = Shape(batch, 3, size)
    comparison = Comparison("cotnet50", "eval", shape, contenders, keep_results=False)
    with torch.no_grad():
        return measure(comparison, options)


def _frozen(network: nn.Module) -> Function:
    """Compiled with constant weights, which is what makes it fast on a CPU.

    The setting must hold while the network is traced, too: as one of the options of
    `torch.compile` it reaches the code generation only, and the result is slower than without.
    """
    compiled = torch.compile(network, dynamic=False)

    def run(images: Tensor) -> Tensor:
        with torch.no_grad(), inductor_config.patch(freezing=True):
            return compiled(images)

    return run


if __name__ == "__main__":
    sys.exit(main())
