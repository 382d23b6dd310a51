"""The layers of the specification: names and shapes as published, and numbers by hand."""

from __future__ import annotations

import pytest
import torch
from cases import randn
from tolerances import exact
from torch.nn import functional as F

from cotnet_ext import reference

# The layers as they stand in the published checkpoints: `layer1.0.conv2.*` of cotnet50 (64
# channels) and of cotnext50_2x48d (96 channels), in the order of the file.
COT_LAYER = """
key_embed.0.weight 64 16 3 3
key_embed.1.weight 64
key_embed.1.bias 64
key_embed.1.running_mean 64
key_embed.1.running_var 64
key_embed.1.num_batches_tracked
embed.0.weight 32 128 1 1
embed.1.weight 32
embed.1.bias 32
embed.1.running_mean 32
embed.1.running_var 32
embed.1.num_batches_tracked
embed.3.weight 72 32 1 1
embed.3.bias 72
embed.4.weight 72
embed.4.bias 72
conv1x1.0.weight 64 64 1 1
conv1x1.1.weight 64
conv1x1.1.bias 64
conv1x1.1.running_mean 64
conv1x1.1.running_var 64
conv1x1.1.num_batches_tracked
bn.weight 64
bn.bias 64
bn.running_mean 64
bn.running_var 64
bn.num_batches_tracked
se.0.weight 32 64 1 1
se.0.bias 32
se.1.weight 32
se.1.bias 32
se.1.running_mean 32
se.1.running_var 32
se.1.num_batches_tracked
se.3.weight 128 32 1 1
se.3.bias 128
"""
COXT_LAYER = """
key_embed.0.weight 96 12 3 3
key_embed.1.weight 96
key_embed.1.bias 96
key_embed.1.running_mean 96
key_embed.1.running_var 96
key_embed.1.num_batches_tracked
embed.0.weight 48 96 1 1
embed.1.weight 48
embed.1.bias 48
embed.1.running_mean 48
embed.1.running_var 48
embed.1.num_batches_tracked
embed.3.weight 108 24 1 1
embed.3.bias 108
embed.4.weight 108
embed.4.bias 108
conv1x1.0.weight 96 48 1 1
conv1x1.1.weight 96
conv1x1.1.bias 96
conv1x1.1.running_mean 96
conv1x1.1.running_var 96
conv1x1.1.num_batches_tracked
bn.weight 96
bn.bias 96
bn.running_mean 96
bn.running_var 96
bn.num_batches_tracked
se.0.weight 48 96 1 1
se.0.bias 48
se.1.weight 48
se.1.bias 48
se.1.running_mean 48
se.1.running_var 48
se.1.num_batches_tracked
se.3.weight 192 48 1 1
se.3.bias 192
"""
COT_ATTENTION = """
key_embed.0.weight 16 4 5 5
key_embed.1.weight 16
key_embed.1.bias 16
key_embed.1.running_mean 16
key_embed.1.running_var 16
key_embed.1.num_batches_tracked
value_embed.0.weight 16 16 1 1
value_embed.1.weight 16
value_embed.1.bias 16
value_embed.1.running_mean 16
value_embed.1.running_var 16
value_embed.1.num_batches_tracked
attention_embed.0.weight 8 32 1 1
attention_embed.1.weight 8
attention_embed.1.bias 8
attention_embed.1.running_mean 8
attention_embed.1.running_var 8
attention_embed.1.num_batches_tracked
attention_embed.3.weight 400 8 1 1
attention_embed.3.bias 400
"""


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        pytest.param(reference.CotLayer(64, 3), COT_LAYER, id="CotLayer"),
        pytest.param(reference.CoXtLayer(96, 3), COXT_LAYER, id="CoXtLayer"),
        pytest.param(reference.CoTAttention(16, 5), COT_ATTENTION, id="CoTAttention"),
    ],
)
def test_state_dict_of_the_published_layers(layer, expected):
    lines = [" ".join([key, *map(str, t.shape)]) for key, t in layer.state_dict().items()]
    assert lines == expected.split("\n")[1:-1]


def randomised(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer in float64 evaluation, with no norm left at its trivial start."""
    layer = layer.double().eval()
    for name, t in [*layer.named_parameters(), *layer.named_buffers()]:
        if t.is_floating_point() and t.dim() == 1:
            values = randn(*t.shape, key=name) / 2
            t.data.copy_(values.square() + 0.5 if "var" in name else values)
    return layer


def normalise(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """A BatchNorm in evaluation, by its formula."""
    mean, variance, gamma, beta = (
        state[f"{name}.{part}"].view(-1, 1, 1)
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * gamma + beta


def pointwise(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """A 1x1 convolution without groups, by its formula."""
    y = torch.einsum("oc,nchw->nohw", state[f"{name}.weight"][:, :, 0, 0], x)
    bias = state.get(f"{name}.bias")
    return y if bias is None else y + bias.view(-1, 1, 1)


def squeezed(state: dict[str, torch.Tensor], dynamic: torch.Tensor, static: torch.Tensor):
    """The end of both official layers: pooling, `se`, and the choice between the contexts."""
    pooled = (dynamic + static).mean((2, 3), keepdim=True)
    hidden = normalise(state, "se.1", pointwise(state, "se.0", pooled)).relu()
    logits = pointwise(state, "se.3", hidden).flatten(1)
    p = torch.sigmoid(logits[:, 0::2] - logits[:, 1::2])[..., None, None]
    return p * dynamic + (1 - p) * static


def test_cot_attention_by_hand():
    layer = randomised(reference.CoTAttention(8, 5))
    state, x = layer.state_dict(), randn(2, 8, 6, 7)
    key = F.conv2d(x, state["key_embed.0.weight"], padding=2, groups=4)
    static = normalise(state, "key_embed.1", key).relu()
    value = normalise(state, "value_embed.1", pointwise(state, "value_embed.0", x))
    both = torch.cat([static, x], 1)  # the static context first
    hidden = pointwise(state, "attention_embed.0", both)
    hidden = normalise(state, "attention_embed.1", hidden).relu()
    logits = pointwise(state, "attention_embed.3", hidden)
    logits = torch.stack([logits[:, 25 * c : 25 * c + 25].sum(1) / 25 for c in range(8)], 1)
    p = logits.exp() / logits.exp().sum((2, 3), keepdim=True)
    exact(layer(x), static + p * value)


def test_cot_layer_by_hand():
    layer = randomised(reference.CotLayer(16, 3))
    state, x = layer.state_dict(), randn(2, 16, 5, 6)
    key = F.conv2d(x, state["key_embed.0.weight"], padding=1, groups=4)
    static = normalise(state, "key_embed.1", key).relu()
    hidden = pointwise(state, "embed.0", torch.cat([x, static], 1))  # the input first
    hidden = normalise(state, "embed.1", hidden).relu()
    weight = pointwise(state, "embed.3", hidden)
    weight = F.group_norm(weight, 2, state["embed.4.weight"], state["embed.4.bias"])
    value = normalise(state, "conv1x1.1", pointwise(state, "conv1x1.0", x))
    windows = F.unfold(value, 3, padding=1).view(2, 16, 9, 5, 6)
    taps = weight.view(2, 2, 9, 5, 6)
    dynamic = torch.stack([(windows[:, c] * taps[:, c % 2]).sum(1) for c in range(16)], 1)
    dynamic = normalise(state, "bn", dynamic)
    exact(layer(x), squeezed(state, dynamic * torch.sigmoid(dynamic), static))


def test_coxt_layer_by_hand():
    layer = randomised(reference.CoXtLayer(32, 3))
    state, x = layer.state_dict(), randn(2, 32, 5, 6)

    def grouped(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), groups=2)

    key = F.conv2d(x, state["key_embed.0.weight"], padding=1, groups=8)
    static = normalise(state, "key_embed.1", key).relu()
    both = torch.stack([m[:, c] for c in range(32) for m in (x, static)], 1)  # x0 k0 x1 k1 ...
    hidden = normalise(state, "embed.1", grouped("embed.0", both)).relu()
    weight = grouped("embed.3", hidden)
    weight = F.group_norm(weight, 4, state["embed.4.weight"], state["embed.4.bias"])
    value = normalise(state, "conv1x1.1", grouped("conv1x1.0", x))
    windows = F.unfold(value, 3, padding=1).view(2, 32, 9, 5, 6)
    # Channels 0..15 use weight channels 0, 1; channels 16..31 use 2, 3; interleaved in each half.
    taps = weight.view(2, 4, 9, 5, 6)
    chosen = [c // 16 * 2 + c % 2 for c in range(32)]
    dynamic = torch.stack([(windows[:, c] * taps[:, m]).sum(1) for c, m in enumerate(chosen)], 1)
    dynamic = normalise(state, "bn", dynamic)
    exact(layer(x), squeezed(state, dynamic * torch.sigmoid(dynamic), static))
