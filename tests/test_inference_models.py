"""optimize_for_inference: what is done to the modules of a model, and what is left as it is."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch._inductor.config
from layers import assert_no_worse
from optimised import CL, Residual, assert_same, calibrate, count
from torch import nn
from torch.nn import functional as F

import cotnet_ext
from cotnet_ext import modules, optimize_for_inference
from cotnet_ext.inference.convolution import FusedConv2d, FusedLinear
from cotnet_ext.models.blocks import BlurPool, Bottleneck, DropPath, SplitAttention


class Functions(Residual):
    """The same with functions and methods."""

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = torch.add(x, self.bn3(self.conv3(self.conv2(y))))
        return y.relu_()


class Linear(Residual):
    """Nothing after the sum."""

    def forward(self, x):
        return x + self.bn3(self.conv3(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


@pytest.mark.parametrize("kind", [Residual, Functions, Linear])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_residual_block_is_three_calls(kind, dtype):
    x = torch.randn(4, 16, 9, 7)
    model = calibrate(nn.Sequential(kind(), kind()), x).to(dtype)
    fast = optimize_for_inference(model)
    blocks = list(fast)
    for block in blocks:
        assert isinstance(block, torch.fx.GraphModule) and block.stride == 1
        called = [node.op for node in block.graph.nodes]
        assert called == ["placeholder", *["call_module"] * 3, "output"]
    before = x.clone()
    if dtype == torch.float64:
        assert_same(model, fast, x.double())
    else:
        with torch.no_grad():
            truth = copy.deepcopy(model).double()(x.double())
            assert_no_worse({"output": fast(x)}, {"output": truth}, {"output": model(x)})
    assert torch.equal(x, before)  # the sum did not write to the input


class WritesToAMap(Residual):
    """Somebody looks at what was written to."""

    def forward(self, x):
        y = x * 2
        kept = y[:, :2]
        y += self.bn3(self.conv3(x))
        y *= 3
        return kept - y.sum()


class WritesToAConvolution(Residual):
    """The sum is wanted under its old name."""

    def forward(self, x):
        y = self.conv2(x)
        z = y
        y += self.bn3(self.conv3(x))
        return y * z


class WritesBefore(Residual):
    """The input of the convolution is another one when the sum is taken."""

    def forward(self, x):
        y = self.conv2(x)
        z = self.bn3(self.conv3(y))
        y.mul_(2)
        return z + x


@pytest.mark.parametrize("kind", [WritesToAMap, WritesToAConvolution, WritesBefore])
def test_what_is_written_in_place_stays_in_its_place(kind):
    x = torch.randn(4, 16, 9, 7)
    model = calibrate(nn.Sequential(kind()), x).double()
    fast = optimize_for_inference(model)
    assert type(fast[0]) is kind
    assert_same(model, fast, x.double())


def test_the_sum_with_a_fresh_shortcut_is_written_to_it():
    model = nn.Sequential(
        Bottleneck(
            8, 4, 16, lambda: modules.CotLayer(16, 3), None, None,
            nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)), 0.1,
        )
    )  # fmt: skip
    x = torch.randn(4, 8, 6, 6)
    fast = optimize_for_inference(calibrate(model, x).double())
    assert_same(model, fast, x.double())
    (call,) = [n for n in fast[0].graph.nodes if n.op == "call_module" and len(n.args) > 1]
    assert call.args[2] is True
    small = optimize_for_inference(model.float())
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)


class Chains(nn.Module):
    """Norms and activations behind convolutions, across a sequence and of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.SiLU()
        self.split = SplitAttention(8, 1, 1)
        self.depthwise = nn.Conv2d(8, 16, 3, 2, 1, 1, groups=8)
        self.norm = nn.SyncBatchNorm(16)
        self.pool = BlurPool(16)
        self.reflect = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(16, 16, 3, padding="same")
        self.head = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU())

    def forward(self, x):
        x = self.split(self.act(self.bn(self.stem(x))))
        x = self.pool(self.norm(self.depthwise(x)))
        return self.head(self.same(self.reflect(x)).mean((2, 3)))


@pytest.mark.parametrize("memory_format", [None, torch.contiguous_format], ids=["best", "nchw"])
def test_norms_and_activations_go_into_convolutions(memory_format):
    x = torch.randn(4, 3, 37, 29)
    model = Chains()
    model.norm = nn.BatchNorm2d(16)  # only evaluation of the other one works on a CPU
    calibrate(model, x)
    norm = nn.SyncBatchNorm(16)
    norm.load_state_dict(model.norm.state_dict())
    fast_model = copy.deepcopy(model)
    fast_model.norm = norm
    fast = optimize_for_inference(fast_model.double(), memory_format=memory_format)
    assert type(fast) is Chains
    assert count(fast, nn.BatchNorm2d, nn.SyncBatchNorm, nn.SiLU) == 0
    assert count(fast, FusedConv2d) == 6 and count(fast, FusedLinear) == 1
    assert count(fast, nn.Conv2d) == 2  # those that pad otherwise
    assert fast.stem[0].activation == "relu" and fast.stem[2].activation == "silu"
    assert_same(model.double(), fast, x.double())


def test_a_linear_layer_before_a_norm_takes_more_dimensions():
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    calibrate(model, torch.randn(64, 5))
    fast = optimize_for_inference(model.double())
    assert type(fast[0]) is FusedLinear and type(fast[1]) is nn.Identity
    assert_same(model, fast, torch.randn(3, 5, dtype=torch.float64))
    assert_same(model, fast, torch.randn(3, 7, 5, dtype=torch.float64))


class Twice(nn.Module):
    """A convolution whose result two modules see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return y + self.bn(y)


class Called(Twice):
    """A convolution that is called twice."""

    def forward(self, x):
        return self.bn(self.conv(self.conv(x)))


class Optional(Twice):
    """Another way without the second argument."""

    def forward(self, x, scale=None):
        return self.bn(self.conv(x)) if scale is None else self.conv(x) * scale


class Asks(Twice):
    """Another way for lists."""

    def forward(self, x):
        return self._own(x)

    def _own(self, x):
        if isinstance(x, list):
            return self.conv(x[0])
        return self.bn(self.conv(x))


class Values(Twice):
    """Another way for large values."""

    def forward(self, x):
        return self.bn(self.conv(x)) if x.max() > 100 else self.conv(x)


class Stores(Twice):
    """What it stores would be lost."""

    def forward(self, x):
        y = self.conv(x)
        self.seen = y.detach()
        return self.bn(y)


class Own(Twice):
    """A tensor of its own."""

    def forward(self, x):
        return self.bn(self.conv(x)) + torch.linspace(0, 1, 5, dtype=torch.float64)


class Hook(Twice):
    """Somebody listens between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x):
        return self.bn(self.conv(x))


class Shared(nn.Module):
    """One convolution under two names, each before a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(4, 4, 1)
        self.first = nn.Sequential(conv, nn.BatchNorm2d(4))
        self.second = nn.Sequential(conv, nn.BatchNorm2d(4))

    def forward(self, x):
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("kind", [Twice, Called, Optional, Asks, Values, Stores, Own, Hook, Shared])
def test_what_is_not_certain_is_left(kind, caplog):
    x = torch.randn(4, 4, 6, 5)
    model = calibrate(kind(), x).double()
    with caplog.at_level(logging.DEBUG, "cotnet_ext.inference"):
        fast = optimize_for_inference(model)
    assert type(fast) is kind
    assert count(fast, nn.BatchNorm2d) == count(model, nn.BatchNorm2d)
    assert_same(model, fast, x.double())
    if kind is Optional:
        assert_same(model, fast, x.double(), torch.tensor(3.0, dtype=torch.float64))
    if kind is Asks:
        assert_same(model, fast, [x.double()])
    reasons = {
        Optional: "arguments may be left out",
        Asks: "asks for the types",
        Values: "TraceError",
        Stores: "stores something",
        Own: "tensors of its own",
    }
    assert reasons.get(kind, "") in caplog.text


def test_norms_in_training_mode_before_are_those_of_evaluation():
    x = torch.randn(4, 16, 6, 6)
    model = calibrate(Residual(), x).double()
    expected = model(x.double())
    fast = optimize_for_inference(model.train())
    torch.testing.assert_close(fast(x.double()), expected, rtol=1e-9, atol=1e-9)
    assert model.training and model.bn1.training and not fast.training


def test_the_model_is_not_changed():
    x = torch.randn(4, 16, 6, 6)
    model = calibrate(nn.Sequential(Residual()), x)
    state, names = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    optimize_for_inference(model, torch.bfloat16)
    assert dict(model.named_modules()) == names
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]) and value.dtype == state[key].dtype, key
    assert all(p.requires_grad for p in model.parameters())


def test_random_numbers_are_not_drawn():
    model = nn.Sequential(Residual())
    before = torch.get_rng_state()
    optimize_for_inference(model)
    assert torch.equal(before, torch.get_rng_state())


def test_networks_of_this_package():
    for name in ("cotnext50_2x48d", "se_cotnetd_50"):
        model = cotnet_ext.models.create_model(name, num_classes=5).double()
        calibrate(model, torch.randn(3, 3, 32, 32, dtype=torch.float64))
        fast = optimize_for_inference(model)
        assert count(fast, nn.BatchNorm2d, Bottleneck, DropPath) == 0
        assert count(fast, nn.ReLU, nn.SiLU) == 0
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        assert_same(model, fast, x)
        assert fast.num_features == 2048 and fast.variant is not None
        with torch.no_grad():
            torch.testing.assert_close(
                fast.forward_head(fast.forward_features(x)), model(x), rtol=1e-9, atol=1e-9
            )


def test_a_backbone_and_its_reference():
    model = cotnet_ext.models.create_model(
        "cotnet50", features_only=True, out_indices=(0, 1, 2, 3), reference=True
    )
    calibrate(model, torch.randn(3, 3, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    fast = optimize_for_inference(model)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        for got, same, exact in zip(fast(x), model(x), truth, strict=True):
            assert_no_worse({"map": got}, {"map": exact}, {"map": same})


class Views(Twice):
    """Asks for a view that only contiguous maps have."""

    def forward(self, x):
        return self._flat(self.bn(self.conv(x)))

    def _flat(self, y):
        return y.view(y.shape[0], 2, -1).sum(2)


def test_maps_that_are_viewed_stay_contiguous(caplog):
    x = torch.randn(4, 4, 6, 5)
    model = calibrate(nn.Sequential(Views()), x).double()
    with caplog.at_level(logging.DEBUG, "cotnet_ext.inference"):
        fast = optimize_for_inference(model)
    assert "maps stay contiguous: Views uses view" in caplog.text
    assert_same(model, fast, x.double())
    with torch.no_grad(), pytest.raises(RuntimeError, match="view"):
        optimize_for_inference(model, memory_format=CL)(x.double())
