"""What a stage is made of: the bottleneck, its two kinds of attention, its pooling and shortcut."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._bottleneck_training import can_fuse, can_leave, enter, leave
from .._convolutions import run_parts
from .._plain import is_plain

EXPANSION = 4  # channels of a block's result over the width that names its stage


def follow(fused: bool, x: Tensor, *parts: nn.Module) -> Tensor:
    """What `parts` do one after the other.

    If `fused`, and where a gradient is recorded, with 1x1 convolutions that copy no map, and a norm
    and the ReLU behind it as one function. Parts that were replaced or hooked are called.
    """
    if fused and _is_recorded(x):
        return run_parts(parts, x)
    for part in parts:
        x = part(x)
    return x


def _is_recorded(x: Tensor) -> bool:
    """Whether a gradient is recorded, and nobody traces the calls of the modules."""
    return type(x) is Tensor and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class DropPath(nn.Module):
    """In training, the whole branch of some samples is zero, and the others make up for them.

    Stochastic depth: each sample is dropped with probability `rate`, the rest divided by the
    probability to stay, `1 - rate`.
    `forward(input [N, ...])` has the shape of its input.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return input
        keep = 1 - self.rate
        shape = (input.shape[0],) + (1,) * (input.dim() - 1)
        kept = torch.rand(shape, dtype=input.dtype, device=input.device).add_(keep).floor_()
        return input.div(keep) * kept

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def _drops_nothing(module: nn.Module) -> bool:
    """Whether the place of a `DropPath` hands on what it gets."""
    if is_plain(module, nn.Identity):
        return True
    return is_plain(module, DropPath) and not (module.training and module.rate)


class BlurPool(nn.Module):
    """Halves a map after a binomial 3x3 filter, `[1, 2, 1] / 4` in both directions.

    `forward(input [N, channels, H, W]) -> [N, channels, ceil(H/2), ceil(W/2)]`, borders mirrored.

    Source: Zhang, Making Convolutional Networks Shift-Invariant Again, arXiv:1904.11486.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        # No part of the state_dict, as in the original.
        self.register_buffer("filter", torch.empty(channels, 1, 3, 3), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the filter; what builds networks on the meta device calls this afterwards."""
        line = torch.tensor([0.25, 0.5, 0.25], device=self.filter.device, dtype=self.filter.dtype)
        self.filter.copy_(line[:, None] * line)

    def forward(self, input: Tensor) -> Tensor:
        padded = F.pad(input, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, self.filter.to(input.dtype), stride=2, groups=self.channels)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class SamePool(nn.Module):
    """The mean of 2x2 pixels at each pixel; what lies outside counts as zero."""

    def forward(self, input: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(input, (0, 1, 0, 1)), 2, stride=1)


class SplitAttention(nn.Module):
    """A 3x3 convolution whose channels are weighted by what the whole map shows, with radix 1.

    `y = SiLU(bn0(conv(x)))`, then `y * sigmoid(fc2(SiLU(bn1(fc1(mean of y)))))`.

    Source: Zhang et al., ResNeSt: Split-Attention Networks, arXiv:2004.08955.
    """

    def __init__(self, dim: int, stride: int, dilation: int, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        hidden = max(dim // 4, 32)
        self.conv = nn.Conv2d(dim, dim, 3, stride, dilation, dilation, bias=False)
        self.bn0 = nn.BatchNorm2d(dim)
        self.act0 = nn.SiLU(inplace=True)
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.act1 = nn.SiLU(inplace=True)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, input: Tensor) -> Tensor:
        y = follow(self.fused, input, self.conv, self.bn0, self.act0)
        pooled = y.mean((2, 3), keepdim=True)
        return y * self.fc2(self.act1(self.bn1(self.fc1(pooled)))).sigmoid()


class Bottleneck(nn.Module):
    """1x1 convolution, attention, 1x1 convolution, and the shortcut around them.

    Args:
        channels: of the input.
        planes: the result has `EXPANSION * planes` channels.
        width: channels of the attention.
        attention: makes what takes the place of the 3x3 convolution, `[N, width, H, W]` to a map of
            as many channels.
        pool_before, pool_after: what halves the map around the attention, None where nothing does.
        shortcut: what brings the input to the shape of the result, None where it has it.
        drop_path: the rate of `DropPath` on the branch.
        fused: whether a training step may be computed otherwise than module by module; see
            `follow`.
    """

    def __init__(
        self,
        channels: int,
        planes: int,
        width: int,
        attention: Callable[[], nn.Module],
        pool_before: nn.Module | None,
        pool_after: nn.Module | None,
        shortcut: nn.Module | None,
        drop_path: float,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.fused = fused
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.pool_before = pool_before or nn.Identity()
        self.conv2 = attention()
        self.pool_after = pool_after or nn.Identity()
        self.conv3 = nn.Conv2d(width, planes * EXPANSION, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * EXPANSION)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = shortcut

    def forward(self, input: Tensor) -> Tensor:
        if self.fused and _drops_nothing(self.drop_path) and can_fuse(self, input):
            return self._forward_fused(input)
        x = follow(self.fused, input, self.conv1, self.bn1, self.act1)
        x = self.pool_after(self.conv2(self.pool_before(x)))
        x = follow(self.fused, x, self.conv3, self.bn3, self.drop_path)
        x += input if self.downsample is None else follow(self.fused, input, self.downsample)
        return self.act3(x)

    def _forward_fused(self, input: Tensor) -> Tensor:
        x, shortcut = enter(self, input)
        x = self.pool_after(self.conv2(self.pool_before(x)))
        if can_leave(self, x, shortcut):
            return leave(self, x, shortcut)
        x = follow(self.fused, x, self.conv3, self.bn3)
        x += input if self.downsample is None else self.downsample[1](shortcut)
        return self.act3(x)


def shortcut(channels: int, result: int, stride: int, dilation: int, averages: bool) -> nn.Module:
    """The projection of a stage's input; `averages` pools where it would take every other pixel."""
    layers: list[nn.Module] = []
    if averages:
        layers.append(_shortcut_pool(stride, dilation))
        stride = 1
    layers.append(nn.Conv2d(channels, result, 1, stride, bias=False))
    layers.append(nn.BatchNorm2d(result))
    return nn.Sequential(*layers)


def _shortcut_pool(stride: int, dilation: int) -> nn.Module:
    if dilation > 1:
        return SamePool()
    if stride > 1:
        return nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
    return nn.Identity()
