"""Windows of 5 x 5 and 7 x 7 from tiles: the output and each gradient, emulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CASES, dtype_id, each
from emulated_aggregations import AGGREGATIONS, check_all, check_schedules, problem, run
from emulated_maps import GPUS, emulated_kernels, thread_schedules
from oracle import LOCAL, expectation, expected
from test_cuda_aggregations import GPU, tiled
from test_local_aggregation import _taps_inside
from tolerances import DTYPES, check

kernels, schedules = emulated_kernels, thread_schedules


def large(name: str, size: int, *numbers: int):
    return replace(tiled(name, *numbers), kernel_size=size, padding=size // 2)


# Several planes in a block; strips, of which some are lower than the window; 16 channels for each
# weight; windows larger than the map.
WINDOWS = (
    large("large_14x14_k7", 7, 1, 3, 8, 14, 14),
    large("large_9x11_k5", 5, 2, 2, 16, 9, 11),
    large("large_33x40_k7", 7, 1, 1, 8, 33, 40),
    large("large_37x66_k5", 5, 1, 1, 8, 37, 66),
    large("large_5x4_k7", 7, 1, 5, 8, 5, 4),
)
# The gradient of the weights takes any number of channels at once, up to 64.
SHARED = (
    large("shared_7x9_k5_of_1", 5, 2, 3, 1, 7, 9),
    large("shared_14x14_k7_of_2", 7, 1, 6, 2, 14, 14),
    large("shared_12x21_k7_of_3", 7, 1, 2, 3, 12, 21),
    large("shared_8x6_k5_of_64", 5, 1, 2, 64, 8, 6),
)


def chosen(kernels, case, dtype, gpu, result="output"):
    size = torch.finfo(dtype).bits // 8
    return kernels.choose_aggregation_tile(problem(case, False), size, True, result, gpu)


@each(WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@GPU
@pytest.mark.parametrize("function", AGGREGATIONS, ids=str)
def test_large_windows(kernels, schedules, case, dtype, gpu, function):
    assert chosen(kernels, case, dtype, gpu)
    asked = {function.arguments[0]}.__contains__
    check_schedules(kernels, schedules, function, case, dtype, False, gpu=gpu, asked=asked)


@each(WINDOWS + SHARED)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@GPU
@pytest.mark.parametrize("function", AGGREGATIONS, ids=str)
def test_gradients_of_weights(kernels, schedules, case, dtype, gpu, function):
    assert chosen(kernels, case, dtype, gpu, result="grad_weight")
    asked = set(function.arguments[1:]).__contains__
    check_schedules(kernels, schedules, function, case, dtype, False, gpu=gpu, asked=asked)


@each(SHARED[1:3])
@pytest.mark.parametrize("function", AGGREGATIONS, ids=str)
def test_arrays_at_odd_addresses(kernels, case, function):
    known = expected(function, case, torch.bfloat16)
    check_all(function, run(kernels, function, case, known, False, offset=1), known)


@each((WINDOWS[0], WINDOWS[3], SHARED[2]))
@GPU
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_reaches_no_tap_outside_of_the_map(kernels, case, gpu, poison):
    """The gradient of a weight that nothing was multiplied with is zero."""
    known = expected(LOCAL, case, torch.float32)
    tensors, inside = known.tensors, _taps_inside(case)
    for i, j in ((0, 0), (case.height - 1, case.width - 1), (case.height // 2, 0)):
        grad = known.grad.clone()
        grad[-1, -1, i, j] = poison
        known_there = expectation(LOCAL, case, tensors, grad)
        asked = {"weight"}.__contains__
        found = run(kernels, LOCAL, case, known_there, False, gpu=gpu, asked=asked)["weight"]
        assert not found[~inside.expand_as(found)].any()
        check(found, known_there.truth["weight"], name="weight",
              reference=known_there.same["weight"], magnitude=known_there.magnitude["weight"],
              where=inside)  # fmt: skip


def test_other_windows_go_elsewhere(kernels):
    h200, case = GPUS["H200"], WINDOWS[0]
    assert chosen(kernels, case, torch.float16, h200)
    assert chosen(kernels, case, torch.float64, h200) is None
    assert chosen(kernels, case, torch.float64, h200, result="grad_weight") is None
    many = large("of_65", 5, 1, 1, 65, 8, 6)
    assert chosen(kernels, many, torch.float16, h200, result="grad_weight") is None
    wide = large("of_64", 7, 1, 1, 64, 8, 300)  # of which shared memory does not hold one row
    assert chosen(kernels, wide, torch.float32, h200, result="grad_weight") is None
    assert chosen(kernels, replace(case, weight_channels=6), torch.float16, h200) is None
    assert chosen(kernels, replace(case, padding=2), torch.float16, h200) is None
    assert chosen(kernels, replace(case, kernel_size=9, padding=4), torch.float16, h200) is None
    assert chosen(kernels, replace(case, kernel_size=(5, 7)), torch.float16, h200) is None
    for result in ("output", "grad_weight"):
        reflecting = CASES["san_k7_32x14x14"]
        assert chosen(kernels, reflecting, torch.float16, h200, result=result) is None


@each(WINDOWS + SHARED)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_tiles_of_gradients_fit_the_gpu(kernels, case, dtype, gpu):
    tile = chosen(kernels, case, dtype, gpu, "grad_weight")
    planes, rows, strips, threads, shared, _ = tile
    assert threads <= 256 and shared <= gpu[2]
    assert planes == 1 or strips == 1
    assert rows * strips >= case.height > rows * (strips - 1)
