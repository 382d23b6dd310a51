"""Windows of 5 x 5 and 7 x 7 from tiles: the output and the gradient of the input, emulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CASES, dtype_id, each
from emulated_aggregations import AGGREGATIONS, check_schedules, problem
from emulated_maps import GPUS, emulated_kernels, thread_schedules
from test_cuda_aggregations import GPU, tiled
from tolerances import DTYPES

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


def chosen(kernels, case, dtype, gpu, grad_weight=False):
    size = torch.finfo(dtype).bits // 8
    return kernels.choose_aggregation_tile(problem(case, False), size, True, grad_weight, gpu)


@each(WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@GPU
@pytest.mark.parametrize("function", AGGREGATIONS, ids=str)
def test_large_windows(kernels, schedules, case, dtype, gpu, function):
    assert chosen(kernels, case, dtype, gpu)
    asked = {function.arguments[0]}.__contains__
    check_schedules(kernels, schedules, function, case, dtype, False, gpu=gpu, asked=asked)


def test_other_windows_go_elsewhere(kernels):
    h200, case = GPUS["H200"], WINDOWS[0]
    assert chosen(kernels, case, torch.float16, h200)
    assert chosen(kernels, case, torch.float16, h200, grad_weight=True) is None
    assert chosen(kernels, case, torch.float64, h200) is None
    assert chosen(kernels, replace(case, weight_channels=6), torch.float16, h200) is None
    assert chosen(kernels, replace(case, padding=2), torch.float16, h200) is None
    assert chosen(kernels, replace(case, kernel_size=9, padding=4), torch.float16, h200) is None
    assert chosen(kernels, replace(case, kernel_size=(5, 7)), torch.float16, h200) is None
    assert chosen(kernels, CASES["san_k7_32x14x14"], torch.float16, h200) is None  # reflects
