"""The layers of Contextual Transformer networks on the fused functions of this package.

Drop-in for the originals: the constructors, the `state_dict` keys and the numbers in training and
evaluation are those of `cotnet_ext.reference`, and the same seed initialises the same parameters.
Nothing is computed here that is not a submodule, a function of `cotnet_ext.functional` or a 1x1
convolution; the layers are faster because of four identities, and because a training step of a
layer is one function (`_training`, `_attention_training`).

* A 1x1 convolution of concatenated maps is the sum of 1x1 convolutions of the maps with the
  matching columns of the weight: nothing is concatenated.
* The mean over k*k output channels of a 1x1 convolution is a 1x1 convolution with averaged
  weights: the `k*k*dim` channels of `CoTAttention` never exist.
* A BatchNorm in evaluation is a factor and a shift per channel, which the convolution before it can
  apply with its weight: where no gradient is recorded, the normalisation is no pass of its own.
* GroupNorm followed by the aggregation is `group_norm_aggregation`: the normalised weights never
  exist.

A submodule that was replaced, parametrized or given hooks is called as it is; see `_is_plain`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _layer_parameters as parameters
from ._attention_training import fused_attention
from ._checks import Window
from ._checks import window as _window
from ._convolutions import (
    _autocast_enabled,
    _is_joint,
    _is_plain_pointwise,
    _is_plain_sequence,
    _join,
    _run,
)
from ._fusable import Built, is_fusable
from ._maps import mean_of_sum, swap_blocks
from ._plain import is_plain as _is_plain
from ._pointwise import pointwise
from ._training import fused_layer
from .functional import (
    context_fusion,
    group_norm_aggregation,
    local_aggregation,
    spatial_softmax_gate,
)

__all__ = ["CoTAttention", "CoXtLayer", "CotLayer", "LocalConvolution"]


def _check_sizes(dim: int, kernel_size: int, multiple: int) -> None:
    for name, value in (("dim", dim), ("kernel_size", kernel_size)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
    if dim < 1 or dim % multiple:
        raise ValueError(f"dim must be a positive multiple of {multiple}, got {dim}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be a positive odd number, got {kernel_size}")


def _check_map(input: Tensor, dim: int) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    if input.dim() != 4 or input.shape[1] != dim:
        raise ValueError(f"input must be [N, {dim}, H, W], got {list(input.shape)}")


class LocalConvolution(nn.Module):
    """`local_aggregation` with its window as a module; it has no parameters.

    Args:
        in_channels, out_channels: kept for the original signature; the tensors decide.
        kernel_size, stride, padding, dilation: int or pair.
        pad_mode: 0 pads with zeros, 1 reflects.

    `forward(input [N, C, H, W], weight [N, G, Cw, K, Ho, Wo]) -> [N, G*C, Ho, Wo]`
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        pad_mode: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(pad_mode, int) or isinstance(pad_mode, bool):
            raise TypeError(f"pad_mode must be 0 (zeros) or 1 (reflect), got {pad_mode!r}")
        if pad_mode not in (0, 1):
            raise ValueError(f"pad_mode must be 0 (zeros) or 1 (reflect), got {pad_mode!r}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.pad_mode = pad_mode

    @property
    def window(self) -> dict[str, int | tuple[int, int] | str]:
        """The keyword arguments of the functions that say what the window is."""
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "padding_mode": "reflect" if self.pad_mode else "zeros",
        }

    @property
    def pairs(self) -> Window:
        """The window as the operators take it."""
        return _window(**self.window)

    def forward(self, input: Tensor, weight: Tensor) -> Tensor:
        return local_aggregation(input, weight, **self.window)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"pad_mode={self.pad_mode}"
        )


class CoTAttention(nn.Module):
    """Contextual attention with a softmax over the map; see `reference.CoTAttention`.

    Args:
        dim: channels, a multiple of 4.
        kernel_size: odd size of the static context.

    `forward(input [N, dim, H, W]) -> [N, dim, H, W]`. Neither the concatenation of input and static
    context nor the `k*k*dim` logits nor the probabilities are ever in memory.

    Source: `model/attention/CoTAttention.py` of xmu-xiaoma666/External-Attention-pytorch.
    """

    _paths = parameters.ATTENTION
    _learned = parameters.attention
    _groups = 1
    _parts = {
        "key_embed": (nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
        "attention_embed": (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d),
        "value_embed": (nn.Conv2d, nn.BatchNorm2d),
    }

    def __init__(self, dim: int = 512, kernel_size: int = 3) -> None:
        super().__init__()
        _check_sizes(dim, kernel_size, multiple=4)
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

    def forward(self, input: Tensor) -> Tensor:
        _check_map(input, self.dim)
        if is_fusable(self, input):
            return fused_attention(self, input)
        return self._compose(input)

    @property
    def _branches(self) -> tuple[nn.Sequential, nn.Sequential]:
        """What makes the logits of input and static context, and what makes the value."""
        return self.attention_embed, self.value_embed

    @property
    def _norms(self) -> tuple[nn.BatchNorm2d, ...]:
        return self.key_embed[1], self.attention_embed[1], self.value_embed[1]

    def _convolutions(self) -> dict[str, Built]:
        dim, k = self.dim, self.kernel_size
        return {
            "key_embed.0": Built(k, 4, dim, dim),
            "attention_embed.0": Built(1, 1, 2 * dim, dim // 2),
            "attention_embed.3": Built(1, 1, dim // 2, k * k * dim, may_have_bias=True),
            "value_embed.0": Built(1, 1, dim, dim),
        }

    def _compose(self, input: Tensor) -> Tensor:
        """The layer from its submodules and the functions of this package."""
        static = _run(self.key_embed, input)
        embed, values = self._branches
        if _is_joint(embed, 4, values, groups=1):
            hidden, value = _join(input, static, embed, values, self._split)
            return spatial_softmax_gate(self._logits(hidden), value(), static)
        if _is_plain_sequence(embed, 4):
            join, norm, act, _ = embed
            logits = self._logits(act(norm(join(torch.cat((static, input), dim=1)))))
        else:
            logits = self._average(embed(torch.cat((static, input), dim=1)))
        return spatial_softmax_gate(logits, _run(values, input), static)

    def _split(self, weight: Tensor) -> list[Tensor]:
        """The columns of the weight of `attention_embed[0]` for the input, and those for static."""
        return [weight[:, self.dim :], weight[:, : self.dim]]

    def _merge(self, of_input: Tensor, of_static: Tensor) -> Tensor:
        """The weight that has these columns."""
        return torch.cat((of_static, of_input), dim=1)

    def _logits(self, hidden: Tensor) -> Tensor:
        """The last convolution of `attention_embed`, averaged over its k*k outputs per channel."""
        last = self.attention_embed[3]
        if not _is_plain_pointwise(last, groups=1):
            return self._average(last(hidden))
        # Output channel c*k*k + t is tap t of channel c.
        taps = self.kernel_size * self.kernel_size
        weight = last.weight.view(self.dim, taps, -1).mean(1)
        # The bias cancels in the softmax over the map. Where gradients are recorded it stays, so
        # that its gradient is zero and not absent.
        bias = last.bias if torch.is_grad_enabled() else None
        return pointwise([hidden], [weight], None if bias is None else bias.view(-1, taps).mean(1))

    def _average(self, logits: Tensor) -> Tensor:
        return logits.unflatten(1, (self.dim, self.kernel_size * self.kernel_size)).mean(2)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, kernel_size={self.kernel_size}"


class _ContextualLayer(nn.Module):
    """What `CotLayer` and `CoXtLayer` have in common: all but the grouping of the channels.

    Attributes:
        _key_groups: groups of the convolution in `key_embed`.
        _groups: groups of the 1x1 convolutions in `embed` and `conv1x1`.
        _parts: the types of its submodules, and of theirs.
    """

    _key_groups: int
    _groups: int
    _paths = parameters.CONTEXTUAL
    _learned = parameters.contextual
    _parts = {
        "key_embed": (nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
        "embed": (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.GroupNorm),
        "conv1x1": (nn.Conv2d, nn.BatchNorm2d),
        "local_conv": LocalConvolution,
        "bn": nn.BatchNorm2d,
        "act": nn.SiLU,
        "se": (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d),
    }

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        groups = self._groups
        _check_sizes(dim, kernel_size, multiple=8 * groups)
        taps = kernel_size * kernel_size
        self.dim = dim
        self.kernel_size = kernel_size
        padding = kernel_size // 2
        self.key_embed = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size, padding=padding, groups=self._key_groups, bias=False),
            nn.BatchNorm2d(dim),
            nn.ReLU(inplace=True),
        )
        self.embed = nn.Sequential(
            nn.Conv2d(2 * dim, dim // 2, 1, groups=groups, bias=False),
            nn.BatchNorm2d(dim // 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(dim // 2, taps * dim // 8, 1, groups=groups),
            nn.GroupNorm(dim // 8, taps * dim // 8),
        )
        self.conv1x1 = nn.Sequential(
            nn.Conv2d(dim, dim, 1, groups=groups, bias=False),
            nn.BatchNorm2d(dim),
        )
        self.local_conv = LocalConvolution(dim, dim, kernel_size, padding=padding)
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

    def forward(self, input: Tensor) -> Tensor:
        _check_map(input, self.dim)
        if is_fusable(self, input):
            return fused_layer(self, input)
        return self._compose(input)

    @property
    def _branches(self) -> tuple[nn.Sequential, nn.Sequential]:
        """What makes the weights from input and static context, and what makes the value."""
        return self.embed, self.conv1x1

    @property
    def _norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """The norms of maps, and that of the pooled one."""
        return self.key_embed[1], self.embed[1], self.conv1x1[1], self.bn, self.se[1]

    def _convolutions(self) -> dict[str, Built]:
        dim, k, groups, hidden = self.dim, self.kernel_size, self._groups, self.se[0].out_channels
        return {
            "key_embed.0": Built(k, self._key_groups, dim, dim),
            "embed.0": Built(1, groups, 2 * dim, dim // 2),
            "embed.3": Built(1, groups, dim // 2, k * k * dim // 8, may_have_bias=True),
            "conv1x1.0": Built(1, groups, dim, dim),
            "se.0": Built(1, 1, dim, hidden, may_have_bias=True),
            "se.3": Built(1, 1, hidden, 2 * dim, may_have_bias=True),
        }

    def _compose(self, input: Tensor) -> Tensor:
        """The layer from its submodules and the functions of this package."""
        static = _run(self.key_embed, input)
        dynamic = self.act(self.bn(self._aggregate(input, static)))
        pooled = mean_of_sum(dynamic, static)
        logits = _run(self.se, pooled).reshape(input.shape[0], self.dim, self.radix)
        return context_fusion(dynamic, static, logits)

    def _aggregate(self, input: Tensor, static: Tensor) -> Tensor:
        """Sum the value over windows with the weights that `embed` makes of both maps."""
        embed, values = self._branches
        if not _is_plain_sequence(embed, 5):
            return self._apply_local(_run(values, input), embed(self._concatenate(input, static)))
        join, norm, act, expand, group_norm = embed
        if _is_joint(embed, 5, values, self._groups):
            hidden, finish_value = _join(input, static, embed, values, self._split)
            weight = _run(expand, hidden)
            value = finish_value()
        else:
            weight = _run(expand, act(norm(join(self._concatenate(input, static)))))
            value = _run(values, input)
        if not _is_plain(self.local_conv, LocalConvolution) or not self._is_fusable(
            group_norm, weight
        ):
            return self._apply_local(value, group_norm(weight))
        return self._apply_fused(value, weight, group_norm)

    def _is_fusable(self, norm: nn.Module, weight: Tensor) -> bool:
        """Whether `norm` is the GroupNorm that `group_norm_aggregation` can take over."""
        return (
            _is_plain(norm, nn.GroupNorm)
            and norm.num_groups == self.dim // 8
            and (
                norm.weight is None
                or norm.weight.dtype == weight.dtype
                or _autocast_enabled(weight)
            )
        )

    def _concatenate(self, input: Tensor, static: Tensor) -> Tensor:
        """Both maps as the one that `embed` takes."""
        raise NotImplementedError

    def _split(self, weight: Tensor) -> list[Tensor]:
        """The columns of the weight of `embed[0]` for the input, and those for static."""
        raise NotImplementedError

    def _merge(self, of_input: Tensor, of_static: Tensor) -> Tensor:
        """The weight that has these columns."""
        raise NotImplementedError

    def _apply_local(self, value: Tensor, weight: Tensor) -> Tensor:
        """`local_conv` of the value with normalised weights `[N, dim//8 * k*k, H, W]`."""
        raise NotImplementedError

    def _apply_fused(self, value: Tensor, weight: Tensor, norm: nn.GroupNorm) -> Tensor:
        """The same with weights that `norm` has yet to normalise."""
        aggregated = group_norm_aggregation(
            self._to_shared(value),
            self._per_tap(weight),
            norm.weight,
            norm.bias,
            norm.eps,
            **self.local_conv.window,
        )
        return self._from_shared(aggregated)

    def _per_tap(self, weight: Tensor) -> Tensor:
        """Weights `[N, dim//8 * k*k, H, W]` as the functions take them."""
        return weight.unflatten(1, (1, self.dim // 8, self.kernel_size * self.kernel_size))

    def _to_shared(self, value: Tensor) -> Tensor:
        """The channels of the value in an order in which `c % (dim//8)` is the weight channel."""
        return value

    def _from_shared(self, aggregated: Tensor) -> Tensor:
        """The channels back in their own order."""
        return aggregated

    def extra_repr(self) -> str:
        return f"dim={self.dim}, kernel_size={self.kernel_size}"


class CotLayer(_ContextualLayer):
    """The contextual transformer block of CoTNet; see `reference.CotLayer`.

    Args:
        dim: channels, a multiple of 8.
        kernel_size: odd size of the static context and of the aggregation.

    `forward(input [N, dim, H, W]) -> [N, dim, H, W]`. Neither the concatenation of input and static
    context nor the normalised weights of the aggregation are ever in memory.

    Source: Li et al., Contextual Transformer Networks for Visual Recognition, arXiv:2107.12292, and
    `models/cotnet.py` of JDAI-CV/CoTNet.
    """

    _key_groups = 4
    _groups = 1

    def _concatenate(self, input: Tensor, static: Tensor) -> Tensor:
        return torch.cat((input, static), dim=1)

    def _split(self, weight: Tensor) -> list[Tensor]:
        return [weight[:, : self.dim], weight[:, self.dim :]]

    def _merge(self, of_input: Tensor, of_static: Tensor) -> Tensor:
        return torch.cat((of_input, of_static), dim=1)

    def _apply_local(self, value: Tensor, weight: Tensor) -> Tensor:
        return self.local_conv(value, self._per_tap(weight))


class CoXtLayer(_ContextualLayer):
    """The block of CoTNeXt, `CotLayer` with grouped convolutions; see `reference.CoXtLayer`.

    Args:
        dim: channels, a multiple of 16.
        kernel_size: odd size of the static context and of the aggregation.

    `forward(input [N, dim, H, W]) -> [N, dim, H, W]`.

    `embed` sees input and static context interleaved channel by channel in two groups, which is the
    sum of two grouped convolutions with the even and the odd columns of its weight. The two halves
    of the channels have weights of their own: channel `g*C/2 + q*C/16 + m` uses weight channel
    `g*C/16 + m`.

    Source: `models/cotnet.py` of JDAI-CV/CoTNet.
    """

    _key_groups = 8
    _groups = 2

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, kernel_size)
        self.dw_group = self._groups

    def _concatenate(self, input: Tensor, static: Tensor) -> Tensor:
        return torch.stack((input, static), dim=2).flatten(1, 2)

    def _split(self, weight: Tensor) -> list[Tensor]:
        return [weight[:, 0::2], weight[:, 1::2]]

    def _merge(self, of_input: Tensor, of_static: Tensor) -> Tensor:
        return torch.stack((of_input, of_static), dim=2).flatten(1, 2)

    def _apply_local(self, value: Tensor, weight: Tensor) -> Tensor:
        n, c, h, w = value.shape
        # As in the original: the two halves are two images, each with the weights of its own.
        value = value.reshape(2 * n, c // 2, h, w)
        weight = weight.reshape(2 * n, 1, c // 16, self.kernel_size * self.kernel_size, h, w)
        return self.local_conv(value, weight).reshape(n, c, h, w)

    def _to_shared(self, value: Tensor) -> Tensor:
        return swap_blocks(value, 2, 8)

    def _from_shared(self, aggregated: Tensor) -> Tensor:
        return swap_blocks(aggregated, 8, 2)
