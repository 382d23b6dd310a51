"""Both gradients of an aggregation from one emulated CUDA kernel, against float64; and each of them
alone, from kernels of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CASES, dtype_id, each
from emulated_aggregations import AGGREGATIONS, check_all, check_schedules, problem, run
from emulated_maps import GPUS, emulated_kernels, thread_schedules
from oracle import LOCAL, NORM, expectation, expected
from test_cuda_aggregations import tiled
from test_local_aggregation import _hostile_positions, _taps_inside
from tolerances import DTYPES, check

kernels, schedules = emulated_kernels, thread_schedules
FUNCTIONS = pytest.mark.parametrize("function", AGGREGATIONS, ids=str)
GPU = pytest.mark.parametrize("gpu", [GPUS["H200"], GPUS["small"]], ids=["H200", "small"])
NARROW = pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)

# Rows of every remainder by four; several planes in a block, the last block with fewer; strips with
# and without a remainder; channels by turns, the last turn with fewer; few channels for a weight.
TILES = (
    tiled("both_7x7", 2, 11, 3, 7, 7),
    tiled("both_14x14", 1, 3, 16, 14, 14),
    tiled("both_28x28", 1, 2, 8, 28, 28),
    tiled("both_25x34", 1, 2, 8, 25, 34),
    tiled("both_31x41", 1, 1, 16, 31, 41),
    tiled("both_40x32", 1, 1, 4, 40, 32),
    tiled("both_9x11", 1, 3, 12, 9, 11),
    tiled("both_2x5", 1, 40, 1, 2, 5),
    tiled("both_1x4", 2, 3, 2, 1, 4),
)
NAMES = {case.name.removeprefix("both_"): case for case in TILES}


def known_tile(kernels, case, dtype, gpu, kind="plain", aligned=True, last=False):
    size = torch.finfo(dtype).bits // 8
    return kernels.choose_aggregation_tile_backward(problem(case, last), size, aligned, kind, gpu)


@each(TILES)
@NARROW
@GPU
@FUNCTIONS
def test_both_gradients(kernels, schedules, case, dtype, gpu, function):
    assert known_tile(kernels, case, dtype, gpu)
    check_schedules(kernels, schedules, function, case, dtype, False, gpu=gpu)


@each([NAMES["14x14"], NAMES["31x41"]])
@GPU
@FUNCTIONS
def test_each_gradient_alone(kernels, schedules, case, gpu, function):
    for only in function.arguments:
        asked = {only}.__contains__
        check_schedules(
            kernels, schedules, function, case, torch.bfloat16, False, gpu=gpu, asked=asked
        )


@each([NAMES["14x14"], NAMES["40x32"]])
@GPU
def test_parameters_of_the_norm_without_the_weights(kernels, schedules, case, gpu):
    asked = {"input", "norm_weight"}.__contains__
    check_schedules(kernels, schedules, NORM, case, torch.float32, False, gpu=gpu, asked=asked)


@FUNCTIONS
def test_arrays_at_odd_addresses(kernels, function):
    case = NAMES["9x11"]
    known = expected(function, case, torch.bfloat16)
    check_all(function, run(kernels, function, case, known, False, offset=1), known)


@each([NAMES["31x41"], NAMES["2x5"]])
@GPU
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", ["input", "weight", "grad"])
def test_nonfinite_values_reach_only_their_window(kernels, case, gpu, poison, where):
    known = expected(LOCAL, case, torch.float32)
    tensors = {name: t.clone() for name, t in known.tensors.items()}
    grad, inside = known.grad.clone(), _taps_inside(case)
    victim = grad if where == "grad" else tensors[where]
    for number, (i, j) in enumerate(_hostile_positions(victim.shape)):
        if where == "weight":
            taps = inside[-1, -1, -1, :, i, j].nonzero().flatten()
            victim[-1, -1, -1, taps[number % len(taps)], i, j] = poison
        else:
            victim[-1, number % victim.shape[1], i, j] = poison
    known = expectation(LOCAL, case, tensors, grad)
    results = run(kernels, LOCAL, case, known, False, gpu=gpu)
    masks = {"weight": inside}
    for name, result in results.items():
        check(result, known.truth[name], name=name, reference=known.same[name],
              magnitude=known.magnitude[name], where=masks.get(name))  # fmt: skip


# ---- launch choices ------------------------------------------------------------------------------


def test_what_fits(kernels):
    case, h200 = NAMES["28x28"], GPUS["H200"]
    assert known_tile(kernels, case, torch.float32, h200)
    assert known_tile(kernels, replace(case, weight_channels=16), torch.float32, h200)
    assert known_tile(kernels, case, torch.float64, h200) is None
    assert known_tile(kernels, case, torch.float32, h200, aligned=False) is None
    assert known_tile(kernels, case, torch.float32, h200, last=True) is None
    assert known_tile(kernels, replace(case, width=3), torch.float32, h200) is None
    for other in ("k5", "stride2", "dilation2", "padding0", "reflect", "heads2", "empty_batch"):
        assert known_tile(kernels, CASES[other], torch.float32, h200) is None, other


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("kind", ["plain", "softmax", "norm", "sums"])
@NARROW
def test_tiles_fit_the_gpu(kernels, dtype, gpu, kind):
    for size in (7, 14, 28, 56, 100):
        case = tiled("any", 2, 16, 8, size, size + size % 3)
        tile = known_tile(kernels, case, dtype, gpu, kind)
        if kind == "norm" and tile is None:
            continue
        planes, rows, strips, threads, shared, turns = tile
        assert threads <= 256 and shared <= gpu[2] and turns == 1
        assert planes == 1 or strips == 1
        assert rows * strips >= size > rows * (strips - 1)
        assert kind != "norm" or strips == 1


def test_whole_groups_of_a_norm_in_one_block(kernels):
    """All of CoTNet's maps but the largest, in half precision on any GPU."""
    whole = {(28, "A100", 4), (28, "A100", 2), (28, "Turing", 2), (28, "H200", 4), (28, "H200", 2)}
    for name in ("A100", "Turing", "H200"):
        for dtype in (torch.bfloat16, torch.float32):
            for size in (7, 14, 28, 56):
                case = tiled("any", 2, 32, 8, size, size)
                bytes_ = torch.finfo(dtype).bits // 8
                tile = known_tile(kernels, case, dtype, GPUS[name], "norm")
                assert bool(tile) == (size < 28 or (size, name, bytes_) in whole), (
                    name,
                    size,
                    dtype,
                )


def test_small_maps_fill_their_warps(kernels):
    for size, planes, threads in ((7, 16, 224), (14, 4, 224), (28, 1, 224)):
        case = tiled("any", 2, 64, 8, size, size)
        tile = known_tile(kernels, case, torch.bfloat16, GPUS["H200"])
        assert (tile[0], tile[3]) == (planes, threads), tile
