"""The one table of problem shapes, and random inputs for it.

Every test of the functions takes its shapes from `CASES`. A row is

    name: batch, channels, heads, weight channels,
          kernel, stride, padding, dilation, padding mode, height, width

The maps of the functions without a window (`spatial_softmax_gate`, `context_fusion`) are the
`[batch, channels, height, width]` of the same rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

Pair = tuple[int, int]
IntOrPair = int | Pair


def pair(value: IntOrPair) -> Pair:
    """An int stands for both directions, as in PyTorch's convolutions."""
    return (value, value) if isinstance(value, int) else value


@dataclass(frozen=True)
class Case:
    """One problem of the aggregation family; the letters are those of the formula."""

    name: str
    batch: int
    channels: int
    heads: int
    weight_channels: int
    kernel_size: IntOrPair
    stride: IntOrPair
    padding: IntOrPair
    dilation: IntOrPair
    padding_mode: str
    height: int
    width: int

    @property
    def taps(self) -> int:
        kernel = pair(self.kernel_size)
        return kernel[0] * kernel[1]

    @property
    def output_size(self) -> Pair:
        """`floor((size + 2 * padding - dilation * (kernel - 1) - 1) / stride) + 1`."""
        sizes = zip(
            (self.height, self.width),
            pair(self.kernel_size),
            pair(self.stride),
            pair(self.padding),
            pair(self.dilation),
            strict=True,
        )
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        return height, width

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.height, self.width

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.batch, self.heads, self.weight_channels, self.taps, *self.output_size

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads * self.channels, *self.output_size

    @property
    def norm_size(self) -> int:
        """Length of the affine parameters of `group_norm_aggregation`."""
        return self.heads * self.weight_channels * self.taps

    @property
    def geometry(self) -> dict[str, Any]:
        """The keyword arguments that the functions share."""
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "padding_mode": self.padding_mode,
        }

    @property
    def op_geometry(self) -> tuple[Any, ...]:
        """The same as positional arguments of the raw ops."""
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation)
        return *(list(pair(size)) for size in sizes), self.padding_mode

    @property
    def weight_numel(self) -> int:
        numel = 1
        for size in self.weight_shape:
            numel *= size
        return numel


_ROWS: dict[str, tuple] = {
    # The four stages of CoTNet, one half of a CoTNeXt layer, a layer of SAN.
    "stage1_64x56x56": (1, 64, 1, 8, 3, 1, 1, 1, "zeros", 56, 56),
    "stage2_128x28x28": (2, 128, 1, 16, 3, 1, 1, 1, "zeros", 28, 28),
    "stage3_256x14x14": (2, 256, 1, 32, 3, 1, 1, 1, "zeros", 14, 14),
    "stage4_512x7x7": (2, 512, 1, 64, 3, 1, 1, 1, "zeros", 7, 7),
    "cotnext_48x28x28": (4, 48, 1, 6, 3, 1, 1, 1, "zeros", 28, 28),
    "san_k7_32x14x14": (2, 32, 1, 4, 7, 1, 3, 1, "reflect", 14, 14),
    # Maps that do not fill vectors, or have only one row, one column, one pixel.
    "odd_9x11": (2, 24, 1, 3, 3, 1, 1, 1, "zeros", 9, 11),
    "odd_17x13": (3, 14, 1, 7, 3, 1, 1, 1, "zeros", 17, 13),
    "map_1x1": (3, 16, 1, 2, 3, 1, 1, 1, "zeros", 1, 1),
    "map_1x1_k5": (2, 9, 1, 3, 5, 1, 2, 1, "zeros", 1, 1),
    "row_1x19": (2, 8, 1, 4, 3, 1, 1, 1, "zeros", 1, 19),
    "column_19x1": (2, 8, 1, 4, 3, 1, 1, 1, "zeros", 19, 1),
    "narrow_10x3": (2, 16, 1, 2, 3, 1, 1, 1, "zeros", 10, 3),
    "narrow_6x2_k5": (2, 8, 1, 4, 5, 1, 2, 1, "zeros", 6, 2),
    "long_5x130": (1, 16, 1, 8, 3, 1, 1, 1, "zeros", 5, 130),
    "long_3x257_k5": (1, 8, 1, 2, 5, 1, 2, 1, "zeros", 3, 257),
    "one_slice_40x33": (1, 2, 1, 2, 3, 1, 1, 1, "zeros", 40, 33),
    "batch_33": (33, 4, 1, 2, 3, 1, 1, 1, "zeros", 4, 4),
    # Kernel sizes.
    "k1": (2, 12, 1, 3, 1, 1, 0, 1, "zeros", 7, 9),
    "k1_padded": (2, 6, 1, 2, 1, 1, 1, 1, "zeros", 4, 5),
    "k2_grows": (2, 12, 1, 4, 2, 1, 1, 1, "zeros", 7, 8),
    "k4_even": (2, 12, 1, 6, 4, 1, 2, 1, "zeros", 9, 8),
    "k5": (2, 16, 1, 4, 5, 1, 2, 1, "zeros", 12, 11),
    "k7": (1, 16, 1, 4, 7, 1, 3, 1, "zeros", 12, 13),
    "k9": (1, 4, 1, 2, 9, 1, 4, 1, "zeros", 10, 9),
    "k3x5": (2, 12, 1, 4, (3, 5), 1, (1, 2), 1, "zeros", 8, 10),
    "k1x7": (2, 12, 1, 3, (1, 7), 1, (0, 3), 1, "zeros", 5, 20),
    "k7x1": (2, 6, 1, 3, (7, 1), 1, (3, 0), 1, "zeros", 9, 6),
    "narrow_k7_heads2": (1, 32, 2, 1, 7, 1, 3, 1, "zeros", 14, 14),
    "narrow_k7_dilation2": (1, 6, 1, 1, 7, 1, 6, 2, "zeros", 97, 7),
    # Strides.
    "stride2": (2, 16, 1, 8, 3, 2, 1, 1, "zeros", 15, 14),
    "stride3": (2, 8, 1, 2, 3, 3, 1, 1, "zeros", 16, 17),
    "stride2x1": (2, 8, 1, 4, 3, (2, 1), 1, 1, "zeros", 11, 12),
    "stride2_k2": (2, 12, 1, 4, 2, 2, 0, 1, "zeros", 8, 9),
    "stride4_skips_pixels": (2, 8, 1, 4, 2, 4, 0, 1, "zeros", 13, 14),
    "stride2_k5": (1, 12, 1, 3, 5, 2, 2, 1, "zeros", 13, 20),
    # Dilations.
    "dilation2": (2, 16, 1, 4, 3, 1, 2, 2, "zeros", 10, 11),
    "dilation1x3": (2, 8, 1, 4, 3, 1, (1, 3), (1, 3), "zeros", 9, 14),
    "dilation2_stride2": (2, 8, 1, 2, 3, 2, 2, 2, "zeros", 13, 12),
    "dilation2_k5": (1, 8, 1, 4, 5, 1, 4, 2, "zeros", 9, 9),
    "dilation9_centre_only": (1, 6, 1, 3, 3, 1, 9, 9, "zeros", 4, 5),
    "dilation8_rows_outside": (1, 6, 1, 2, 2, 1, 6, 8, "zeros", 3, 4),
    # Paddings: outputs smaller and larger than the input, windows entirely outside.
    "padding0": (2, 8, 1, 4, 3, 1, 0, 1, "zeros", 8, 9),
    "padding0_one_output": (2, 8, 1, 4, 5, 1, 0, 1, "zeros", 5, 5),
    "padding2_grows": (2, 8, 1, 4, 3, 1, 2, 1, "zeros", 5, 6),
    "padding3_windows_outside": (2, 8, 1, 2, 3, 1, 3, 1, "zeros", 5, 6),
    "padding0x2": (2, 8, 1, 2, 3, 1, (0, 2), 1, "zeros", 5, 6),
    # Heads and channel sharing.
    "heads2": (2, 12, 2, 3, 3, 1, 1, 1, "zeros", 8, 7),
    "heads3": (1, 10, 3, 5, 3, 1, 1, 1, "zeros", 7, 6),
    "heads2_k5_stride2": (2, 8, 2, 2, 5, 2, 2, 1, "zeros", 9, 10),
    "cw_equals_c": (2, 12, 1, 12, 3, 1, 1, 1, "zeros", 9, 8),
    "cw_is_1": (2, 13, 1, 1, 3, 1, 1, 1, "zeros", 8, 8),
    "cw_half": (2, 10, 1, 5, 3, 1, 1, 1, "zeros", 7, 8),
    "cw_is_12": (1, 24, 1, 12, 3, 1, 1, 1, "zeros", 10, 12),
    "cw_is_3_of_72": (1, 72, 1, 3, 3, 1, 1, 1, "zeros", 9, 9),
    "one_channel": (2, 1, 1, 1, 3, 1, 1, 1, "zeros", 9, 10),
    "one_channel_heads2": (2, 1, 2, 1, 3, 1, 1, 1, "zeros", 6, 5),
    # Reflect padding.
    "reflect": (2, 16, 1, 4, 3, 1, 1, 1, "reflect", 9, 10),
    "reflect_to_the_edge": (1, 4, 1, 2, 7, 1, 3, 1, "reflect", 4, 5),
    "reflect_stride2_dilation2": (2, 8, 1, 4, 3, 2, 2, 2, "reflect", 11, 10),
    "reflect_1x7": (2, 6, 1, 3, (1, 7), 1, (0, 3), 1, "reflect", 3, 12),
    "reflect_heads2_k4": (1, 6, 2, 3, 4, 1, 2, 1, "reflect", 6, 7),
    "reflect_1x1": (1, 4, 1, 2, 1, 1, 1, 1, "reflect", 5, 5),
    "reflect_3x1": (2, 4, 1, 2, (3, 1), 1, 1, 1, "reflect", 6, 5),
    "reflect_grows": (1, 4, 1, 4, 3, 1, 3, 1, "reflect", 5, 6),
    # Empty batches.
    "empty_batch": (0, 8, 1, 4, 3, 1, 1, 1, "zeros", 7, 7),
    "empty_batch_heads2": (0, 6, 2, 2, 2, 2, 1, 1, "reflect", 5, 6),
    # Small enough to perturb every element.
    "tiny_k3": (1, 4, 1, 2, 3, 1, 1, 1, "zeros", 3, 2),
    "tiny_k2_stride2x1": (2, 2, 2, 1, 2, (2, 1), 1, 1, "zeros", 3, 3),
    "tiny_dilated": (1, 2, 1, 2, (1, 3), 1, (0, 2), (1, 2), "zeros", 2, 4),
    "tiny_reflect": (1, 2, 1, 1, 3, 1, 1, 1, "reflect", 3, 2),
}

CASES: dict[str, Case] = {name: Case(name, *row) for name, row in _ROWS.items()}
EMPTY = tuple(case for case in CASES.values() if case.batch == 0)
FILLED = tuple(case for case in CASES.values() if case.batch > 0)
TINY = tuple(case for case in CASES.values() if case.name.startswith("tiny"))

# A cross-section for the tests that cost more per case: every kernel size with code of its own,
# stride, dilation, heads, reflection, a narrow and a long map.
REPRESENTATIVE = tuple(
    CASES[name]
    for name in (
        "stage4_512x7x7",
        "odd_9x11",
        "narrow_10x3",
        "long_5x130",
        "k2_grows",
        "k5",
        "k7",
        "k3x5",
        "stride2",
        "dilation1x3",
        "padding3_windows_outside",
        "heads3",
        "cw_equals_c",
        "one_channel",
        "reflect_stride2_dilation2",
    )
)

# One case per different input map, for the functions without a window.
MAPS = tuple({case.input_shape: case for case in reversed(CASES.values())}.values())[::-1]


def each(cases: Iterable[Case], where: Callable[[Case], bool] = lambda case: True):
    """`pytest.mark.parametrize` over cases, with their names as ids."""
    chosen = [case for case in cases if where(case)]
    assert chosen, "no case is left"
    return pytest.mark.parametrize("case", chosen, ids=[case.name for case in chosen])


def dtype_id(dtype: torch.dtype) -> str:
    """float32, not torch.float32, in test names."""
    return str(dtype).removeprefix("torch.")


def generator(*key: object) -> torch.Generator:
    """A random generator that depends only on what it is for, not on which tests ran before."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def randn(*shape: int, dtype: torch.dtype = torch.float64, key: object = ()) -> torch.Tensor:
    """Normal numbers, drawn in float64 and rounded to dtype, reproducible per key and shape."""
    values = torch.randn(*shape, generator=generator(key, shape), dtype=torch.float64)
    return values.to(dtype)
