"""optimize_for_inference: convolutions on weights that are packed once."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._inductor.config
from optimised import CL, count, small_network
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cotnet_ext import optimize_for_inference
from cotnet_ext.inference import convolution
from cotnet_ext.inference.convolution import FusedConv2d


def packed_calls(function) -> list[str]:
    """Names of the operators of oneDNN that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        function()
    names = (event.name for event in record.events())
    return [name for name in names if name.startswith("mkldnn::_convolution_pointwise")]


needs_packed = pytest.mark.skipif(
    not convolution._supports(torch.float32), reason="this PyTorch has no oneDNN for this processor"
)


def conv_of(*arguments, activation=None, **options) -> tuple[nn.Conv2d, FusedConv2d]:
    conv = nn.Conv2d(*arguments, **options).requires_grad_(False)
    return conv, FusedConv2d(conv, conv.weight, conv.bias, activation)


GEOMETRIES = {
    "1x1": ((8, 12, 1), {}),
    "strided 1x1": ((8, 12, 1, (2, 3)), {"bias": False}),
    "padded 1x1": ((8, 12, 1, 2, 1), {}),
    "3x3 in groups": ((8, 12, 3, 1, 1), {"groups": 4}),
    "dilated 5x3": ((8, 12, (5, 3), 2, (4, 1), (2, 1)), {}),
}


@needs_packed
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("total", [None, "new", "in place", "broadcast"])
def test_a_packed_convolution(geometry, activation, total):
    conv, fused = conv_of(*geometry[0], activation=activation, **geometry[1])
    x = torch.randn(3, 8, 11, 10)
    expected = F.conv2d(
        x.double(), conv.weight.double(), None if conv.bias is None else conv.bias.double(),
        conv.stride, conv.padding, conv.dilation, conv.groups,
    )  # fmt: skip
    other = None if total is None else torch.randn(expected.shape)
    if total == "broadcast":
        other = other[:, :, :1, :1]
    if other is not None:
        expected = expected + other.double()
    if activation is not None:
        expected = getattr(F, activation)(expected)
    got = fused(x, None if other is None else other.clone(), total == "in place")
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    names = packed_calls(lambda: fused(x))
    assert names == ["mkldnn::_convolution_pointwise"]
    if total == "in place" and activation != "silu":
        target = other.clone(memory_format=CL)
        assert fused(x, target, True).data_ptr() == target.data_ptr()


@needs_packed
def test_weights_are_packed_again_when_they_or_the_maps_change():
    conv, fused = conv_of(8, 8, 3)
    for size in (9, 9, 12, 9):
        x = torch.randn(2, 8, size, size)
        torch.testing.assert_close(fused(x), conv(x), rtol=1e-5, atol=1e-5)
    packed = fused._packed
    fused(x)
    assert fused._packed is packed
    fused.weight.mul_(2)
    torch.testing.assert_close(
        fused(x), 2 * conv(x) - conv.bias.view(-1, 1, 1), rtol=1e-5, atol=1e-5
    )
    assert copy.deepcopy(fused)._packed is None
    assert fused.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@needs_packed
def test_whoever_watches_or_transforms_sees_ordinary_operators(monkeypatch):
    conv, fused = conv_of(4, 4, 1, activation="relu")
    x = torch.randn(2, 4, 5, 5)
    expected = F.relu(conv(x))

    def check(function) -> None:
        names = packed_calls(lambda: torch.testing.assert_close(function(), expected))
        assert names == []

    assert packed_calls(lambda: fused(x)) != []
    check(lambda: fused(x.clone().requires_grad_()).detach())
    check(lambda: torch.func.vmap(fused)(x[None])[0])
    check(lambda: torch.func.jvp(fused, (x,), (x,))[0])
    torch._C._set_mkldnn_enabled(False)
    try:
        check(lambda: fused(x))
    finally:
        torch._C._set_mkldnn_enabled(True)
    with FlopCounterMode(display=False) as counter:
        fused(x)
    assert counter.get_total_flops() == 2 * 2 * 25 * 16
    monkeypatch.setattr(convolution, "_supports", lambda dtype: False)
    check(lambda: fused(x))
    assert fused(x[:0]).shape == (0, 4, 5, 5)


@needs_packed
def test_networks_run_on_packed_weights():
    model, x = small_network()
    fast = optimize_for_inference(model)
    with torch.no_grad():
        fast(x)
        names = packed_calls(lambda: fast(x))
    assert len(names) == count(fast, FusedConv2d)
    assert "mkldnn::_convolution_pointwise_" in names  # hidden maps are summed where they lie


def test_inference_mode():
    model, x = small_network()
    with torch.inference_mode():
        fast = optimize_for_inference(model)
        expected = fast(x)
    with torch.no_grad():
        assert torch.equal(fast(x), expected)
