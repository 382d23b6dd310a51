"""What no kernel can hide: the time to import the package, and to make one call."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

import cotnet_ext
from cotnet_ext import reference

from .comparison import SUBJECT, Comparison, Contender, Options
from .environment import child_python
from .harness import measure, quantiles
from .inputs import Window
from .shapes import TINY

IMPORT = """
import time, torch
start = time.perf_counter()
import cotnet_ext
print(time.perf_counter() - start)
"""


def rows(options: Options) -> Iterator[dict]:
    yield import_row(starts=3 if options.quick else 9)
    for direction in ("forward", "recorded forward", "forward+backward"):
        yield from measure(_one_call(direction, options), options)


def import_row(starts: int) -> dict:
    """Milliseconds of `import cotnet_ext` after `import torch`, in fresh interpreters."""
    child_python(IMPORT)  # the first one writes bytecode and fills the file cache
    ms = [1e3 * float(child_python(IMPORT)) for _ in range(starts)]
    return {
        "comparison": "import",
        "op": "import",
        "pass": "after torch",
        "provider": SUBJECT,
        "rounds": starts,
        "ms": quantiles(ms),
        "error": None,
    }


def _one_call(direction: str, options: Options) -> Comparison:
    """local_aggregation on a tiny tensor; a depthwise convolution shows what PyTorch needs."""
    make = Window(TINY, device=options.device)
    window = {"kernel_size": TINY.kernel_size, "padding": TINY.padding}
    ours = functools.partial(cotnet_ext.local_aggregation, **window)
    truth = functools.partial(reference.local_aggregation, **window)
    contenders = [
        Contender(SUBJECT, ours, truth, make),
        Contender("unfold", truth, truth, make),
        Contender("depthwise convolution", _depthwise, _depthwise, make),
    ]
    repeat = 10 if options.quick else 200
    return Comparison("one call", direction, TINY, contenders, repeat=repeat, host=True)


def _depthwise(input: Tensor, weight: Tensor) -> Tensor:
    """`F.conv2d` with as many weights as one pixel of the aggregation has."""
    kernel = weight[0, 0, :, :, 0, 0].view(1, 1, TINY.kernel_size, TINY.kernel_size)
    kernel = kernel.expand(TINY.channels, -1, -1, -1)
    return F.conv2d(input, kernel, padding=TINY.padding, groups=TINY.channels)
