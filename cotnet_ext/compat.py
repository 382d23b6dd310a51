"""The names and signatures of JDAI-CV/CoTNet, computed by the functions of this package.

    from cotnet_ext.compat import LocalConvolution, aggregation_zeropad

replaces `from cupy_layers.aggregation_zeropad import LocalConvolution, aggregation_zeropad` (and
the other files of that folder), and `CoTLayer` that of `models/cotnet_hybrid.py`. Everything runs
on CPU and CUDA in every floating dtype and is differentiable to any order. Where the originals are
wrong, these are right:

* any memory layout of the arguments gives the same result;
* `pad_mode=1` reflects instead of being ignored;
* `aggregation_zeropad_mix` and `aggregation_zeropad_mix_merge` have complete gradients for any
  number of heads, any map and any pair of kernel sizes;
* `aggregation_zeropad_dilate` takes dilations of any dtype and honours `stride` and `kernel_size`.

`aggregation_zeropad` and `aggregation_refpad` also take the weights of SAN, `[N, Cw, K, Ho*Wo]`
without heads and with flat pixels.

Source: `cupy_layers/` and `models/cotnet_hybrid.py` of JDAI-CV/CoTNet; Zhao, Jia and Koltun,
Exploring Self-attention for Image Recognition, arXiv:2004.13621.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import _checks
from .functional import local_aggregation
from .modules import CotLayer, LocalConvolution

__all__ = [
    "CoTLayer",
    "LocalConvolution",
    "LocalConvolutionDilate",
    "LocalConvolutionMix",
    "LocalConvolutionMixMerge",
    "aggregation_refpad",
    "aggregation_zeropad",
    "aggregation_zeropad_dilate",
    "aggregation_zeropad_mix",
    "aggregation_zeropad_mix_merge",
]

IntOrPair = int | tuple[int, int]

CoTLayer = CotLayer


def aggregation_zeropad(
    input: Tensor,
    weight: Tensor,
    kernel_size: IntOrPair = 3,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
) -> Tensor:
    """`local_aggregation` with zeros outside of the map.

    Args:
        input: `[N, C, H, W]`.
        weight: `[N, G, Cw, K, Ho, Wo]`, or `[N, Cw, K, Ho*Wo]` as in SAN.
        kernel_size, stride, padding, dilation: int or pair.

    Returns:
        `[N, G*C, Ho, Wo]`.
    """
    window = _checks.window(kernel_size, stride, padding, dilation, "zeros")
    return _aggregate(input, weight, window)


def aggregation_refpad(
    input: Tensor,
    weight: Tensor,
    kernel_size: IntOrPair = 3,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
) -> Tensor:
    """`aggregation_zeropad` with the map reflected at its edges; needs padding < size."""
    window = _checks.window(kernel_size, stride, padding, dilation, "reflect")
    return _aggregate(input, weight, window)


def aggregation_zeropad_dilate(
    input: Tensor,
    weight: Tensor,
    dilation: Tensor | Sequence[int],
    kernel_size: IntOrPair = 3,
    stride: IntOrPair = 1,
) -> Tensor:
    """`local_aggregation` in which each weight channel has a dilation of its own.

    Channel c is dilated by `dilation[c % Cw]` and padded so that stride 1 keeps the map's size.

    Args:
        input: `[N, C, H, W]`.
        weight: `[N, G, Cw, K, Ho, Wo]` with `Ho = (H - 1) // stride + 1`, Wo alike.
        dilation: `[Cw]` whole numbers, as a sequence or as a tensor of any dtype (one on a GPU is
            copied to the host). It has no gradient.
        kernel_size: odd.

    Returns:
        `[N, G*C, Ho, Wo]`, channels in the order of `aggregation_zeropad`.
    """
    kernel_size = _checks.pair("kernel_size", kernel_size, 1)
    if kernel_size[0] % 2 == 0 or kernel_size[1] % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    channels = _weight_channels(input, weight)
    dilations = _dilations(dilation, channels)
    parts, order = [], []
    for value in sorted(set(dilations)):
        chosen = [m for m, own in enumerate(dilations) if own == value]
        maps = input.unflatten(1, (-1, channels))[:, :, chosen]  # [N, C // Cw, chosen, H, W]
        part = local_aggregation(
            maps.flatten(1, 2),
            weight[:, :, chosen],
            kernel_size,
            stride,
            (value * (kernel_size[0] // 2), value * (kernel_size[1] // 2)),
            value,
        )
        parts.append(part.unflatten(1, (weight.shape[1], -1, len(chosen))))
        order += chosen
    position = [order.index(m) for m in range(channels)]
    together = torch.cat(parts, dim=3)[:, :, :, position]  # [N, G, C // Cw, Cw, Ho, Wo]
    return together.flatten(1, 3).contiguous(memory_format=_checks.memory_format(input))


def aggregation_zeropad_mix(
    input: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    kernel_size1: IntOrPair = 3,
    kernel_size2: IntOrPair = 5,
    stride: IntOrPair = 1,
    padding1: IntOrPair = 0,
    padding2: IntOrPair = 0,
    dilation: IntOrPair = 1,
) -> Tensor:
    """Two aggregations of one map, their results side by side.

    Args:
        input: `[N, C, H, W]`.
        weight1, weight2: `[N, G, Cw, K1, Ho, Wo]` and `[N, G, Cw, K2, Ho, Wo]`.
        kernel_size1, padding1: window of the first, kernel_size2, padding2: of the second; with
            these, `stride` and `dilation` both must give maps of one size.

    Returns:
        `[N, 2*G*C, Ho, Wo]`, all channels of the first, then all of the second.
    """
    first = _checks.window(kernel_size1, stride, padding1, dilation, "zeros")
    second = _checks.window(kernel_size2, stride, padding2, dilation, "zeros")
    return _mix(input, weight1, weight2, first, second)


def aggregation_zeropad_mix_merge(
    input: Tensor,
    weight: Tensor,
    head_num: int,
    w_channels: int,
    kernel_size1: IntOrPair = 3,
    kernel_size2: IntOrPair = 5,
    stride: IntOrPair = 1,
    padding1: IntOrPair = 0,
    padding2: IntOrPair = 0,
    dilation: IntOrPair = 1,
) -> Tensor:
    """`aggregation_zeropad_mix` with both weights in one tensor.

    Args:
        input: `[N, C, H, W]`.
        weight: `[N, G*Cw*(K1 + K2), Ho, Wo]`, all of the first kernel's, then all of the second's.
        head_num, w_channels: G and Cw.

    Returns:
        `[N, 2*G*C, Ho, Wo]`.
    """
    first = _checks.window(kernel_size1, stride, padding1, dilation, "zeros")
    second = _checks.window(kernel_size2, stride, padding2, dilation, "zeros")
    return _mix(input, *_unpack(weight, head_num, w_channels, first, second), first, second)


class LocalConvolutionDilate(nn.Module):
    """`aggregation_zeropad_dilate` as a module; `forward(input, weight, dilation)`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = stride

    def forward(self, input: Tensor, weight: Tensor, dilation: Tensor | Sequence[int]) -> Tensor:
        return aggregation_zeropad_dilate(input, weight, dilation, self.kernel_size, self.stride)


class LocalConvolutionMix(nn.Module):
    """`aggregation_zeropad_mix` as a module; `forward(input, weight1, weight2)`.

    `pad_mode` 0 pads with zeros, 1 reflects.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size1: IntOrPair,
        kernel_size2: IntOrPair,
        stride: IntOrPair = 1,
        padding1: IntOrPair = 0,
        padding2: IntOrPair = 0,
        dilation: IntOrPair = 1,
        pad_mode: int = 0,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size1 = kernel_size1
        self.kernel_size2 = kernel_size2
        self.stride = stride
        self.padding1 = padding1
        self.padding2 = padding2
        self.dilation = dilation
        self.pad_mode = pad_mode

    def forward(self, input: Tensor, weight1: Tensor, weight2: Tensor) -> Tensor:
        return _mix(input, weight1, weight2, *_windows(self))


class LocalConvolutionMixMerge(nn.Module):
    """`aggregation_zeropad_mix_merge` as a module; `forward(input, weight)`.

    `pad_mode` 0 pads with zeros, 1 reflects.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        head_num: int,
        w_channels: int,
        kernel_size1: IntOrPair,
        kernel_size2: IntOrPair,
        stride: IntOrPair = 1,
        padding1: IntOrPair = 0,
        padding2: IntOrPair = 0,
        dilation: IntOrPair = 1,
        pad_mode: int = 0,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.head_num = head_num
        self.w_channels = w_channels
        self.kernel_size1 = kernel_size1
        self.kernel_size2 = kernel_size2
        self.stride = stride
        self.padding1 = padding1
        self.padding2 = padding2
        self.dilation = dilation
        self.pad_mode = pad_mode

    def forward(self, input: Tensor, weight: Tensor) -> Tensor:
        windows = _windows(self)
        weights = _unpack(weight, self.head_num, self.w_channels, *windows)
        return _mix(input, *weights, *windows)


def _aggregate(input: Tensor, weight: Tensor, window: _checks.Window) -> Tensor:
    if isinstance(weight, Tensor) and weight.dim() == 4:
        weight = _with_heads(input, weight, window)
    return local_aggregation(input, weight, *window[:4], padding_mode=window[4])


def _with_heads(input: Tensor, weight: Tensor, window: _checks.Window) -> Tensor:
    """SAN's `[N, Cw, K, Ho*Wo]` as `[N, 1, Cw, K, Ho, Wo]`."""
    _check_input(input)
    kernel, *geometry, _ = window
    height, width = (
        _checks.output_size(input.shape[2 + dim], kernel[dim], *(pair[dim] for pair in geometry))
        for dim in (0, 1)
    )
    if weight.shape[3] != height * width:
        raise ValueError(
            f"weight must be [N, G, Cw, K, {height}, {width}] or [N, Cw, K, {height * width}], "
            f"got {list(weight.shape)}"
        )
    return weight.unflatten(3, (height, width)).unsqueeze(1)


def _mix(
    input: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    first: _checks.Window,
    second: _checks.Window,
) -> Tensor:
    for name, weight in (("weight1", weight1), ("weight2", weight2)):
        _check_weight(name, weight)
    if weight1.shape[4:] != weight2.shape[4:]:
        raise ValueError(
            f"weight2 must have the map of weight1, {list(weight1.shape[4:])}, "
            f"got {list(weight2.shape[4:])}"
        )
    results = [
        local_aggregation(input, weight, *window[:4], padding_mode=window[4])
        for weight, window in ((weight1, first), (weight2, second))
    ]
    return torch.cat(results, dim=1)


def _unpack(
    weight: Tensor,
    head_num: int,
    w_channels: int,
    first: _checks.Window,
    second: _checks.Window,
) -> tuple[Tensor, Tensor]:
    """The weights of both kernels, `[N, G, Cw, K, Ho, Wo]` each, out of the merged tensor."""
    for name, value in (("head_num", head_num), ("w_channels", w_channels)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor, got {type(weight).__name__}")
    taps = [window[0][0] * window[0][1] for window in (first, second)]
    sizes = [head_num * w_channels * k for k in taps]
    if weight.dim() != 4 or weight.shape[1] != sum(sizes):
        raise ValueError(f"weight must be [N, {sum(sizes)}, Ho, Wo], got {list(weight.shape)}")
    parts = zip(weight.split(sizes, dim=1), taps, strict=True)
    weight1, weight2 = (part.unflatten(1, (head_num, w_channels, k)) for part, k in parts)
    return weight1, weight2


def _windows(module: nn.Module) -> tuple[_checks.Window, _checks.Window]:
    """The two windows that the attributes of a mixing module describe."""
    if module.pad_mode not in (0, 1):
        raise ValueError(f"pad_mode must be 0 (zeros) or 1 (reflect), got {module.pad_mode!r}")
    mode = _checks.PADDING_MODES[module.pad_mode]
    stride, dilation = module.stride, module.dilation
    return (
        _checks.window(module.kernel_size1, stride, module.padding1, dilation, mode),
        _checks.window(module.kernel_size2, stride, module.padding2, dilation, mode),
    )


def _check_input(input: Tensor) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    if input.dim() != 4:
        raise ValueError(f"input must be [N, C, H, W], got {list(input.shape)}")


def _check_weight(name: str, weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(weight).__name__}")
    if weight.dim() != 6:
        raise ValueError(f"{name} must be [N, G, Cw, K, Ho, Wo], got {list(weight.shape)}")


def _weight_channels(input: Tensor, weight: Tensor) -> int:
    """Cw, after the checks without which the channels cannot be taken apart."""
    _check_input(input)
    _check_weight("weight", weight)
    channels = weight.shape[2]
    if channels < 1 or input.shape[1] % channels:
        raise ValueError(
            f"weight must be [N, G, Cw, K, Ho, Wo] with Cw dividing {input.shape[1]}, "
            f"got {list(weight.shape)}"
        )
    return channels


def _dilations(dilation: Tensor | Sequence[int], channels: int) -> list[int]:
    """The dilation of every weight channel as an int."""
    if isinstance(dilation, Tensor):
        if dilation.is_complex() or dilation.dtype == torch.bool:
            raise TypeError(f"dilation must hold whole numbers, got {dilation.dtype}")
        dilation = dilation.tolist() if dilation.dim() == 1 else [dilation]
    if not isinstance(dilation, Sequence) or isinstance(dilation, str):
        raise TypeError(f"dilation must be a Tensor or a sequence, got {type(dilation).__name__}")
    if len(dilation) != channels or any(isinstance(value, Tensor) for value in dilation):
        raise ValueError(f"dilation must be [{channels}], one per weight channel, got {dilation}")
    for value in dilation:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"dilation must hold whole numbers, got {value!r}")
        if value < 1 or value != int(value):
            raise ValueError(f"dilation must hold whole numbers of at least 1, got {value!r}")
    return [int(value) for value in dilation]
