"""Shift-and-sum: the best spelling of the window ops in PyTorch, eager or compiled.

The other spelling, unfold, is the one of `cotnet_ext.reference` and is used from there. Functions
here take what the benchmarks use: stride 1, an odd square window, zero padding that keeps the size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def local_aggregation(input: Tensor, weight: Tensor, *, kernel_size: int, padding: int) -> Tensor:
    """One multiply-add of the shifted map per tap, where unfold would write out all windows."""
    n, c, h, w = input.shape
    _, g, cw, _, _, _ = weight.shape
    padded = F.pad(input, [padding] * 4)
    output = input.new_zeros(n, g, c // cw, cw, h, w)
    for tap in range(kernel_size**2):
        u, v = divmod(tap, kernel_size)
        shifted = padded[:, :, u : u + h, v : v + w].reshape(n, 1, c // cw, cw, h, w)
        output = output + shifted * weight[:, :, None, :, tap]
    return output.view(n, g * c, h, w)


def softmax_aggregation(input: Tensor, logits: Tensor, **window: int) -> Tensor:
    return local_aggregation(input, logits.softmax(dim=3), **window)


def group_norm_aggregation(
    input: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, **window: int
) -> Tensor:
    n, g, cw, taps, h, w = weight.shape
    flat = weight.reshape(n, g * cw * taps, h, w)
    normed = F.group_norm(flat, g * cw, norm_weight, norm_bias)
    return local_aggregation(input, normed.view(weight.shape), **window)


def pooled(aggregation: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`group_norm_aggregation_pool` of a group_norm_aggregation and what PyTorch has."""

    def aggregate(input, weight, norm_weight, norm_bias, shift, static, eps, *window):
        summed = aggregation(
            input, weight, norm_weight, norm_bias, kernel_size=window[0][0], padding=window[2][0]
        )
        output = F.silu(summed + shift.to(summed.dtype)[:, None, None])
        return output, output.mean((2, 3)) + static.mean((2, 3))

    return aggregate


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compile` at its best: one whole graph, for exactly this shape."""
    return torch.compile(function, fullgraph=True, dynamic=False)
