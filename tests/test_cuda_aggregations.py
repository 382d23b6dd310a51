"""The CUDA kernels of the three aggregations, emulated, against float64: every problem of the table
in every dtype and layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CASES, EMPTY, FILLED, REPRESENTATIVE, dtype_id, each
from emulated_aggregations import AGGREGATIONS, check_all, check_schedules, problem, run
from emulated_maps import ALL, GPUS, LAST, TWO, emulated_kernels, thread_schedules
from oracle import NORM, expected
from tolerances import DTYPES

kernels, schedules = emulated_kernels, thread_schedules
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
        results = run(kernels, function, case, known, last, asked={only}.__contains__)
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


# ---- tiles: 3 x 3 taps, stride 1, contiguous maps, 2, 4, ... channels for each weight ------------


def tiled(name: str, batch: int, weight_channels: int, sharing: int, height: int, width: int):
    plain = CASES["odd_9x11"]
    channels = weight_channels * sharing
    return replace(
        plain, name=name, batch=batch, channels=channels, weight_channels=weight_channels,
        height=height, width=width,
    )  # fmt: skip


# Rows of every remainder by four; several planes in a block, the last block with fewer; planes that
# are no multiple of 16 bytes; strips with and without a remainder; 16 channels for each weight, and
# numbers of them that eight does not divide.
TILES = (
    tiled("tile_7x7", 2, 11, 8, 7, 7),
    tiled("tile_14x14", 1, 3, 16, 14, 14),
    tiled("tile_28x28", 1, 2, 8, 28, 28),
    tiled("tile_56x56", 1, 1, 8, 56, 56),
    tiled("tile_25x34", 1, 2, 8, 25, 34),
    tiled("tile_31x41", 1, 2, 8, 31, 41),
    tiled("tile_3x99", 1, 1, 8, 3, 99),
    tiled("tile_1x4", 2, 3, 8, 1, 4),
    tiled("tile_2x5", 1, 40, 8, 2, 5),
    tiled("tile_9x130", 1, 1, 8, 9, 130),
    tiled("tile_7x7_of_12", 2, 5, 12, 7, 7),
    tiled("tile_40x32_of_4", 1, 1, 4, 40, 32),
    tiled("tile_31x41_of_2", 1, 1, 2, 31, 41),
    tiled("tile_5x5_of_6", 2, 5, 6, 5, 5),
)
# One that copies whole runs, and one that copies 16 bytes at a time, with less shared memory.
GPU = pytest.mark.parametrize("gpu", [GPUS["H200"], (1, 80, 48 << 10)], ids=["H200", "small"])


def known_tile(kernels, case, dtype, gpu, aligned=True, last=False, result="grad_weight"):
    size = torch.finfo(dtype).bits // 8
    return kernels.choose_aggregation_tile(problem(case, last), size, aligned, result, gpu)


@each(TILES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@GPU
@FUNCTIONS
def test_tiles(kernels, schedules, case, dtype, gpu, function):
    assert known_tile(kernels, case, dtype, gpu)
    for asked in function.arguments[:1], function.arguments[1:]:  # a kernel for each
        check_schedules(
            kernels, schedules, function, case, dtype, False, gpu=gpu, asked=set(asked).__contains__
        )


def test_tiles_are_for_what_fits_them(kernels):
    tile, h200 = TILES[0], GPUS["H200"]
    assert known_tile(kernels, tile, torch.float32, h200)
    assert known_tile(kernels, tile, torch.float64, h200) is None
    assert known_tile(kernels, tile, torch.float32, h200, aligned=False) is None
    assert known_tile(kernels, tile, torch.float32, h200, last=True) is None
    assert known_tile(kernels, replace(tile, weight_channels=88), torch.float32, h200) is None
    assert known_tile(kernels, replace(tile, width=3), torch.float32, h200) is None
    for other in ("stride2", "dilation2", "padding0", "reflect", "heads2", "empty_batch"):
        assert known_tile(kernels, CASES[other], torch.float32, h200) is None, other


@each(TILES + tuple(CASES[f"stage{i}"] for i in ("1_64x56x56", "2_128x28x28")))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_tiles_fit_the_gpu(kernels, case, dtype, gpu):
    for result in ("output", "grad_input", "grad_weight"):
        tile = known_tile(kernels, case, dtype, gpu, result=result)
        planes, rows, strips, threads, shared, _ = tile
        assert threads <= 256 and shared <= gpu[2]
        assert planes == 1 or strips == 1
        assert rows * strips >= case.height > rows * (strips - 1)


def test_tiles_of_the_small_maps_move_whole_vectors(kernels):
    """Planes of 98 and 392 bytes move sixteen and four at a time, by blocks of seven full warps."""
    for stage, planes in (("stage4_512x7x7", 16), ("stage3_256x14x14", 4)):
        for gpu in ("H200", "A100"):
            tile = known_tile(kernels, CASES[stage], torch.bfloat16, GPUS[gpu])
            assert (tile[0], tile[3]) == (planes, 224), tile
            assert tile[-1] == (gpu == "H200"), tile


def test_bulk_copies_are_for_whole_vectors(kernels):
    """In all blocks: rows where there are strips, a plane where the last block has fewer."""
    h200 = GPUS["H200"]
    whole = {
        (14, 14, 3, torch.float32): True,  # planes of 784 bytes
        (14, 14, 3, torch.bfloat16): False,  # of 392: two and one
        (14, 14, 4, torch.bfloat16): True,
        (56, 56, 1, torch.bfloat16): True,  # rows of 112
        (60, 60, 1, torch.bfloat16): False,  # of 120
        (5, 5, 12, torch.bfloat16): False,  # of 50: twelve are 600
    }
    for (height, width, channels, dtype), bulk in whole.items():
        case = tiled("a", 1, channels, 8, height, width)
        assert known_tile(kernels, case, dtype, h200)[-1] == bulk, (case, dtype)
