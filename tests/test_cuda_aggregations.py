"""The CUDA kernels of the three aggregations, emulated, against float64: every problem of the table
in every dtype and layout."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, EMPTY, FILLED, REPRESENTATIVE, dtype_id, each
from emulated_aggregations import AGGREGATIONS, check_all, check_schedules, problem, run
from emulated_maps import GPUS, emulated_kernels, thread_schedules
from oracle import NORM, expected
from tolerances import DTYPES

kernels, schedules = emulated_kernels, thread_schedules
LAST = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
ALL = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
TWO = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
FUNCTIONS = pytest.mark.parametrize("function", AGGREGATIONS, ids=str)
SOME = tuple(CASES[name] for name in ("odd_9x11", "k4_even", "reflect", "heads2", "cw_is_1"))


@each(FILLED)
@LAST
@ALL
@FUNCTIONS
def test_values_and_gradients(kernels, schedules, case, dtype, last, function):
    known = expected(function, case, dtype)
    check_all(function, run(kernels, function, case, known, last), known)


@each(REPRESENTATIVE)
@LAST
@TWO
@FUNCTIONS
def test_every_order_of_threads_gives_the_same_bits(
    kernels, schedules, case, dtype, last, function
):
    check_schedules(kernels, schedules, function, case, dtype, last)


@each(EMPTY)
@LAST
@FUNCTIONS
def test_empty_batches_launch_nothing(kernels, case, last, function):
    known = expected(function, case, torch.float32)
    results = run(kernels, function, case, known, last, asked=lambda name: "norm" not in name)
    assert all(result.numel() == 0 for result in results.values())


@each(SOME)
@LAST
@FUNCTIONS
@pytest.mark.parametrize("offset", [1, 3])
def test_arrays_at_odd_addresses(kernels, case, last, function, offset):
    known = expected(function, case, torch.float16)
    check_all(function, run(kernels, function, case, known, last, offset=offset), known)


@each(SOME)
@LAST
@FUNCTIONS
def test_only_the_gradients_asked_for(kernels, case, last, function):
    known = expected(function, case, torch.float32)
    for only in function.arguments:
        results = run(kernels, function, case, known, last, asked=lambda name: name == only)
        assert set(results) == {"output", only}
        check_all(function, results, known)


@each(FILLED, lambda case: case.height * case.width >= 500)
@LAST
@TWO
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_statistics_of_parts_of_a_group(kernels, schedules, case, dtype, last, gpu):
    check_schedules(kernels, schedules, NORM, case, dtype, last, gpu=gpu)


def test_problems_reach_cpp_as_they_are():
    assert problem(CASES["k3x5"], True) == (
        2, 12, 1, 4, (8, 8, 3, 1, 1, 1), (10, 10, 5, 1, 2, 1), False, True,
    )  # fmt: skip
