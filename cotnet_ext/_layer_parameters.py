"""What a contextual layer (`CotLayer`, `CoXtLayer`) learns, as one tuple."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Parameters(NamedTuple):
    """What a layer learns, in the order of its `state_dict`; None where a norm has none."""

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


PATHS = (
    "key_embed.0.weight", "key_embed.1.weight", "key_embed.1.bias",
    "embed.0.weight", "embed.1.weight", "embed.1.bias",
    "embed.3.weight", "embed.3.bias", "embed.4.weight", "embed.4.bias",
    "conv1x1.0.weight", "conv1x1.1.weight", "conv1x1.1.bias",
    "bn.weight", "bn.bias",
    "se.0.weight", "se.0.bias", "se.1.weight", "se.1.bias", "se.3.weight", "se.3.bias",
)  # fmt: skip
SELECTION = slice(Parameters._fields.index("squeeze"), None)  # the parameters of `se`
OF_BATCH_NORMS = frozenset(
    f"{norm}{part}"
    for norm in ("key_", "hidden_", "value_", "select_", "")
    for part in ("weight", "bias")
)


def parameters_of(layer: nn.Module) -> Parameters:
    key, key_norm, _ = layer.key_embed
    join, hidden_norm, _, expand, group_norm = layer.embed
    value, value_norm = layer.conv1x1
    squeeze, select_norm, _, excite = layer.se
    return Parameters(
        key.weight, key_norm.weight, key_norm.bias,
        join.weight, hidden_norm.weight, hidden_norm.bias,
        expand.weight, expand.bias, group_norm.weight, group_norm.bias,
        value.weight, value_norm.weight, value_norm.bias,
        layer.bn.weight, layer.bn.bias,
        squeeze.weight, squeeze.bias, select_norm.weight, select_norm.bias,
        excite.weight, excite.bias,
    )  # fmt: skip
