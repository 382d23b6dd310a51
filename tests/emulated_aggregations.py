"""Aggregations on the emulated CUDA kernels: problems as the C++ takes them, weights as arrays."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from cases import Case, pair
from emulated_maps import H200, array_of, name_of, poisoned, tensor_of
from oracle import LOCAL, NORM, SOFTMAX, Expected, Function, Tensors, expected
from tolerances import accumulation_dtype, assert_same_bits, check

EPS = 1e-5


def problem(case: Case, last: bool) -> tuple:
    sizes = zip(
        (case.height, case.width),
        case.output_size,
        pair(case.kernel_size),
        pair(case.stride),
        pair(case.padding),
        pair(case.dilation),
        strict=True,
    )
    reflect = case.padding_mode == "reflect"
    counts = (case.batch, case.channels, case.heads, case.weight_channels)
    return (*counts, *sizes, reflect, last)


def array(t: torch.Tensor, last: bool, offset: int = 0, tap_major: bool = False) -> np.ndarray:
    """A weight [N, G, Cw, K, Ho, Wo] is laid out as a map [N, G*Cw*K, Ho, Wo], or of G*K*Cw."""
    if t.dim() == 6:
        t = (t.transpose(2, 3) if tap_major else t).flatten(1, 3)
    return array_of(t, last, offset)


def tensor(
    case: Case,
    a: np.ndarray,
    shape: tuple,
    dtype: torch.dtype,
    last: bool,
    tap_major: bool = False,
) -> torch.Tensor:
    if len(shape) == 6:
        flat = (case.batch, case.norm_size, *case.output_size)
        n, g, cw, k, h, w = shape
        order = (n, g, k, cw, h, w) if tap_major else shape
        t = tensor_of(a, flat, dtype, last).reshape(order)
        return t.transpose(2, 3) if tap_major else t
    return tensor_of(a, shape, dtype, last)


def run(
    kernels: ModuleType,
    function: Function,
    case: Case,
    known: Expected,
    last: bool,
    *,
    gpu: tuple = H200,
    asked: Callable[[str], bool] = lambda name: True,
    offset: int = 0,
    tap_major: bool = False,
) -> Tensors:
    """The output, and gradients of the arguments asked for, of the emulated kernels; what they do
    not write is NaN."""
    dtype = known.grad.dtype
    shapes = {"output": case.output_shape}
    shapes |= {name: tuple(t.shape) for name, t in known.tensors.items()}
    a = {name: array(t, last, offset, tap_major) for name, t in known.tensors.items()}
    grad = array(known.grad, last, offset)
    results = {
        name: poisoned(shape, dtype, offset)
        for name, shape in shapes.items()
        if name == "output" or asked(name)
    }
    start = (name_of(dtype), (*problem(case, last), tap_major), gpu)
    grads = [results.get(name) for name in function.arguments]
    arguments = [a[name] for name in function.arguments]
    if function is NORM:
        groups = (case.batch, case.heads * case.weight_channels)
        mean, rstd = (poisoned(groups, accumulation_dtype(dtype)) for _ in range(2))
        kernels.group_norm_aggregation(*start, *arguments, EPS, results["output"], mean, rstd)
        kernels.group_norm_aggregation_backward(*start, grad, *arguments, mean, rstd, *grads)
    else:
        getattr(kernels, function.name)(*start, *arguments, results["output"])
        getattr(kernels, f"{function.name}_backward")(*start, grad, *arguments, *grads)
    return {
        name: tensor(case, r, shapes[name], dtype, last, tap_major) for name, r in results.items()
    }


def check_all(function: Function, results: Tensors, known: Expected) -> None:
    for name, result in results.items():
        check(
            result,
            known.truth[name],
            name=f"{function} {name}",
            reference=known.same[name],
            magnitude=known.magnitude[name],
        )


def check_schedules(
    kernels: ModuleType, schedules, function: Function, case: Case, dtype, last: bool, **options
) -> None:
    """Right under every order of threads, and the same bits."""
    known = expected(function, case, dtype)
    first: Tensors = {}
    for schedule in schedules():
        results = run(kernels, function, case, known, last, **options)
        check_all(function, results, known)
        first = first or results
        for name, result in results.items():
            assert_same_bits(result, first[name], f"{function} {name}, {schedule} schedule")


AGGREGATIONS = (LOCAL, SOFTMAX, NORM)
