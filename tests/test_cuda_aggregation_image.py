"""The kernels for channels_last maps, emulated, against float64: which problems they take and how,
weights in both orders, and values on maps that end anywhere within a block."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from cases import CASES, dtype_id, each, generator
from emulated_aggregations import AGGREGATIONS, check_all, check_schedules, problem, run
from emulated_maps import GPUS, emulated_kernels, thread_schedules
from oracle import LOCAL, NORM, expectation, expected
from test_cuda_aggregations import tiled
from tolerances import DTYPES

kernels, schedules = emulated_kernels, thread_schedules
TYPES = pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
FUNCTIONS = pytest.mark.parametrize("function", AGGREGATIONS, ids=str)
ORDER = pytest.mark.parametrize("tap_major", [False, True], ids=["official", "tap_major"])

# Slabs of weight channels that are whole or in part, one and several; strips, the last with fewer
# rows; several tiles of columns; one row, one column; 2, 4, 8 and 16 channels for each weight.
IMAGES = (
    tiled("image_7x7", 2, 40, 8, 7, 7),
    tiled("image_14x14", 1, 16, 8, 14, 14),
    tiled("image_25x37", 1, 8, 8, 25, 37),
    tiled("image_9x70", 1, 24, 2, 9, 70),
    tiled("image_1x5", 2, 8, 4, 1, 5),
    tiled("image_6x1", 2, 16, 16, 6, 1),
)
SMALL = (IMAGES[0], IMAGES[3])


def chosen(kernels, case, dtype, aligned=True, last=True, backward=False, norm=False, gpu="H200"):
    size = torch.finfo(dtype).bits // 8
    return kernels.choose_aggregation_image(
        problem(case, last), size, aligned, backward, norm, GPUS[gpu]
    )


@each(IMAGES)
@TYPES
@FUNCTIONS
@ORDER
def test_values_and_gradients(kernels, schedules, case, dtype, function, tap_major):
    assert chosen(kernels, case, dtype, backward=True)
    check_schedules(kernels, schedules, function, case, dtype, True, tap_major=tap_major)


@each(SMALL)
@FUNCTIONS
@ORDER
@pytest.mark.parametrize("gpu", ["Turing", "single", "small"])
def test_other_gpus(kernels, schedules, case, function, tap_major, gpu):
    options = {"gpu": GPUS[gpu], "tap_major": tap_major}
    check_schedules(kernels, schedules, function, case, torch.bfloat16, True, **options)


@each(SMALL)
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


@each(SMALL)
@FUNCTIONS
@ORDER
def test_unaligned_views_and_float64_go_elsewhere(kernels, case, function, tap_major):
    for dtype, offset in ((torch.float16, 1), (torch.float64, 0)):
        known = expected(function, case, dtype)
        options = {"offset": offset, "tap_major": tap_major}
        check_all(function, run(kernels, function, case, known, True, **options), known)


@TYPES
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_reaches_its_neighbours_only(kernels, dtype, poison):
    case = IMAGES[0]
    known = expected(LOCAL, case, dtype)
    tensors = {name: t.clone() for name, t in known.tensors.items()}
    x = tensors["input"]
    x[torch.rand(x.shape, generator=generator("poison")) < 0.01] = poison
    known = expectation(LOCAL, case, tensors, known.grad)
    check_all(LOCAL, run(kernels, LOCAL, case, known, True, asked=lambda name: False), known)


def test_other_problems_go_elsewhere(kernels):
    image = IMAGES[0]
    assert chosen(kernels, image, torch.float32)
    assert chosen(kernels, image, torch.float64) is None
    assert chosen(kernels, image, torch.float32, aligned=False) is None
    assert chosen(kernels, image, torch.float32, last=False) is None
    assert chosen(kernels, tiled("odd", 1, 8, 3, 7, 7), torch.float32) is None
    assert chosen(kernels, tiled("half vector", 1, 12, 8, 7, 7), torch.float16) is None
    assert chosen(kernels, tiled("half vector", 1, 12, 8, 7, 7), torch.float32)
    for other in ("k5", "stride2", "dilation2", "padding0", "reflect", "heads2", "empty_batch"):
        case = replace(CASES[other], weight_channels=8, channels=64)
        assert chosen(kernels, case, torch.float32) is None, other


STAGES = ("stage1_64x56x56", "stage2_128x28x28", "stage3_256x14x14", "stage4_512x7x7")


@each(tuple(CASES[stage] for stage in STAGES) + IMAGES)
def test_blocks_fit_the_gpu(kernels, case):
    for gpu, dtype, backward, norm in itertools.product(
        GPUS, DTYPES[1:], (False, True), (False, True)
    ):
        found = chosen(kernels, case, dtype, backward=backward, norm=norm, gpu=gpu)
        columns, rows, step, tiles, strips, slabs, threads, blocks, shared = found
        assert threads <= (256 if backward else 128) and shared <= GPUS[gpu][2] // 2
        assert columns * tiles >= case.width > columns * (tiles - 1)
        assert rows * strips >= case.height > rows * (strips - 1)
        assert step <= rows <= 32
        assert blocks == case.batch * tiles * strips * slabs


def test_blocks_fill_a_large_gpu(kernels):
    """At the usual batch there are three blocks for every multiprocessor, and two fit on it."""
    for stage in STAGES:
        case = replace(CASES[stage], batch=128)
        for backward in (False, True):
            found = chosen(kernels, case, torch.bfloat16, backward=backward)
            assert found[7] >= 3 * 132, (stage, found)


def test_normalised_weights_of_large_mean(kernels):
    """The mean is subtracted before anything is multiplied: no digits are lost."""
    case = IMAGES[4]
    known = expected(NORM, case, torch.float32)
    tensors = {name: t.clone() for name, t in known.tensors.items()}
    tensors["weight"] += 1000
    known = expectation(NORM, case, tensors, known.grad)
    check_all(NORM, run(kernels, NORM, case, known, True), known)
