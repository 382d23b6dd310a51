"""The CuPy kernels of the official repository, from a checkout of it that is given by path.

They know float32 and float64, contiguous. They call a function that CuPy removed in version 13; its
successor takes its place here, in this process only.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

MODULE = "cupy_layers.aggregation_zeropad"


def local_aggregation(checkout: Path) -> Callable[..., Tensor]:
    """`aggregation_zeropad(input, weight, kernel_size=, padding=)` of the checkout."""
    import cupy

    if not hasattr(cupy.cuda, "compile_with_cache"):
        cupy.cuda.compile_with_cache = lambda code: cupy.RawModule(code=code)
    if not (checkout / MODULE.replace(".", "/")).with_suffix(".py").is_file():
        raise FileNotFoundError(f"{checkout} is no checkout of JDAI-CV/CoTNet: it lacks {MODULE}")
    if str(checkout) not in sys.path:
        sys.path.append(str(checkout))
    return importlib.import_module(MODULE).aggregation_zeropad


def late(checkout: Path) -> Callable[..., Tensor]:
    """The same, looked up when first called: what fails then is reported as that contender's."""

    def aggregate(*inputs: Tensor, **window: int) -> Tensor:
        return local_aggregation(checkout)(*inputs, **window)

    return aggregate
