"""The CUDA kernels of the operators of fused layers, emulated, against their definitions in
float64; and how sweeps over maps are launched."""

from __future__ import annotations

import pytest
import torch
from cases import randn
from emulated_maps import ALL, GPUS, LAST, TWO, emulated_kernels, thread_schedules
from emulated_norms import OPERATORS, assert_close, known, run, truth_of
from test_batch_norm import arguments
from tolerances import assert_same_bits

kernels, schedules = emulated_kernels, thread_schedules
EACH = pytest.mark.parametrize("name", OPERATORS)

# Planes that fill vectors and do not, shorter than a vector, many to a block; slabs with channels
# to spare; several chunks of a plane, the last with fewer pixels.
SMALL = ((2, 24, 7, 7), (3, 5, 3, 1), (2, 70, 1, 1), (1, 130, 6, 9), (33, 3, 5, 3), (2, 16, 8, 8))
LARGE = ((1, 3, 96, 97), (2, 2, 56, 57), (1, 40, 24, 25))
SOME = (SMALL[0], SMALL[4], LARGE[0])
SMALL_SHAPES = pytest.mark.parametrize("shape", SMALL, ids=str)
LARGE_SHAPES = pytest.mark.parametrize("shape", LARGE, ids=str)
SOME_SHAPES = pytest.mark.parametrize("shape", SOME, ids=str)


@EACH
@SMALL_SHAPES
@ALL
@LAST
def test_values(kernels, name, shape, dtype, last):
    args, truth = known(name, shape, dtype)
    assert_close(name, run(kernels, name, args, last), truth, dtype)


@EACH
@LARGE_SHAPES
@TWO
@LAST
def test_values_of_large_maps(kernels, name, shape, dtype, last):
    args, truth = known(name, shape, dtype)
    for gpu in ("H200", "small"):
        assert_close(name, run(kernels, name, args, last, gpu=GPUS[gpu]), truth, dtype)


@EACH
@SOME_SHAPES
@LAST
def test_schedules_give_the_same_bits(kernels, schedules, name, shape, last):
    args, _ = known(name, shape, torch.bfloat16)
    first, *others = [run(kernels, name, args, last) for _ in schedules()]
    for other in others:
        for one, result in zip(first, other, strict=True):
            assert_same_bits(result, one, f"{name} on another schedule")


@EACH
@SOME_SHAPES
@TWO
@LAST
def test_misaligned_arrays(kernels, name, shape, dtype, last):
    """What does not begin at 16 bytes goes element by element: NCHW in other vectors, so that sums
    are rounded otherwise."""
    args, truth = known(name, shape, dtype)
    assert_close(name, run(kernels, name, args, last, offset=1), truth, dtype)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("batch", [True, False])
@LAST
def test_flags(kernels, relu, batch, last):
    shape, dtype = (2, 20, 9, 7), torch.float64
    x, norm, _ = arguments("batch_norm", shape, dtype)
    calls = {"batch_norm": [x, norm, relu]}
    backward = arguments("batch_norm_backward", shape, dtype)
    calls["batch_norm_backward"] = [*backward[:-2], relu, batch]
    fusion = arguments("batch_norm_fusion_backward", shape, dtype)
    calls["batch_norm_fusion_backward"] = [*fusion[:-1], batch]
    for name, args in calls.items():
        assert_close(name, run(kernels, name, args, last), truth_of(name, args), dtype)


@LAST
def test_norms_without_weight_or_bias(kernels, last):
    name = "batch_norm_statistics"
    x, weight, bias, eps = arguments(name, (2, 20, 9, 7), torch.float64)
    for args in ([x, None, None, eps], [x, weight, None, eps], [x, None, bias, eps]):
        assert_close(name, run(kernels, name, args, last), truth_of(name, args), torch.float64)


@pytest.mark.parametrize("shape", [(2, 8, 40, 40), (40, 8, 5, 5)], ids=str)
@LAST
def test_statistics_far_from_zero(kernels, shape, last):
    """Squares around the mean, never differences of large squares: no digit is lost."""
    x = (randn(*shape) + 1000).float()
    *_, variance = run(kernels, "batch_norm_statistics", [x, None, None, 0.0], last)
    truth = x.double().var((0, 2, 3), correction=0)
    assert ((variance - truth).abs() <= 1e-6 * truth).all()


@LAST
def test_statistics_of_equal_numbers(kernels, last):
    x = torch.full((3, 5, 7, 7), 0.1, dtype=torch.float32)
    norm, factor, variance = run(kernels, "batch_norm_statistics", [x, None, None, 1e-5], last)
    assert (norm[0] == x[0, 0, 0, 0]).all() and (variance == 0).all()
    assert torch.allclose(factor, torch.full((5,), 1e-5).rsqrt())


@EACH
@pytest.mark.parametrize("shape", [(1, 16, 4, 4), (2, 3, 96, 97)], ids=str)
@LAST
def test_not_a_number_stays(kernels, name, shape, last):
    """In its element, and in the numbers of its channel: nowhere else, and nowhere less."""
    args = arguments(name, shape, torch.float32)
    place = 1 if name.endswith(("backward", "sums")) else 0  # after the gradient
    args[place] = args[place].clone()
    args[place][-1, 2, 1, 2] = torch.nan
    if name == "batch_norm_fusion_backward":
        contexts = arguments("batch_norm_fusion_sums", shape, torch.float32)
        (sums,) = truth_of("batch_norm_fusion_sums", [*args[:2], *contexts[2:]])
        args[6] = sums.float()
    truth = truth_of(name, args)
    for result, true in zip(run(kernels, name, args, last), truth, strict=True):
        assert torch.equal(result.isnan(), true.isnan())


@EACH
@pytest.mark.parametrize("shape", [(0, 8, 7, 7), (2, 0, 7, 7), (2, 8, 0, 7)], ids=str)
@LAST
def test_empty_maps(kernels, name, shape, last):
    """No kernel over a map; sums over nothing are zero, their mean is no number."""
    problem = (*shape[:2], shape[2] * shape[3], last)
    for kind in ("pool", "blend", "sums", "backward"):
        assert 0 in kernels.choose_sweep(kind, problem, 4, GPUS["H200"])["grid"]
    n, c = shape[:2]
    maps = torch.empty(shape)
    table = torch.ones(3, c)
    args = {
        "batch_norm_statistics": [maps, None, table[1], 1e-5],
        "batch_norm": [maps, table, True],
        "batch_norm_backward": [maps, maps, table, table[0], True, True],
        "batch_norm_fusion_pool": [maps, maps, table, table],
        "batch_norm_fusion": [maps, maps, table, table, torch.ones(n, 2, c)],
        "batch_norm_fusion_sums": [maps, maps, maps, table, table],
        "batch_norm_fusion_backward": [
            maps, maps, table, table[0], torch.ones(n, 2, c), torch.ones(n, c),
            torch.zeros(n, 6, c), True,
        ],
    }[name]  # fmt: skip
    results = run(kernels, name, args, last)
    if name == "batch_norm_fusion_pool":
        assert results[0].isnan().all()
        return
    if name == "batch_norm_statistics":
        norm, factor, variance = results
        assert (variance == 0).all() and (norm[0] == 0).all() and (norm[2] == 1).all()
        assert torch.allclose(factor, torch.full((c,), 1e-5).rsqrt())
        return
    assert all((result == 0).all() for result in results)


# ---- choices -------------------------------------------------------------------------------------

MANY = (
    *((128, c, s * s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))),
    (8, 64, 224 * 224),
    (1, 1, 1000000),
    (1, 1, 65536 * 65538),
    (1 << 31, 2, 2),
    (70000, 3, 1),
    (3, 7, 57 * 61),
)


@pytest.mark.parametrize("shape", MANY, ids=str)
@LAST
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("kind", ["pool", "blend", "sums", "backward"])
def test_choices_fit_and_cover(kernels, shape, last, size, kind):
    n, c, plane = shape
    vector = 16 // size
    for gpu in GPUS.values():
        plan = kernels.choose_sweep(kind, (*shape, last), size, gpu)
        x, y, z = plan["grid"]
        assert 0 < x < 1 << 31 and 0 < y <= 65535 and 0 < z <= 65535
        threads = plan["threads"]
        assert threads % 32 == 0 and threads <= (128 if last else 256)
        assert plan["shared_bytes"] <= 48 << 10
        assert plan["chunks"] == x
        assert (plan["chunks"] - 1) * plan["chunk"] < plane <= plan["chunks"] * plan["chunk"]
        if last:
            assert plan["slabs"] * plan["lanes"] * vector >= c
            assert y * z >= plan["units"] == n * plan["slabs"]
            continue
        rows = plan["rows_per_block"]
        assert rows == 1 or plan["chunks"] == 1
        assert y * z * rows >= n * c and rows <= threads
        assert rows * plan["chunk"] + vector - 1 <= plan["items"] * threads * vector
        assert rows * plan["teams_per_row"] * plan["team"] <= threads
        assert 1 + -(-(vector - 1) // min(plane, vector)) == plan["pieces"]


def test_images_of_few_pixels_need_no_second_kernel_for_sums(kernels):
    """The sums of a chunk are large beside it where it has few pixels."""
    for kind in ("pool", "sums"):
        assert kernels.choose_sweep(kind, (128, 512, 49, True), 2, GPUS["H200"])["chunks"] == 1


def test_small_planes_begin_at_vectors(kernels):
    for size, step in ((2, 8), (4, 4), (8, 2)):
        plan = kernels.choose_sweep("sums", (128, 512, 49, False), size, GPUS["H200"])
        assert plan["rows_per_block"] % step == 0
