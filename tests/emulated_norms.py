"""The emulated CUDA kernels of the operators of fused layers: how each is called, and its truth."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from emulated_maps import H200, array_of, name_of, poisoned, tensor_of
from test_batch_norm import TOLERANCE, arguments, outputs
from torch import Tensor

from cotnet_ext import _batch_norm, _ops

OPERATORS = _ops.BATCH_NORM
Shape = tuple[int, int, int, int]

# What each leaves: maps, and tables by the dimensions of (N, C) that they have.
RESULTS: dict[str, tuple] = {
    "batch_norm_statistics": ((3, "C"), ("C",), ("C",)),
    "batch_norm": ("map",),
    "batch_norm_backward": ("map", ("C",), ("C",)),
    "batch_norm_fusion_pool": (("N", "C"),),
    "batch_norm_fusion": ("map",),
    "batch_norm_fusion_sums": (("N", 6, "C"),),
    "batch_norm_fusion_backward": ("map", "map", ("C",), ("C",)),
}


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and tables."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def known(name: str, shape: Shape, dtype: torch.dtype) -> tuple[list, tuple[Tensor, ...]]:
    """Arguments, and what the definition makes of them in float64."""
    args = arguments(name, shape, dtype)
    return args, truth_of(name, args)


def truth_of(name: str, args: list) -> tuple[Tensor, ...]:
    doubled = [a.double() if isinstance(a, Tensor) else a for a in args]
    return outputs(getattr(_batch_norm, f"defined_{name}")(*doubled))


def result_shapes(name: str, shape: Shape) -> list[tuple[int, ...]]:
    sizes = {"N": shape[0], "C": shape[1]}
    kinds = RESULTS[name]
    return [shape if k == "map" else tuple(sizes.get(size, size) for size in k) for k in kinds]


def run(
    kernels, name: str, args: list, last: bool, *, gpu: tuple = H200, offset: int = 0
) -> list[Tensor]:
    """All results, on arrays `offset` elements past an aligned address."""
    like = next(a for a in args if isinstance(a, Tensor) and a.dim() == 4)
    shape, dtype = tuple(like.shape), like.dtype
    problem = (*shape[:2], shape[2] * shape[3], last)
    given = [array_of(a, last, offset) if isinstance(a, Tensor) else a for a in args]
    shapes = result_shapes(name, shape)
    dtypes = [dtype if kind == "map" else wide(dtype) for kind in RESULTS[name]]
    results = [poisoned(s, d, offset) for s, d in zip(shapes, dtypes, strict=True)]
    getattr(kernels, name)(problem, name_of(dtype), gpu, *given, *results)
    found = zip(results, shapes, dtypes, strict=True)
    return [tensor_of(array, s, d, last) for array, s, d in found]


def assert_close(name: str, results: Iterable[Tensor], truth: Iterable[Tensor], dtype) -> None:
    """Within the tolerance of the CPU's operators, of the largest element."""
    for i, (result, true) in enumerate(zip(results, truth, strict=True)):
        tolerance = TOLERANCE[result.dtype if result.dtype == dtype else wide(dtype)]
        error = (result.double() - true).abs().max()
        assert error <= tolerance * true.abs().max(), f"{name} {i}: off by {float(error):.2e}"
