"""The same values under other strides.

Every layout surrounds its elements with NaN where there is room around them, so that a kernel that
reads outside its slice is found out.
"""

from __future__ import annotations

import pytest
import torch


def contiguous(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().clone()


def channels_last(t: torch.Tensor) -> torch.Tensor:
    """`[N, C, H, W]` in NHWC memory; weights `[N, G, Cw, K, H, W]` as a view of such a map."""
    if t.dim() == 6:
        flat = t.flatten(1, 3).contiguous(memory_format=torch.channels_last)
        return flat.unflatten(1, t.shape[1:4])
    if t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return contiguous(t)


def tap_major(t: torch.Tensor) -> torch.Tensor:
    """Maps in NHWC memory, and weights `[N, G, Cw, K, H, W]` as `[N, H, W, G, K, Cw]`."""
    if t.dim() == 6:
        return channels_last(t.transpose(2, 3)).transpose(2, 3)
    return channels_last(t)


def sliced(t: torch.Tensor) -> torch.Tensor:
    """The middle of a larger contiguous tensor, cut in every dimension."""
    big = t.new_full([size + 3 for size in t.shape], torch.nan)
    view = big[tuple(slice(1, 1 + size) for size in t.shape)]
    return view.copy_(t)


def channels_last_sliced(t: torch.Tensor) -> torch.Tensor:
    """The middle of a larger map in NHWC memory."""
    if t.dim() not in (4, 6):
        return sliced(t)
    flat = t.flatten(1, 3) if t.dim() == 6 else t
    n, c, h, w = flat.shape
    big = flat.new_full((n + 1, h + 2, w + 3, c + 5), torch.nan)
    view = big.permute(0, 3, 1, 2)[1:, 2 : 2 + c, 1 : 1 + h, 1 : 1 + w].copy_(flat)
    return view.unflatten(1, t.shape[1:4]) if t.dim() == 6 else view


def every_second(t: torch.Tensor) -> torch.Tensor:
    """Every second element of a tensor twice as long: stride 2 in the innermost dimension."""
    big = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan)
    return big[..., ::2].copy_(t)


def transposed(t: torch.Tensor) -> torch.Tensor:
    """Height and width (the last two dimensions) swapped in memory."""
    if t.dim() < 2:
        return every_second(t)
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """Contiguous, but one element past an aligned address."""
    storage = t.new_full((t.numel() + 2,), torch.nan)
    return storage[1 : 1 + t.numel()].view(t.shape).copy_(t)


def channels_last_misaligned(t: torch.Tensor) -> torch.Tensor:
    """NHWC memory, one element past an aligned address."""
    if t.dim() not in (4, 6):
        return misaligned(t)
    flat = t.flatten(1, 3) if t.dim() == 6 else t
    nhwc = misaligned(flat.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return nhwc.unflatten(1, t.shape[1:4]) if t.dim() == 6 else nhwc


def batch_last(t: torch.Tensor) -> torch.Tensor:
    """The batch is the fastest dimension."""
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


LAYOUTS = {
    layout.__name__: layout
    for layout in (
        contiguous,
        channels_last,
        tap_major,
        sliced,
        channels_last_sliced,
        every_second,
        transposed,
        misaligned,
        channels_last_misaligned,
        batch_last,
    )
}

# Argument layouts met together, as (layout of the maps, layout of the weights or logits).
_PAIRS = (
    ("contiguous", "channels_last"),
    ("channels_last", "contiguous"),
    ("channels_last", "channels_last"),
    ("channels_last", "tap_major"),
    ("sliced", "transposed"),
    ("transposed", "sliced"),
    ("channels_last_sliced", "channels_last_sliced"),
    ("misaligned", "misaligned"),
    ("channels_last_misaligned", "channels_last_misaligned"),
    ("every_second", "batch_last"),
    ("batch_last", "every_second"),
)
MIXED = tuple(pytest.param(*names, id="+".join(names)) for names in _PAIRS)


def assert_keeps_format(result: torch.Tensor, source: torch.Tensor, name: str) -> None:
    """A contiguous source gives a contiguous result, a channels_last one a channels_last result.

    Shapes for which both hold (one channel, or a map of one pixel) leave the choice open. Other
    strides promise nothing but a result without holes.
    """
    formats = (torch.contiguous_format, torch.channels_last)
    kept = [fmt for fmt in formats if source.is_contiguous(memory_format=fmt)]
    wanted = kept or list(formats)
    assert any(result.is_contiguous(memory_format=fmt) for fmt in wanted), (
        f"{name}: a {list(source.shape)} input with strides {source.stride()} gave a "
        f"{list(result.shape)} result with strides {result.stride()}, expected one of {wanted}"
    )


# The two layouts that kernels are written for.
FORMATS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
