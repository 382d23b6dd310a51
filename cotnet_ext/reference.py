"""What every function and module of this package means, in plain PyTorch.

This file is the specification: read it to learn what is computed. It imports torch only, runs on
any device in any floating dtype, is differentiable to any order in both modes, works under
`torch.func` and `torch.compile`, and is slow and hungry for memory on purpose, since each step is
written out.
The names and signatures are those of `cotnet_ext.functional` and `cotnet_ext.modules`.

Dimensions: `N` batch, `C` channels, `G` heads, `Cw` weight channels, `K = kh*kw` taps (row-major),
`H, W` input, `Ho, Wo` output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IntOrPair = int | tuple[int, int]


def _pair(value: IntOrPair) -> tuple[int, int]:
    """An int stands for both directions, as in PyTorch's convolutions."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _one_dtype_under_autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Under autocast, give `function` its tensors in the autocast dtype (float64 stays as it is).

    Half inputs beside float32 weights are the normal case there, as GroupNorm returns float32.
    """

    @functools.wraps(function)
    def call(*args, **kwargs) -> Tensor:
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        device = tensors[0].device.type if tensors else "cpu"
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        dtype = torch.get_autocast_dtype(device)

        def cast(value):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value if value.dtype == torch.float64 else value.to(dtype)

        with torch.autocast(device, enabled=False):
            kwargs = {name: cast(value) for name, value in kwargs.items()}
            return function(*map(cast, args), **kwargs)

    return call


@_one_dtype_under_autocast
def local_aggregation(
    input: Tensor,
    weight: Tensor,
    kernel_size: IntOrPair = 3,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    *,
    padding_mode: str = "zeros",
) -> Tensor:
    """Weighted sum over a window around each pixel, with weights of its own at each pixel.

        y[n, g*C + c, i, j] = sum over (u, v) of
            weight[n, g, c % Cw, u*kw + v, i, j] * x[n, c, i*sh - ph + u*dh, j*sw - pw + v*dw]

    Args:
        input: x `[N, C, H, W]`.
        weight: `[N, G, Cw, K, Ho, Wo]` with `C % Cw == 0`; channels c, c + Cw, ... share weights.
        kernel_size, stride, padding, dilation: int or pair.
        padding_mode: outside of x is 0 (`"zeros"`) or mirrored (`"reflect"`, as in `F.pad`).

    Returns:
        y `[N, G*C, Ho, Wo]`, head-major.
    """
    if padding_mode not in ("zeros", "reflect"):
        raise ValueError(f"padding_mode must be 'zeros' or 'reflect', got {padding_mode!r}")
    kernel_size, stride, dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
    ph, pw = _pair(padding)
    n, c = input.shape[:2]
    _, g, cw, k, ho, wo = weight.shape
    mode = "constant" if padding_mode == "zeros" else "reflect"
    padded = F.pad(input, (pw, pw, ph, ph), mode)
    patches = F.unfold(padded, kernel_size, dilation, 0, stride)  # [N, C*K, Ho*Wo]
    patches = patches.reshape(n, 1, c // cw, cw, k, ho, wo)  # channel c is (c // Cw, c % Cw)
    return (weight.unsqueeze(2) * patches).sum(4).reshape(n, g * c, ho, wo)


@_one_dtype_under_autocast
def softmax_aggregation(
    input: Tensor,
    logits: Tensor,
    kernel_size: IntOrPair = 3,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    *,
    padding_mode: str = "zeros",
) -> Tensor:
    """`local_aggregation` with the softmax of `logits` `[N, G, Cw, K, Ho, Wo]` over the taps."""
    return local_aggregation(
        input,
        logits.softmax(dim=3),
        kernel_size,
        stride,
        padding,
        dilation,
        padding_mode=padding_mode,
    )


@_one_dtype_under_autocast
def group_norm_aggregation(
    input: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    kernel_size: IntOrPair = 3,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    *,
    padding_mode: str = "zeros",
) -> Tensor:
    """`local_aggregation` with `weight` `[N, G, Cw, K, Ho, Wo]` sent through a GroupNorm first.

    One group of the norm is the K taps of one weight channel over the whole map, so there are
    `G*Cw` groups; `norm_weight` and `norm_bias` are `[G*Cw*K]` or None.
    """
    n, g, cw, k, ho, wo = weight.shape
    # PyTorch's GroupNorm lacks derivatives of channels_last maps, and of a bias without a weight.
    flat = weight.reshape(n, g * cw * k, ho, wo).contiguous()
    if norm_weight is None and norm_bias is not None:
        norm_weight = torch.ones_like(norm_bias)
    normalised = torch.group_norm(flat, g * cw, norm_weight, norm_bias, eps)
    return local_aggregation(
        input,
        normalised.reshape(weight.shape),
        kernel_size,
        stride,
        padding,
        dilation,
        padding_mode=padding_mode,
    )


@_one_dtype_under_autocast
def spatial_softmax_gate(logits: Tensor, value: Tensor, static: Tensor) -> Tensor:
    """`static + softmax over H*W of logits * value`, all `[N, C, H, W]`."""
    probabilities = logits.flatten(2).softmax(dim=2).reshape(logits.shape)
    return static + probabilities * value


@_one_dtype_under_autocast
def context_fusion(dynamic: Tensor, static: Tensor, logits: Tensor) -> Tensor:
    """Mix two maps `[N, C, H, W]` channel by channel with the softmax of `logits` `[N, C, 2]`."""
    p = logits.softmax(dim=2)[..., None, None]  # [N, C, 2, 1, 1]
    return p[:, :, 0] * dynamic + p[:, :, 1] * static


class LocalConvolution(nn.Module):
    """`local_aggregation` as a module without parameters; `pad_mode` 0 is zeros, 1 is reflect."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        pad_mode: int = 0,
    ) -> None:
        super().__init__()
        if pad_mode not in (0, 1):
            raise ValueError(f"pad_mode must be 0 (zeros) or 1 (reflect), got {pad_mode!r}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.pad_mode = pad_mode

    def forward(self, input: Tensor, weight: Tensor) -> Tensor:
        return local_aggregation(
            input,
            weight,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            padding_mode="reflect" if self.pad_mode else "zeros",
        )


class CoTAttention(nn.Module):
    """Contextual attention of one map `[N, dim, H, W]`, the variant with a softmax over the map.

    The static context is a convolution of the neighbourhood. The dynamic context is the value of
    each pixel times a softmax over all pixels, whose logits see the static context and the input.
    The last convolution makes k*k logits per channel and pixel, of which the mean is taken.

    Source: `model/attention/CoTAttention.py` of xmu-xiaoma666/External-Attention-pytorch.
    """

    def __init__(self, dim: int = 512, kernel_size: int = 3) -> None:
        super().__init__()
        self.dim = dim
        self.kernel_size = kernel_size
        self.key_embed = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=4, bias=False),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
        )
        self.value_embed = nn.Sequential(
            nn.Conv2d(dim, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
        )
        hidden = 2 * dim // 4
        self.attention_embed = nn.Sequential(
            nn.Conv2d(2 * dim, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, kernel_size * kernel_size * dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        static = self.key_embed(x)
        value = self.value_embed(x)
        logits = self.attention_embed(torch.cat([static, x], dim=1))
        logits = logits.reshape(n, c, self.kernel_size * self.kernel_size, h, w).mean(dim=2)
        return spatial_softmax_gate(logits, value, static)


class CotLayer(nn.Module):
    """The contextual transformer block of CoTNet on one map `[N, dim, H, W]`.

    Each pixel makes, from its own features and the static context around it, the k*k weights with
    which its neighbourhood is summed (the dynamic context); eight channels share one set of them.
    A small network over the pooled maps then chooses, per channel, between the two contexts.

    Source: Li et al., Contextual Transformer Networks for Visual Recognition (2021), and
    `models/cotnet.py` of JDAI-CV/CoTNet.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.dim = dim
        self.kernel_size = kernel_size
        taps = kernel_size * kernel_size
        self.key_embed = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=4, bias=False),
            nn.BatchNorm2d(dim),
            nn.ReLU(inplace=True),
        )
        self.embed = nn.Sequential(
            nn.Conv2d(2 * dim, dim // 2, 1, bias=False),
            nn.BatchNorm2d(dim // 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(dim // 2, taps * dim // 8, 1),
            nn.GroupNorm(dim // 8, taps * dim // 8),
        )
        self.conv1x1 = nn.Sequential(
            nn.Conv2d(dim, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
        )
        self.local_conv = LocalConvolution(dim, dim, kernel_size, padding=(kernel_size - 1) // 2)
        self.bn = nn.BatchNorm2d(dim)
        self.act = nn.SiLU(inplace=True)
        self.radix = 2
        hidden = max(dim * self.radix // 4, 32)
        self.se = nn.Sequential(
            nn.Conv2d(dim, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, self.radix * dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        static = self.key_embed(x)
        weight = self.embed(torch.cat([x, static], dim=1))
        weight = weight.reshape(n, 1, c // 8, self.kernel_size * self.kernel_size, h, w)
        dynamic = self.act(self.bn(self.local_conv(self.conv1x1(x), weight)))
        pooled = (dynamic + static).mean(dim=(2, 3), keepdim=True)
        return context_fusion(dynamic, static, self.se(pooled).reshape(n, c, self.radix))


class CoXtLayer(nn.Module):
    """The block of CoTNeXt: `CotLayer` with grouped convolutions, on one map `[N, dim, H, W]`.

    Input and static context are interleaved channel by channel before `embed`, so that each of its
    two groups sees half of both. The aggregation runs on the two halves of the channels side by
    side in the batch, `[2*N, dim//2, H, W]`.

    Source: `models/cotnet.py` of JDAI-CV/CoTNet.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.dim = dim
        self.kernel_size = kernel_size
        self.dw_group = 2
        taps = kernel_size * kernel_size
        self.key_embed = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=8, bias=False),
            nn.BatchNorm2d(dim),
            nn.ReLU(inplace=True),
        )
        self.embed = nn.Sequential(
            nn.Conv2d(2 * dim, dim // 2, 1, groups=self.dw_group, bias=False),
            nn.BatchNorm2d(dim // 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(dim // 2, taps * dim // 8, 1, groups=self.dw_group),
            nn.GroupNorm(dim // 8, taps * dim // 8),
        )
        self.conv1x1 = nn.Sequential(
            nn.Conv2d(dim, dim, 1, groups=self.dw_group, bias=False),
            nn.BatchNorm2d(dim),
        )
        self.local_conv = LocalConvolution(dim, dim, kernel_size, padding=(kernel_size - 1) // 2)
        self.bn = nn.BatchNorm2d(dim)
        self.act = nn.SiLU(inplace=True)
        self.radix = 2
        hidden = max(dim * self.radix // 4, 32)
        self.se = nn.Sequential(
            nn.Conv2d(dim, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, self.radix * dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        static = self.key_embed(x)
        weight = self.embed(torch.stack([x, static], dim=2).reshape(n, 2 * c, h, w))
        weight = weight.reshape(2 * n, 1, c // 16, self.kernel_size * self.kernel_size, h, w)
        value = self.conv1x1(x).reshape(2 * n, c // 2, h, w)
        aggregated = self.local_conv(value, weight).reshape(n, c, h, w)
        dynamic = self.act(self.bn(aggregated))
        pooled = (dynamic + static).mean(dim=(2, 3), keepdim=True)
        return context_fusion(dynamic, static, self.se(pooled).reshape(n, c, self.radix))
