"""What layers do to whole maps besides convolutions: pooling two, and reordering channels."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_of_sum(dynamic: Tensor, static: Tensor) -> Tensor:
    """The mean over the map of `dynamic + static`, `[N, C, 1, 1]`, without their sum."""
    wide = (torch.float32, torch.float64)
    if torch.compiler.is_compiling() or dynamic.dtype not in wide or static.dtype not in wide:
        # A sum over the map would be rounded once more, and may lie outside float16. Compilers and
        # exporters do better with a mean than with a division by a size that may be open.
        return dynamic.mean((2, 3), keepdim=True) + static.mean((2, 3), keepdim=True)
    # Divided after the sums: the gradient of a sum is a view, that of a mean is written as a map.
    pixels = dynamic.shape[2] * dynamic.shape[3]
    return (dynamic.sum((2, 3), keepdim=True) + static.sum((2, 3), keepdim=True)) / pixels


def swap_blocks(x: Tensor, outer: int, inner: int) -> Tensor:
    """Channels `(outer, inner, rest)` of a map reordered to `(inner, outer, rest)`, same layout."""
    if torch.compiler.is_compiling():
        # No view here: inductor fails to save one with symbolic strides for the backward.
        blocks = x.chunk(outer * inner, dim=1)
        return torch.cat([blocks[i + o * inner] for i in range(inner) for o in range(outer)], dim=1)
    if x.stride(1) == 1:
        rows = x.permute(0, 2, 3, 1).unflatten(3, (outer, inner, -1)).transpose(3, 4)
        return rows.flatten(3).permute(0, 3, 1, 2)
    return x.unflatten(1, (outer, inner, -1)).transpose(1, 2).flatten(1, 3)
