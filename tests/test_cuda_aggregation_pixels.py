"""The kernels that go over channels_last maps pixel by pixel, emulated, against float64: which
problems they take, windows of every kind, weights in both orders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CASES, Case, dtype_id, each, generator
from emulated_aggregations import AGGREGATIONS, check_all, check_schedules, problem, run
from emulated_maps import emulated_kernels, thread_schedules
from oracle import LOCAL, expectation, expected
from test_cuda_aggregations import tiled
from test_local_aggregation import _taps_inside
from tolerances import DTYPES, check

kernels, schedules = emulated_kernels, thread_schedules
TYPES = pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
FUNCTIONS = pytest.mark.parametrize("function", AGGREGATIONS, ids=str)
ORDER = pytest.mark.parametrize("tap_major", [False, True], ids=["official", "tap_major"])


def windowed(name: str, size: tuple, window: tuple) -> Case:
    """size: as of `tiled`; window: kernel, stride, padding, dilation."""
    names = ("kernel_size", "stride", "padding", "dilation")
    return replace(tiled(name, *size), **dict(zip(names, window, strict=True)))


# One and several vectors of a pixel; a last block with threads to spare; maps smaller than the
# window; 8 and 16 channels for each weight; windows of other sizes, by steps, far apart.
WINDOWS = (
    windowed("pixels_k5_7x9", (2, 16, 8, 7, 9), (5, 1, 2, 1)),
    windowed("pixels_k7_11x6", (1, 8, 16, 11, 6), (7, 1, 3, 1)),
    windowed("pixels_k7_2x3", (3, 8, 8, 2, 3), (7, 1, 3, 1)),
    windowed("pixels_k5_stride2", (1, 8, 8, 9, 12), (5, 2, 2, 1)),
    windowed("pixels_k3x5_dilation", (1, 8, 8, 8, 9), ((3, 5), (2, 1), (1, 3), (1, 2))),
    windowed("pixels_k4_padding0", (2, 8, 8, 6, 5), (4, 1, 0, 1)),
)
LARGE = WINDOWS[:2]


def chosen(kernels, case, dtype, result="output", aligned=True, last=True):
    size = torch.finfo(dtype).bits // 8
    return kernels.choose_aggregation_pixels(problem(case, last), size, aligned, result)


@each(WINDOWS)
@TYPES
@FUNCTIONS
@ORDER
def test_values_and_gradients(kernels, schedules, case, dtype, function, tap_major):
    assert chosen(kernels, case, dtype) and chosen(kernels, case, dtype, "grad_input")
    check_schedules(kernels, schedules, function, case, dtype, True, tap_major=tap_major)


@each(LARGE)
@FUNCTIONS
@ORDER
def test_only_the_gradients_asked_for(kernels, case, function, tap_major):
    known = expected(function, case, torch.float16)
    for only in function.arguments:
        results = run(
            kernels, function, case, known, True, asked={only}.__contains__, tap_major=tap_major
        )
        assert set(results) == {"output", only}
        check_all(function, results, known)


@each(LARGE)
@FUNCTIONS
@ORDER
def test_unaligned_views_and_float64_go_elsewhere(kernels, case, function, tap_major):
    for dtype, offset in ((torch.float16, 1), (torch.float64, 0)):
        known = expected(function, case, dtype)
        options = {"offset": offset, "tap_major": tap_major}
        check_all(function, run(kernels, function, case, known, True, **options), known)


@each(LARGE)
@TYPES
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", ["input", "weight", "grad"])
def test_what_is_not_finite_reaches_its_windows_only(kernels, case, dtype, poison, where):
    """Taps outside of the map stay out of it: neither is anything put there, nor looked for."""
    known = expected(LOCAL, case, dtype)
    tensors = {name: t.clone() for name, t in known.tensors.items()}
    grad, inside = known.grad.clone(), _taps_inside(case)
    victim = grad if where == "grad" else tensors[where]
    some = torch.rand(victim.shape, generator=generator("poison")) < 0.01
    victim[some & inside if where == "weight" else some] = poison
    known = expectation(LOCAL, case, tensors, grad)
    for tap_major in (False, True):
        results = run(kernels, LOCAL, case, known, True, tap_major=tap_major)
        for name, result in results.items():
            check(result, known.truth[name], name=name, reference=known.same[name],
                  magnitude=known.magnitude[name],
                  where=inside if name == "weight" else None)  # fmt: skip
        assert (results["weight"][~inside] == 0).all()


def test_blocks(kernels):
    """Vectors of a pixel, threads that share one, threads with work, blocks."""
    case = LARGE[0]  # 2 images of 7 x 9 pixels, 16 weight channels
    assert chosen(kernels, case, torch.float16) == (2, 1, 252, 2)
    assert chosen(kernels, case, torch.float32) == (4, 1, 504, 4)
    assert chosen(kernels, case, torch.float16, "grad_weight") == (2, 5, 1260, 10)
    assert chosen(kernels, LARGE[1], torch.float16) == (1, 2, 132, 2)
    stride = WINDOWS[3]  # from 9 x 12 to 5 x 6 pixels
    assert chosen(kernels, stride, torch.float16) == (1, 1, 30, 1)
    assert chosen(kernels, stride, torch.float16, "grad_input") == (1, 1, 108, 1)


def test_other_problems_go_elsewhere(kernels):
    window = LARGE[0]
    for result in ("output", "grad_input", "grad_weight"):
        assert chosen(kernels, window, torch.float32, result)
        assert chosen(kernels, window, torch.float64, result) is None
        assert chosen(kernels, window, torch.float32, result, aligned=False) is None
        assert chosen(kernels, window, torch.float32, result, last=False) is None
        half = replace(window, weight_channels=12, channels=96)
        assert chosen(kernels, half, torch.float16, result) is None
        assert chosen(kernels, half, torch.float32, result)
        for other in ("reflect", "heads2", "empty_batch"):
            case = replace(CASES[other], weight_channels=8, channels=64)
            assert chosen(kernels, case, torch.float32, result) is None, other
    few = replace(window, channels=4 * window.weight_channels)
    assert chosen(kernels, few, torch.float32) is None
    assert chosen(kernels, few, torch.float32, "grad_weight")
    assert chosen(kernels, WINDOWS[5], torch.float32, "grad_weight") is None
