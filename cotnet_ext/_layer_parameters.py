"""What a layer learns, as one tuple. What is alike in all layers has one name:

    key = key_embed[0]         join = first convolution of input and static context
    value = of the input       expand = what makes the logits, or the weights of the aggregation

`NAME_weight` and `NAME_bias` belong to the norm behind the convolution.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Contextual(NamedTuple):
    """Of `CotLayer` and `CoXtLayer`, in the order of `CONTEXTUAL`; None where a norm has none."""

    key: Tensor
    key_weight: Tensor | None
    key_bias: Tensor | None
    join: Tensor
    hidden_weight: Tensor | None
    hidden_bias: Tensor | None
    expand: Tensor
    expand_bias: Tensor | None
    group_weight: Tensor | None
    group_bias: Tensor | None
    value: Tensor
    value_weight: Tensor | None
    value_bias: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    squeeze: Tensor
    squeeze_bias: Tensor | None
    select_weight: Tensor | None
    select_bias: Tensor | None
    excite: Tensor
    excite_bias: Tensor | None


CONTEXTUAL = (
    "key_embed.0.weight", "key_embed.1.weight", "key_embed.1.bias",
    "embed.0.weight", "embed.1.weight", "embed.1.bias",
    "embed.3.weight", "embed.3.bias", "embed.4.weight", "embed.4.bias",
    "conv1x1.0.weight", "conv1x1.1.weight", "conv1x1.1.bias",
    "bn.weight", "bn.bias",
    "se.0.weight", "se.0.bias", "se.1.weight", "se.1.bias", "se.3.weight", "se.3.bias",
)  # fmt: skip
SELECTION = slice(Contextual._fields.index("squeeze"), None)  # the parameters of `se`
OF_BATCH_NORMS = frozenset(
    f"{norm}{part}"
    for norm in ("key_", "hidden_", "value_", "select_", "")
    for part in ("weight", "bias")
)


class Attention(NamedTuple):
    """Of `CoTAttention`, in the order of `ATTENTION`."""

    key: Tensor
    key_weight: Tensor | None
    key_bias: Tensor | None
    join: Tensor
    hidden_weight: Tensor | None
    hidden_bias: Tensor | None
    expand: Tensor
    expand_bias: Tensor | None
    value: Tensor
    value_weight: Tensor | None
    value_bias: Tensor | None


ATTENTION = (
    "key_embed.0.weight", "key_embed.1.weight", "key_embed.1.bias",
    "attention_embed.0.weight", "attention_embed.1.weight", "attention_embed.1.bias",
    "attention_embed.3.weight", "attention_embed.3.bias",
    "value_embed.0.weight", "value_embed.1.weight", "value_embed.1.bias",
)  # fmt: skip

Parameters = Contextual | Attention


def contextual(layer: nn.Module) -> Contextual:
    key, key_norm, _ = layer.key_embed
    join, hidden_norm, _, expand, group_norm = layer.embed
    value, value_norm = layer.conv1x1
    squeeze, select_norm, _, excite = layer.se
    return Contextual(
        key.weight, key_norm.weight, key_norm.bias,
        join.weight, hidden_norm.weight, hidden_norm.bias,
        expand.weight, expand.bias, group_norm.weight, group_norm.bias,
        value.weight, value_norm.weight, value_norm.bias,
        layer.bn.weight, layer.bn.bias,
        squeeze.weight, squeeze.bias, select_norm.weight, select_norm.bias,
        excite.weight, excite.bias,
    )  # fmt: skip


def attention(layer: nn.Module) -> Attention:
    key, key_norm, _ = layer.key_embed
    join, hidden_norm, _, expand = layer.attention_embed
    value, value_norm = layer.value_embed
    return Attention(
        key.weight, key_norm.weight, key_norm.bias,
        join.weight, hidden_norm.weight, hidden_norm.bias,
        expand.weight, expand.bias,
        value.weight, value_norm.weight, value_norm.bias,
    )  # fmt: skip
