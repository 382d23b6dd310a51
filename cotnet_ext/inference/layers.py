"""The layers of CoT networks for evaluation: every norm but the GroupNorm is in a convolution.

`fuse_layer` makes them of the layers of `cotnet_ext.modules` and `cotnet_ext.reference`. What holds
for all of them:

* The key, `embed` and value norms are in the convolutions before them. The BatchNorm after the
  aggregation is, too: the aggregation is linear in each channel of the value, so its factor is in
  the rows of the value convolution, and only a summand for each channel is left. The aggregation
  adds it, applies the SiLU and takes the mean over the map, with that of the static context.
* Nothing is concatenated: `embed[0]` is the sum of a convolution of the input and one of the static
  context, where the second adds itself to the first and applies the ReLU.
* The value convolution stays apart from the one of the input for `embed`. As one product, their
  results would lie side by side in every pixel, and both had to be copied apart: slower at each
  stage of CoTNet (3 to 15 % of a layer on the CPU).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import modules, reference
from .._group_norm_aggregation_pool import group_norm_aggregation_pool
from .._maps import mean_of_sum, swap_blocks
from ..functional import context_fusion, group_norm_aggregation, spatial_softmax_gate
from ..modules import _is_plain, _is_plain_pointwise
from .convolution import FusedConv2d, _autocast_enabled, fold, scale_and_shift


class NotFusable(Exception):
    """A layer, or a part of it, is not what it usually is; the message says what."""


def fuse_layer(layer: nn.Module, memory_format: torch.memory_format) -> nn.Module | None:
    """The layer for evaluation that gives the same result; None when `layer` is none of ours.

    Raises:
        NotFusable: one of its parts was replaced, has hooks or parametrizations, or needs the
            statistics of the batch.
    """
    fused = _FUSED.get(type(layer))
    if fused is None:
        return None
    _require_plain(layer, type(layer), "the layer")
    return fused(layer, memory_format)


# ---- what must hold ------------------------------------------------------------------------------


def _require_plain(module: nn.Module, kind: type[nn.Module], name: str) -> None:
    if not _is_plain(module, kind):
        raise NotFusable(f"{name} is not a {kind.__name__} without hooks")


def _require_sequence(module: nn.Module, kinds: tuple[type[nn.Module], ...], name: str) -> None:
    _require_plain(module, nn.Sequential, name)
    if len(module) != len(kinds):
        raise NotFusable(f"{name} has {len(module)} parts, not {len(kinds)}")
    for index, (part, kind) in enumerate(zip(module, kinds, strict=True)):
        if kind is nn.BatchNorm2d:
            _require_norm(part, f"{name}.{index}")
        else:
            _require_plain(part, kind, f"{name}.{index}")


def _require_norm(norm: nn.Module, name: str) -> None:
    if not is_constant_norm(norm):
        raise NotFusable(f"{name} is not a BatchNorm2d with running statistics and without hooks")


def is_constant_norm(norm: nn.Module, kind: type[nn.Module] = nn.BatchNorm2d) -> bool:
    """Whether `norm` is one factor and one summand for each channel in evaluation."""
    return (
        any(_is_plain(norm, each) for each in (kind, nn.SyncBatchNorm))
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
    )


def _require_pointwise(conv: nn.Module, groups: int, name: str) -> None:
    if not _is_plain_pointwise(conv, groups):
        raise NotFusable(f"{name} is not a 1x1 convolution of {groups} groups")


def _require_zero_padding(conv: nn.Conv2d, name: str) -> None:
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise NotFusable(f"{name} does not pad with a number of zeros")


# ---- CotLayer and CoXtLayer ----------------------------------------------------------------------

_KEY = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
_EMBED = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.GroupNorm)
_VALUE = (nn.Conv2d, nn.BatchNorm2d)
_SELECT = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d)


# The aggregation of `CoXtLayer` wants its channels in another order. Up to this many, a dense 1x1
# convolution that writes them in that order, and one that puts them back and applies the SiLU, are
# faster than copies that pick a few channels at a time (1.5x at 64 and 96, on the CPU).
NARROW = 128


class FusedContextualLayer(nn.Module):
    """`CotLayer` (one group) or `CoXtLayer` (two) for evaluation; see the head of this file.

    `forward(input [N, dim, H, W]) -> [N, dim, H, W]`
    """

    def __init__(self, layer: nn.Module, memory_format: torch.memory_format) -> None:
        super().__init__()
        dim = layer.dim
        groups = 2 if isinstance(layer, (modules.CoXtLayer, reference.CoXtLayer)) else 1
        _check_contextual(layer, groups)
        self.dim, self.kernel_size, self.groups = dim, layer.kernel_size, groups
        key, key_norm, _ = layer.key_embed
        join, join_norm, _, expand, group_norm = layer.embed
        conv, value_norm = layer.conv1x1
        squeeze, squeeze_norm, _, excite = layer.se

        def fused(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, act: str | None = None):
            return FusedConv2d(conv, weight, bias, act, memory_format)

        self.key = fused(key, *fold(key.weight, key.bias, key_norm), "relu")

        weight, bias = fold(join.weight, join.bias, join_norm)
        of_input, of_static = _columns(weight, dim, groups)
        self.hidden_of_input = fused(join, of_input, bias)
        self.hidden_of_static = fused(join, of_static, None, "relu")
        self.expand = fused(expand, expand.weight, expand.bias)

        scale, shift = scale_and_shift(layer.bn)
        weight, bias = fold(conv.weight, conv.bias, value_norm)
        dtype = conv.weight.dtype
        weight = (weight.double() * scale.view(-1, 1, 1, 1)).to(dtype)
        bias, shift = (bias.double() * scale).to(dtype), shift.to(dtype)
        self.order_back = None
        if groups == 2 and dim <= NARROW and weight.device.type == "cpu":
            to_blocks = swap_blocks(torch.arange(dim).view(1, dim, 1, 1), 2, 8).flatten()
            dense = nn.Conv2d(dim, dim, 1, device="meta")
            self.value = fused(dense, _dense(weight)[to_blocks], bias[to_blocks])
            back = torch.eye(dim, dtype=dtype, device=weight.device)[to_blocks.argsort()]
            self.order_back = fused(dense, back[..., None, None], shift, "silu")
        else:
            self.value = fused(conv, weight, bias)
            if groups == 2:  # channels of the aggregation come in the order of its blocks
                shift = swap_blocks(shift.view(1, dim, 1, 1), 2, 8).flatten()
        self.shift = _constant(shift)

        self.norm_weight = _constant(group_norm.weight)
        self.norm_bias = _constant(group_norm.bias)
        self.eps = group_norm.eps

        weight, bias = fold(squeeze.weight, squeeze.bias, squeeze_norm)
        self.squeeze_weight, self.squeeze_bias = _constant(weight.flatten(1)), _constant(bias)
        self.excite_weight = _constant(excite.weight.flatten(1))
        self.excite_bias = _constant(excite.bias)

    def forward(self, input: Tensor) -> Tensor:
        input = _in_layout(input, self.value)
        static = self.key(input)
        hidden = self.hidden_of_input(input)
        hidden = self.hidden_of_static(static, hidden, overwrite=True)
        dynamic, pooled = self._aggregate(self.value(input), self.expand(hidden), static)
        pooled = pooled.to(self.squeeze_weight.dtype)
        hidden = F.relu(F.linear(pooled, self.squeeze_weight, self.squeeze_bias))
        logits = F.linear(hidden, self.excite_weight, self.excite_bias)
        return context_fusion(dynamic, static, logits.view(-1, self.dim, 2))

    def _aggregate(self, value: Tensor, weight: Tensor, static: Tensor) -> tuple[Tensor, Tensor]:
        """The dynamic context, and the mean over the map of both contexts `[N, dim]`."""
        weight = weight.unflatten(1, (1, self.dim // 8, self.kernel_size * self.kernel_size))
        norm = self.norm_weight, self.norm_bias
        if self.order_back is not None:
            padding = self.kernel_size // 2
            dynamic = group_norm_aggregation(
                value, weight, *norm, self.eps, kernel_size=self.kernel_size, padding=padding
            )
            dynamic = self.order_back(dynamic)
            return dynamic, mean_of_sum(dynamic, static).flatten(1)
        if self.groups == 1:
            return group_norm_aggregation_pool(
                value, weight, *norm, self.shift, static, self.eps, self.kernel_size
            )
        dynamic, mean = group_norm_aggregation_pool(
            swap_blocks(value, 2, 8), weight, *norm, self.shift, None, self.eps, self.kernel_size
        )
        mean = swap_blocks(mean[..., None, None], 8, 2).flatten(1)
        return swap_blocks(dynamic, 8, 2), mean + static.mean((2, 3))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, kernel_size={self.kernel_size}, groups={self.groups}"


def _check_contextual(layer: nn.Module, groups: int) -> None:
    dim, taps = layer.dim, layer.kernel_size * layer.kernel_size
    for name, kinds in (
        ("key_embed", _KEY),
        ("embed", _EMBED),
        ("conv1x1", _VALUE),
        ("se", _SELECT),
    ):
        _require_sequence(getattr(layer, name), kinds, name)
    _require_zero_padding(layer.key_embed[0], "key_embed.0")
    _require_pointwise(layer.embed[0], groups, "embed.0")
    _require_pointwise(layer.embed[3], groups, "embed.3")
    _require_pointwise(layer.conv1x1[0], groups, "conv1x1.0")
    _require_pointwise(layer.se[0], 1, "se.0")
    _require_pointwise(layer.se[3], 1, "se.3")
    _require_norm(layer.bn, "bn")
    _require_plain(layer.act, nn.SiLU, "act")
    norm = layer.embed[4]
    if (norm.num_groups, norm.num_channels) != (dim // 8, dim // 8 * taps):
        raise NotFusable(f"embed.4 has {norm.num_groups} groups, not {dim // 8}")
    local = layer.local_conv
    if not _is_plain(local, modules.LocalConvolution):
        _require_plain(local, reference.LocalConvolution, "local_conv")
    window = (local.kernel_size, local.stride, local.padding, local.dilation, local.pad_mode)
    if window != (layer.kernel_size, 1, layer.kernel_size // 2, 1, 0):
        raise NotFusable("local_conv has another window than the layer")


def _dense(weight: Tensor) -> Tensor:
    """The weight without groups of a convolution that has the weight `[O, C // 2, 1, 1]` of two."""
    first, second = weight.chunk(2)
    zeros = torch.zeros_like(first)
    return torch.cat([torch.cat([first, zeros], dim=1), torch.cat([zeros, second], dim=1)])


def _columns(weight: Tensor, dim: int, groups: int) -> tuple[Tensor, Tensor]:
    """The columns of the weight of `embed[0]` for the input, and those for the static context."""
    if groups == 1:
        return weight[:, :dim], weight[:, dim:]
    return weight[:, 0::2], weight[:, 1::2]  # the maps are interleaved channel by channel


# ---- CoTAttention --------------------------------------------------------------------------------


class FusedCoTAttention(nn.Module):
    """`CoTAttention` for evaluation; its last convolution is averaged over the k*k taps here.

    `forward(input [N, dim, H, W]) -> [N, dim, H, W]`
    """

    def __init__(self, layer: nn.Module, memory_format: torch.memory_format) -> None:
        super().__init__()
        dim, taps = layer.dim, layer.kernel_size * layer.kernel_size
        _check_attention(layer)
        self.dim, self.kernel_size = dim, layer.kernel_size
        key, key_norm, _ = layer.key_embed
        conv, value_norm = layer.value_embed
        join, join_norm, _, expand = layer.attention_embed

        def fused(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, act: str | None = None):
            return FusedConv2d(conv, weight, bias, act, memory_format)

        self.key = fused(key, *fold(key.weight, key.bias, key_norm), "relu")
        self.value = fused(conv, *fold(conv.weight, conv.bias, value_norm))
        weight, bias = fold(join.weight, join.bias, join_norm)
        self.hidden_of_input = fused(join, weight[:, dim:], bias)
        self.hidden_of_static = fused(join, weight[:, :dim], None, "relu")
        # Output channel c*k*k + t is tap t of channel c. The bias cancels in the softmax.
        self.logits = fused(expand, expand.weight.unflatten(0, (dim, taps)).mean(1), None)

    def forward(self, input: Tensor) -> Tensor:
        input = _in_layout(input, self.value)
        static = self.key(input)
        hidden = self.hidden_of_input(input)
        hidden = self.hidden_of_static(static, hidden, overwrite=True)
        return spatial_softmax_gate(self.logits(hidden), self.value(input), static)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, kernel_size={self.kernel_size}"


def _check_attention(layer: nn.Module) -> None:
    for name, kinds in (
        ("key_embed", _KEY),
        ("value_embed", _VALUE),
        ("attention_embed", _EMBED[:4]),
    ):
        _require_sequence(getattr(layer, name), kinds, name)
    _require_zero_padding(layer.key_embed[0], "key_embed.0")
    for name in ("value_embed.0", "attention_embed.0", "attention_embed.3"):
        _require_pointwise(layer.get_submodule(name), 1, name)


_FUSED = {
    modules.CotLayer: FusedContextualLayer,
    modules.CoXtLayer: FusedContextualLayer,
    modules.CoTAttention: FusedCoTAttention,
    reference.CotLayer: FusedContextualLayer,
    reference.CoXtLayer: FusedContextualLayer,
    reference.CoTAttention: FusedCoTAttention,
}


def _constant(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach().clone(), requires_grad=False)


def _in_layout(input: Tensor, conv: FusedConv2d) -> Tensor:
    """`input` as the convolutions of a layer want it, so that it is converted once."""
    if conv.channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    if input.dtype != conv.weight.dtype and not _autocast_enabled(input):
        input = input.to(conv.weight.dtype)
    return input
