"""Index arithmetic beyond 2**31 elements.

On the CPU inputs are allocated but hardly touched, so that they take address space rather than
memory: the operating system backs untouched pages with one page of zeros. Results are written in
full; tests with a large result run where there is memory for it. On a GPU everything takes memory.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layouts import FORMATS

from cotnet_ext import functional

LIMIT = 2**31
HALF = torch.bfloat16


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _needs(device: torch.device, results: float, inputs: float = 9.0) -> None:
    """Hardware is absent where results of so many gigabytes do not fit twice (on a GPU: with the
    inputs)."""
    needed = 2 * results + (inputs if device.type == "cuda" else 0)
    if _available_bytes(device) <= needed * 1e9:
        pytest.skip(f"needs {needed} GB of free memory")


def _zeros(device: torch.device, *shape: int) -> torch.Tensor:
    """Zeros; on the CPU they take no memory until written (fresh pages are zero on Linux)."""
    make = torch.empty if device.type == "cpu" else torch.zeros
    t = make(shape, dtype=HALF, device=device)
    assert t.numel() >= LIMIT, "not large"
    return t


def _count_up(like: torch.Tensor) -> torch.Tensor:
    values = torch.arange(1, like.numel() + 1, dtype=torch.float32, device=like.device)
    return values.view(like.shape).to(HALF)


@FORMATS
def test_input_plane(layout, device):
    """One map of 2**31 pixels and more, read at a coarse stride down to its last pixel."""
    step, rows, columns = 4096, 17, 9
    height, width = (rows - 1) * step + 1, (columns - 1) * step + 1 + 2048
    channels = 1 if layout == "contiguous" else 2
    height = height if layout == "contiguous" else height // 2 + 1
    rows = (height - 1) // step + 1
    if layout == "contiguous":
        x = _zeros(device, 1, channels, height, width)
    else:
        x = _zeros(device, 1, height, width, channels).permute(0, 3, 1, 2)
    picked = x[:, :, ::step, ::step]
    values = _count_up(picked)
    picked.copy_(values)
    weight = torch.full((1, 1, 1, 1, rows, columns), 2.0, dtype=HALF, device=device)
    y = functional.local_aggregation(x, weight, kernel_size=1, stride=step)
    assert torch.equal(y, 2 * values)
    # The gradient of the weight reads the same pixels.
    weight.requires_grad_()
    functional.local_aggregation(x, weight, 1, step).backward(torch.ones_like(y))
    assert torch.equal(weight.grad[0, 0, 0], values.float().sum(1).to(HALF))


def test_input_batch(device):
    """Images that start beyond 2**31 elements."""
    step, size = 4096, 4 * 4096 + 1
    batch = LIMIT // size**2 + 2
    x = _zeros(device, batch, 1, size, size)
    picked = x[:, :, ::step, ::step]
    values = _count_up(picked)
    picked.copy_(values)
    weight = torch.full((batch, 1, 1, 1, *picked.shape[2:]), -1.0, dtype=HALF, device=device)
    y = functional.local_aggregation(x, weight, kernel_size=1, stride=step)
    assert torch.equal(y, -values)


def _large_weight(layout: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """x of ones [1, 1, H, W] and 7x7 weights of zeros with more than 2**31 elements."""
    height, width = 5400, 8200
    if layout == "contiguous":
        w = _zeros(device, 1, 1, 1, 49, height, width)
    else:
        w = _zeros(device, 1, height, width, 49).permute(0, 3, 1, 2)[:, None, None]
    x = torch.ones(1, 1, height, width, dtype=HALF, device=device)
    return x, w


@FORMATS
def test_weights(layout, device):
    """The last tap of the last position lies beyond 2**31 elements; the centre taps before it."""
    _needs(device, 0.5)
    x, w = _large_weight(layout, device)
    w[0, 0, 0, 24, -1, -1] = 3.0
    w[0, 0, 0, 48, -4, -4] = 5.0
    w[0, 0, 0, 0, 3, 3] = 7.0
    y = functional.local_aggregation(x, w, 7, padding=3)
    found = {tuple(int(i) for i in at[2:]): float(y[tuple(at)]) for at in y.nonzero()}
    assert found == {(5399, 8199): 3.0, (5396, 8196): 5.0, (3, 3): 7.0}


def test_softmax_over_weights(device):
    """Zero logits weigh all 49 taps alike; one large logit at the end picks its tap."""
    _needs(device, 0.5)
    x, logits = _large_weight("contiguous", device)
    x[0, 0, -1, -1] = 49.0
    logits[0, 0, 0, 24, -1, -1] = 100.0
    y = functional.softmax_aggregation(x, logits, 7, padding=3)
    assert y[0, 0, -1, -1] == 49.0
    assert y[0, 0, 100, 100] == 1.0
    assert y[0, 0, 0, 0] == torch.tensor(16 / 49).to(HALF)


def test_norm_over_weights(device):
    """One group of more than 2**31 elements: its only deviating element is at the end."""
    _needs(device, 0.5)
    x, w = _large_weight("contiguous", device)
    w[0, 0, 0, 24, -1, -1] = 8.0
    y = functional.group_norm_aggregation(x, w, None, None, 1e-2, 7, padding=3)
    # Mean and variance of one 8 among n zeros vanish beside eps = 0.01: (8 - 0) / 0.1.
    assert y[0, 0, -1, -1] == torch.tensor(80.0).to(HALF)
    assert y[0, 0, 100, 100].abs() < 1e-4


def test_output_and_its_gradients(device):
    """A result, and a gradient of the input, of more than 2**31 elements each."""
    _needs(device, 4.4)
    channels, size = 3, 26760
    x = _zeros(device, 1, channels, size, size)
    x[0, 2, -1, -1] = 2.0
    x[0, 0, 0, 0] = 3.0
    w = torch.zeros(1, 1, 1, 1, size, size, dtype=HALF, device=device)
    w[0, 0, 0, 0, -1, -1] = 5.0
    w[0, 0, 0, 0, 0, 0] = 7.0
    y = functional.local_aggregation(x, w, 1)
    assert float(y[0, 2, -1, -1]) == 10.0 and float(y[0, 0, 0, 0]) == 21.0
    assert float(y[0, 1, -1, -1]) == 0.0
    assert int(torch.count_nonzero(y[0, 2])) == 1
    del y, x
    grad = _zeros(device, 1, channels, size, size)
    grad[0, 2, -1, -1] = 4.0
    window = ([1, 1], [1, 1], [0, 0], [1, 1], "zeros")
    back = torch.ops.cotnet_ext.local_aggregation_grad_input(grad, w, [size, size], *window)
    assert float(back[0, 2, -1, -1]) == 20.0
    assert int(torch.count_nonzero(back[0, 2])) == 1


def test_gate_and_fusion(device):
    """Channels that start beyond 2**31 elements."""
    _needs(device, 4.4)
    channels, size = 5, 20800
    logits, value = _zeros(device, 1, channels, size, size), _zeros(device, 1, channels, size, size)
    static = _zeros(device, 1, channels, size, size)
    logits[0, 4, -1, -1] = 100.0
    value[0, 4, -1, -1] = 3.0
    static[0, 4, -1, -1] = 4.0
    y = functional.spatial_softmax_gate(logits, value, static)
    assert float(y[0, 4, -1, -1]) == 7.0
    assert int(torch.count_nonzero(y[0, 4])) == 1
    del y, logits
    pair = torch.zeros(1, channels, 2, dtype=HALF, device=device)
    y = functional.context_fusion(value, static, pair)
    assert float(y[0, 4, -1, -1]) == 3.5
    assert int(torch.count_nonzero(y[0, 4])) == 1
