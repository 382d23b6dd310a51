"""optimize_for_inference: the layers, and layers that are not what they seem."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch._inductor.config
from layers import LAYERS, assert_no_worse, both_layouts, build, every_kind, every_layer, make_input
from optimised import CL, assert_same
from torch import nn

from cotnet_ext import modules, optimize_for_inference, reference
from cotnet_ext.inference.layers import FusedContextualLayer, FusedCoTAttention


@every_layer
@both_layouts
@pytest.mark.parametrize("package", [modules, reference], ids=["modules", "reference"])
def test_a_layer_gives_the_same_numbers(package, name, layout, device):
    layer = build(package, name).eval().to(device)
    fast = optimize_for_inference(layer)
    assert type(fast) in (FusedContextualLayer, FusedCoTAttention)
    x = make_input(name).to(device, memory_format=layout)
    assert_same(layer, fast, x)
    with torch.no_grad():
        assert fast(x).is_contiguous(memory_format=CL)


@pytest.mark.parametrize("narrow", [0, 1 << 20], ids=["copies", "convolutions"])
@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("coxt")])
def test_both_ways_to_order_the_channels(name, narrow, monkeypatch, device):
    monkeypatch.setattr("cotnet_ext.inference.layers.NARROW", narrow)
    layer = build(reference, name).eval().to(device)
    fast = optimize_for_inference(layer)
    assert (fast.order_back is None) == (narrow == 0 or device.type == "cuda")
    assert_same(layer, fast, make_input(name).to(device))


@every_kind
def test_contiguous_maps_stay_contiguous(name):
    layer = build(reference, name).eval()
    fast = optimize_for_inference(layer, memory_format=torch.contiguous_format)
    x = make_input(name)
    assert_same(layer, fast, x)
    with torch.no_grad():
        assert fast(x).is_contiguous()


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_layer_in_a_narrow_dtype(name, dtype, device):
    """No further from the truth than the reference in the same dtype, on packed weights too."""
    layer = build(reference, name, torch.float32).eval().to(device)
    x = make_input(name, dtype).to(device)
    fast = optimize_for_inference(layer, dtype)
    with torch.no_grad():
        truth = copy.deepcopy(layer).double()(x.double())
        same = layer.to(dtype)(x)
        assert_no_worse({"output": fast(x)}, {"output": truth}, {"output": same})


@every_kind
def test_gradients_of_the_input_are_there(name):
    layer = build(reference, name).eval()
    fast = optimize_for_inference(layer)
    grads = []
    for module in (layer, fast):
        x = make_input(name).requires_grad_()
        module(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@every_kind
def test_a_layer_under_autocast(name):
    layer = build(reference, name, torch.float32).eval()
    fast, x = optimize_for_inference(layer), make_input(name, torch.float32)
    with torch.no_grad():
        truth = copy.deepcopy(layer).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            got, same = fast(x), layer(x)
    assert_no_worse({"output": got.to(same.dtype)}, {"output": truth}, {"output": same})


def break_hook(layer: nn.Module) -> None:
    layer.key_embed[1].register_forward_hook(lambda module, args, output: output * 2)


def break_own_hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, output: output + 1)


def break_parametrization(layer: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(layer.key_embed[0])


def break_norm(layer: nn.Module) -> None:
    width = layer.key_embed[1].num_features
    layer.key_embed[1] = nn.GroupNorm(2, width, dtype=torch.float64)


def break_statistics(layer: nn.Module) -> None:
    width = layer.key_embed[1].num_features
    layer.key_embed[1] = nn.BatchNorm2d(width, track_running_stats=False, dtype=torch.float64)


def break_activation(layer: nn.Module) -> None:
    layer.key_embed[2] = nn.GELU()


def break_length(layer: nn.Module) -> None:
    layer.key_embed.append(nn.Tanh())


def break_padding(layer: nn.Module) -> None:
    layer.key_embed[0].padding_mode = "reflect"


def break_forward(layer: nn.Module) -> None:
    layer.forward = lambda input: input + 1


CHANGES = {name: f for name, f in globals().items() if name.startswith("break_")}


@every_kind
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_layer_that_was_changed_is_not_fused(name, change, caplog):
    layer = build(modules, name)
    change(layer)
    layer.eval()
    with caplog.at_level(logging.DEBUG, "cotnet_ext.inference"):
        fast = optimize_for_inference(layer)
    assert type(fast) is type(layer)
    assert f"left {type(layer).__name__}" in caplog.text
    assert_same(layer, fast, make_input(name))


@pytest.mark.parametrize(
    "path, part",
    [
        ("local_conv", modules.LocalConvolution(16, 16, 3, padding=1, pad_mode=1)),
        ("embed.4", nn.GroupNorm(1, 18, dtype=torch.float64)),
        ("act", nn.Tanh()),
        ("bn", nn.Identity()),
        ("embed.3", nn.Conv2d(8, 18, 3, padding=1, dtype=torch.float64)),
    ],
)
def test_a_part_of_a_cot_layer_that_was_replaced_is_called(path, part):
    layer = build(modules, "cot").eval()
    layer.set_submodule(path, part)
    fast = optimize_for_inference(layer)
    assert type(fast) is modules.CotLayer
    assert_same(layer, fast, make_input("cot"))
