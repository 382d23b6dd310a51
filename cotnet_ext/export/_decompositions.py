"""The operators in PyTorch's own: what a program becomes that runs where this package is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_OPS = torch.ops.cotnet_ext


def decompositions() -> dict[Callable, Callable]:
    """Operator to function of PyTorch operators, for each forward operator of this package.

    For `torch.export.ExportedProgram.run_decompositions`; merge it into a table of your own.
    """
    return {
        _OPS.local_aggregation.default: _local_aggregation,
        _OPS.softmax_aggregation.default: _softmax_aggregation,
        _OPS.group_norm_aggregation.default: _group_norm_aggregation,
        _OPS.group_norm_aggregation_pool.default: _group_norm_aggregation_pool,
        _OPS.spatial_softmax_gate.default: _spatial_softmax_gate,
        _OPS.context_fusion.default: _context_fusion,
    }


def _local_aggregation(
    input: Tensor,
    weight: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    padding_mode: str,
) -> Tensor:
    """A sum of shifted copies: no K times larger tensor is made, and compilers fuse all of it."""
    *_, shared, taps, rows, columns = weight.shape
    (ph, pw), (sh, sw), (dh, dw) = padding, stride, dilation
    mode = "constant" if padding_mode == "zeros" else padding_mode
    padded = F.pad(input, (pw, pw, ph, ph), mode)
    padded = padded.unflatten(1, (-1, shared)).unsqueeze(1)  # [N, 1, C // Cw, Cw, H, W]
    weight = weight.unsqueeze(2)  # [N, G, 1, Cw, K, Ho, Wo]
    wide = torch.promote_types(input.dtype, torch.float32)
    total = None
    for tap in range(taps):
        top, left = tap // kernel_size[1] * dh, tap % kernel_size[1] * dw
        pixels = padded.narrow(-2, top, (rows - 1) * sh + 1)
        pixels = pixels.narrow(-1, left, (columns - 1) * sw + 1)
        if (sh, sw) != (1, 1):
            pixels = pixels[..., ::sh, ::sw]
        term = pixels.to(wide) * weight[:, :, :, :, tap].to(wide)
        total = term if total is None else total + term
    return total.flatten(1, 3).to(input.dtype)


def _softmax_aggregation(input: Tensor, logits: Tensor, *window) -> Tensor:
    return _local_aggregation(input, logits.softmax(3), *window)


def _group_norm_aggregation(
    input: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    *window,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = weight.shape[1] * weight.shape[2]
    flat = weight.flatten(1, 3)
    if norm_weight is None and norm_bias is not None:
        norm_weight = torch.ones_like(norm_bias)
    normalised = F.group_norm(flat, groups, norm_weight, norm_bias, eps).view(weight.shape)
    # Statistics are for a backward: where nothing reads them, they leave the graph.
    wide = torch.promote_types(weight.dtype, torch.float32)
    variance, mean = torch.var_mean(weight.flatten(1, 2).to(wide), (2, 3, 4), correction=0)
    return _local_aggregation(input, normalised, *window), mean, (variance + eps).rsqrt()


def _group_norm_aggregation_pool(
    input: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    shift: Tensor,
    static: Tensor | None,
    *eps_and_window,
) -> tuple[Tensor, Tensor]:
    summed, *_ = _group_norm_aggregation(input, weight, norm_weight, norm_bias, *eps_and_window)
    output = F.silu(summed.to(shift.dtype) + shift[:, None, None])
    means = output.mean((2, 3))
    if static is not None:
        means = means + static.to(shift.dtype).mean((2, 3))
    return output.to(input.dtype), means


def _spatial_softmax_gate(logits: Tensor, value: Tensor, static: Tensor) -> Tensor:
    return static + logits.flatten(2).softmax(2).view(logits.shape) * value


def _context_fusion(dynamic: Tensor, static: Tensor, logits: Tensor) -> Tensor:
    of_dynamic, of_static = logits.softmax(2)[..., None, None].unbind(2)
    return of_dynamic * dynamic + of_static * static
