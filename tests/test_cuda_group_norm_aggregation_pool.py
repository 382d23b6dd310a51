"""The CUDA kernels of `group_norm_aggregation_pool`, emulated, against the definition in float64:
every problem of the table in every dtype and layout, and every fast path of the aggregation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CASES, EMPTY, FILLED, REPRESENTATIVE, Case, dtype_id, each
from emulated_aggregations import EPS, array, problem
from emulated_maps import (
    ALL,
    GPUS,
    H200,
    LAST,
    TWO,
    emulated_kernels,
    name_of,
    poisoned,
    tensor_of,
    thread_schedules,
)
from test_cuda_aggregation_large import WINDOWS
from test_cuda_aggregation_pixels import WINDOWS as PIXELS
from test_cuda_aggregations import TILES, tiled
from test_group_norm_aggregation_pool import DTYPES, MEANS, OUTPUT, arguments, defined
from tolerances import accumulation_dtype, assert_same_bits

kernels, schedules = emulated_kernels, thread_schedules
GPU = pytest.mark.parametrize("gpu", [H200, (1, 80, 48 << 10)], ids=["H200", "small"])


def run(
    kernels, case: Case, given: dict, last: bool, *, gpu=H200, offset=0, only="", tap_major=False
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the emulated kernels write; what they do not write is NaN. `only`: the one array that
    begins at an offset, rather than all of them."""
    dtype = given["input"].dtype
    arrays = [
        None if t is None else array(t, last, 0 if only and only != name else offset, tap_major)
        for name, t in given.items()
    ]
    offset = 0 if only else offset
    n, c, *_ = case.output_shape
    output = poisoned(case.output_shape, dtype, offset)
    means = poisoned((n, c), accumulation_dtype(dtype))
    start = (name_of(dtype), (*problem(case, last), tap_major), gpu)
    kernels.group_norm_aggregation_pool(*start, *arrays, EPS, output, means)
    return (
        tensor_of(output, case.output_shape, dtype, last),
        tensor_of(means, (n, c), accumulation_dtype(dtype), False),
    )


def check(kernels, case: Case, dtype: torch.dtype, last: bool, **options) -> tuple:
    """Right, within the tolerances of the CPU's operator."""
    missing = options.pop("missing", ())
    given = {**arguments(case, dtype), **dict.fromkeys(missing)}
    results = run(kernels, case, given, last, **options)
    doubled = (None if t is None else t.double() for t in given.values())
    truth = defined(*doubled, EPS, *case.op_geometry)
    for result, true, tolerance in zip(results, truth, (OUTPUT, MEANS), strict=True):
        error = (result.double() - true).abs().max()
        assert error <= tolerance[dtype] * true.abs().max(), f"off by {float(error):.2e}"
    return results


def check_schedules(kernels, schedules, case: Case, dtype: torch.dtype, last: bool, **options):
    """Right under every order of threads, and the same bits."""
    first = None
    for schedule in schedules():
        results = check(kernels, case, dtype, last, **options)
        first = first or results
        for result, one in zip(results, first, strict=True):
            assert_same_bits(result, one, f"{schedule} schedule")


@each(FILLED)
@LAST
@ALL
def test_values(kernels, schedules, case, dtype, last):
    check(kernels, case, dtype, last)


@each(REPRESENTATIVE)
@LAST
@TWO
def test_every_order_of_threads_gives_the_same_bits(kernels, schedules, case, dtype, last):
    check_schedules(kernels, schedules, case, dtype, last)


@each(EMPTY)
@LAST
def test_empty_batches_launch_nothing(kernels, case, last):
    output, means = run(kernels, case, arguments(case, torch.float32), last)
    assert output.numel() == means.numel() == 0


@each(CASES[name] for name in ("odd_9x11", "stage4_512x7x7", "heads2"))
@LAST
@TWO
@pytest.mark.parametrize("missing", [("static",), ("norm_weight", "norm_bias")], ids=str)
def test_what_may_be_none(kernels, case, dtype, last, missing):
    check(kernels, case, dtype, last, missing=missing)


@each(CASES[name] for name in ("odd_9x11", "k4_even", "heads2"))
@LAST
@pytest.mark.parametrize("offset", [1, 3])
def test_arrays_at_odd_addresses(kernels, case, last, offset):
    check(kernels, case, torch.float16, last, offset=offset)


# Planes that begin within a warp and end within another, planes of whole warps, few long rows.
DIRECT = (
    tiled("direct_30x40", 1, 2, 8, 30, 40),
    tiled("direct_33x40", 2, 3, 16, 33, 40),
    tiled("direct_32x40", 2, 2, 8, 32, 40),
    tiled("direct_5x256", 3, 1, 8, 5, 256),
)


@each((*TILES, *WINDOWS, *DIRECT))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@GPU
def test_tiles(kernels, schedules, case, dtype, gpu):
    check_schedules(kernels, schedules, case, dtype, False, gpu=gpu)


@each(
    (
        tiled("image_19x37", 1, 12, 2, 19, 37),
        tiled("image_7x7", 2, 16, 8, 7, 7),
        replace(CASES["stage3_256x14x14"], batch=1),
    )
)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@pytest.mark.parametrize("tap_major", [False, True])
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_images(kernels, schedules, case, dtype, tap_major, gpu):
    check_schedules(kernels, schedules, case, dtype, True, gpu=gpu, tap_major=tap_major)


@each(PIXELS)
@TWO
@pytest.mark.parametrize("tap_major", [False, True], ids=["official", "tap_major"])
def test_windows_pixel_by_pixel(kernels, schedules, case, dtype, tap_major):
    check_schedules(kernels, schedules, case, dtype, True, tap_major=tap_major)


# Direct, tiles of several planes, strips, channels_last.
KERNELS = (
    (DIRECT[0], False),
    (TILES[0], False),
    (TILES[5], False),
    (tiled("image_19x37", 1, 12, 2, 19, 37), True),
)


@pytest.mark.parametrize(("case", "last"), KERNELS, ids=[case.name for case, _ in KERNELS])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
def test_fast_kernels_without_a_static_map(kernels, schedules, case, dtype, last):
    check_schedules(kernels, schedules, case, dtype, last, missing=("static",))


@pytest.mark.parametrize(("case", "last"), KERNELS, ids=[case.name for case, _ in KERNELS])
@pytest.mark.parametrize("odd", ["input", "static"])
def test_one_map_at_an_odd_address(kernels, case, last, odd):
    check(kernels, case, torch.float16, last, offset=1, only=odd)
