"""The forward kernel without shared memory, emulated, against float64: which problems it takes, and
values on maps whose vectors, rows and planes end anywhere within warps and blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CASES, dtype_id, each, generator
from emulated_aggregations import AGGREGATIONS, check_all, check_schedules, problem, run
from emulated_maps import GPUS, emulated_kernels, thread_schedules
from oracle import LOCAL, expectation, expected
from test_cuda_aggregations import tiled
from tolerances import DTYPES

kernels, schedules = emulated_kernels, thread_schedules
TYPES = pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
FUNCTIONS = pytest.mark.parametrize("function", AGGREGATIONS, ids=str)

# Rows of one to seventeen vectors; planes that end within a warp; 16 channels for each weight; a
# last block that is full and others that are not.
MAPS = (
    tiled("direct_56x56", 1, 2, 8, 56, 56),
    tiled("direct_30x40", 2, 3, 8, 30, 40),
    tiled("direct_43x24", 1, 2, 16, 43, 24),
    tiled("direct_129x8", 2, 2, 8, 129, 8),
    tiled("direct_9x136", 1, 1, 8, 9, 136),
    tiled("direct_64x64", 1, 1, 8, 64, 64),
)


def chosen(kernels, case, dtype, aligned=True, last=False):
    size = torch.finfo(dtype).bits // 8
    return kernels.choose_aggregation_direct(problem(case, last), size, aligned)


@each(MAPS)
@TYPES
@FUNCTIONS
def test_values(kernels, schedules, case, dtype, function):
    assert chosen(kernels, case, dtype)
    check_schedules(kernels, schedules, function, case, dtype, False, asked=lambda name: False)


@TYPES
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_reaches_its_neighbours_only(kernels, dtype, poison):
    """Beside a vector in memory may lie another row, or another plane."""
    case = MAPS[1]
    known = expected(LOCAL, case, dtype)
    tensors = {name: t.clone() for name, t in known.tensors.items()}
    x = tensors["input"]
    some = torch.rand(x.shape, generator=generator("poison")) < 0.01
    some[:, ::5, :, (0, -1)] |= torch.rand(1, 1, case.height, 2, generator=generator("ends")) < 0.2
    x[some] = poison
    known = expectation(LOCAL, case, tensors, known.grad)
    check_all(LOCAL, run(kernels, LOCAL, case, known, False, asked=lambda name: False), known)


def test_other_problems_go_elsewhere(kernels):
    wide = MAPS[0]
    assert chosen(kernels, wide, torch.float16) == (7, 392, 784, 7)
    assert chosen(kernels, wide, torch.float32) == (14, 784, 1568, 13)
    assert chosen(kernels, wide, torch.float64) is None
    assert chosen(kernels, wide, torch.float16, aligned=False) is None
    assert chosen(kernels, wide, torch.float16, last=True) is None
    assert chosen(kernels, replace(wide, weight_channels=4), torch.float16) is None
    assert chosen(kernels, replace(wide, batch=0), torch.float16) is None
    half_vectors = replace(wide, width=60)
    assert chosen(kernels, half_vectors, torch.float16) is None
    assert chosen(kernels, half_vectors, torch.float32)
    # Maps that come into shared memory whole.
    for stage in ("stage2_128x28x28", "stage3_256x14x14", "stage4_512x7x7"):
        assert chosen(kernels, CASES[stage], torch.float32) is None
    stage = replace(CASES["stage1_64x56x56"], batch=128)
    assert chosen(kernels, stage, torch.bfloat16) == (7, 392, 128 * 8 * 392, 128 * 8 * 392 // 128)
    for other in ("k5", "stride2", "dilation2", "padding0", "reflect", "heads2"):
        case = replace(CASES[other], height=64, width=64)
        assert chosen(kernels, case, torch.float32) is None, other


def test_unaligned_views_go_elsewhere(kernels):
    case = MAPS[1]
    known = expected(LOCAL, case, torch.float16)
    results = run(
        kernels, LOCAL, case, known, False, asked=lambda name: False, gpu=GPUS["H200"], offset=3
    )
    check_all(LOCAL, results, known)
