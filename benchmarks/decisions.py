"""`python -m benchmarks.decisions`: a training step of a layer, A against B.

Prints a Markdown table of medians in milliseconds: the layer composed of its submodules; as one
function with NCHW or with channels_last inside, wherever its input comes from; and as it is chosen
(`cotnet_ext._layer_steps._is_small`). Each is measured in processes of its own, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

from cotnet_ext import modules

from .isolation import in_own_process
from .shapes import STAGES, Shape

VARIANTS: dict[str, dict[str, Callable]] = {
    "composed": {"cotnet_ext.modules.is_fusable": lambda layer, input: False},
    "NCHW inside": {"cotnet_ext._layer_steps._is_small": lambda x: False},
    "channels_last inside": {"cotnet_ext._layer_steps._is_small": lambda x: True},
    "as chosen": {},
}


@contextmanager
def variant(name: str) -> Iterator[None]:
    with ExitStack() as patches:
        for target, new in VARIANTS[name].items():
            patches.enter_context(mock.patch(target, new))
        yield


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> float:
    """Seconds of one forward and backward."""
    x.grad = None
    layer.zero_grad()
    start = time.perf_counter()
    layer(x).backward(grad)
    return time.perf_counter() - start


def measure(kind: str, shape: Shape, name: str, steps: int) -> float:
    """Median milliseconds of one variant."""
    torch.manual_seed(0)
    layer = getattr(modules, kind)(shape.channels, shape.kernel_size)
    sizes = (shape.batch, shape.channels, shape.size, shape.size)
    x, grad = torch.randn(sizes, requires_grad=True), torch.randn(sizes)
    with variant(name):
        seconds = [step(layer, x, grad) for _ in range(steps + 4)]
    return 1e3 * statistics.median(seconds[4:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decisions", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # in this process, of which the measuring ones are copies
    print(f"| training step, ms | {' | '.join(VARIANTS)} |\n| :-- |{' --: |' * len(VARIANTS)}")
    for kind in ("CoTAttention", "CotLayer", "CoXtLayer"):
        for shape in STAGES:
            times: dict[str, list[float]] = {name: [] for name in VARIANTS}
            for _ in range(arguments.rounds):
                for name, found in times.items():
                    work = partial(measure, kind, shape, name, steps=10)
                    found.append(in_own_process(work, arguments.threads))
            row = " | ".join(f"{statistics.median(found):.1f}" for found in times.values())
            print(f"| {kind} {shape} | {row} |", flush=True)


if __name__ == "__main__":
    main()
