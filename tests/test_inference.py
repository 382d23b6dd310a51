"""optimize_for_inference: the same results from an eval-only copy, whatever stands in the model."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
import torch._inductor.config
from documents import ROOT, broken_links, run_document
from layers import LAYERS, assert_no_worse, both_layouts, build, every_kind, every_layer, make_input
from torch import Tensor, nn
from torch.nn import functional as F

import cotnet_ext
from cotnet_ext import modules, optimize_for_inference, reference
from cotnet_ext.inference import convolution
from cotnet_ext.inference.convolution import FusedConv2d, FusedLinear
from cotnet_ext.inference.layers import FusedContextualLayer, FusedCoTAttention
from cotnet_ext.models.blocks import BlurPool, Bottleneck, DropPath, SplitAttention

CL = torch.channels_last


def calibrate(model: nn.Module, images: Tensor) -> nn.Module:
    """Norms that are not the identity they start as, with the statistics of some images."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if value.dim() == 1:
            noise = torch.rand(value.shape, generator=generator).to(value) - 0.5
            value.data.copy_(noise + name.endswith("weight"))
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = None
    model.train()
    model(images)
    return model.eval()


@torch.no_grad()
def assert_same(model: nn.Module, fast: nn.Module, *inputs: Tensor) -> None:
    """Equal up to float64 rounding."""
    torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=1e-9, atol=1e-9)


def count(model: nn.Module, *kinds: type[nn.Module]) -> int:
    return sum(type(module) in kinds for module in model.modules())


# ---- layers --------------------------------------------------------------------------------------


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


# ---- what is done to models ----------------------------------------------------------------------


class Residual(nn.Module):
    """As in torchvision: one ReLU for all places."""

    def __init__(self, channels: int = 16, conv: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.stride = 1
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = modules.CotLayer(channels, 3)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.drop_path = DropPath(0.3)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.drop_path(self.bn3(self.conv3(self.conv2(y))))
        y += x
        return self.relu(y)


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


# ---- a copy for evaluation only ------------------------------------------------------------------


def test_it_cannot_be_trained():
    fast = optimize_for_inference(Residual())
    with pytest.raises(RuntimeError, match="train the model that it was made from"):
        fast.train()
    assert not any(module.training for module in fast.modules())
    assert fast.eval() is fast and fast.train(False) is fast
    assert not any(p.requires_grad for p in fast.parameters())
    twin = copy.deepcopy(fast)
    assert twin.eval() is twin


def small_network() -> tuple[nn.Module, Tensor]:
    x = torch.randn(4, 3, 12, 12)
    stem = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()
    network = nn.Sequential(*stem, Residual(), modules.CoXtLayer(16, 3))
    return calibrate(network, x), x


@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
def test_copies_and_files(called):
    model, x = small_network()
    fast = optimize_for_inference(model)
    with torch.no_grad():
        expected = optimize_for_inference(model)(x)
        if called:
            fast(x)
        assert torch.equal(copy.deepcopy(fast)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(fast))(x), expected)
        file = io.BytesIO()
        torch.save(fast, file)
        size = sum(p.nbytes for p in fast.parameters())
        assert file.tell() < 2 * size + (1 << 18)  # no packed weights in it
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(loaded(x), expected)
        with pytest.raises(RuntimeError, match="cannot be trained"):
            loaded.train()
        # Fused once more: nothing is left to do, and nothing is done.
        assert torch.equal(optimize_for_inference(fast)(x), expected)


def test_a_fused_state_dict_loads():
    model, x = small_network()
    fast = optimize_for_inference(model)
    with torch.no_grad():
        expected = fast(x)
        other = optimize_for_inference(small_network()[0])
        for value in other.parameters():
            value.mul_(0.5)
        assert not torch.equal(other(x), expected)
        other.load_state_dict(fast.state_dict())
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_arguments_are_cast(dtype):
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, images: list[Tensor], *, extra: dict[str, Tensor], flag: bool) -> list:
            assert flag and extra["count"].dtype == torch.int64
            return [self.conv(image[None]) + extra["bias"] for image in images]

    fast = optimize_for_inference(Detector(), dtype)
    images = [torch.randn(3, 5, 6), torch.randn(3, 4, 4)]
    extra = {"count": torch.arange(3), "bias": torch.ones(1)}
    with torch.no_grad():
        results = fast(images, extra=extra, flag=True)
    assert [r.dtype for r in results] == [dtype] * 2
    assert extra["bias"].dtype == images[0].dtype == torch.float32


def test_a_part_that_is_called_alone_casts_too():
    model, x = small_network()
    fast = optimize_for_inference(model, torch.bfloat16)
    with torch.no_grad():
        assert fast[0](x).dtype == torch.bfloat16
        assert fast[4](torch.randn(2, 16, 6, 6)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"model": "cotnet50"}, TypeError, "model must be an nn.Module, got str"),
        ({"dtype": "bfloat16"}, TypeError, "dtype must be a torch.dtype or None, got 'bfloat16'"),
        ({"dtype": torch.int8}, ValueError, "dtype must be a floating dtype .*, got torch.int8"),
        ({"memory_format": "NHWC"}, TypeError, "must be a torch.memory_format, got 'NHWC'"),
        (
            {"memory_format": torch.channels_last_3d},
            ValueError,
            "must be torch.channels_last or torch.contiguous_format, got torch.channels_last_3d",
        ),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        optimize_for_inference(**{"model": nn.Identity(), **arguments})


# ---- compilers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("freezing", [False, True], ids=["compiled", "frozen"])
def test_it_compiles_as_one_graph(freezing):
    x = torch.randn(4, 16, 6, 6)
    model = calibrate(nn.Sequential(Residual()), x)
    fast = optimize_for_inference(model)
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True)
    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        truth = copy.deepcopy(model).double()(x.double())
        assert_no_worse({"output": compiled(x)}, {"output": truth}, {"output": model(x)})


def test_it_exports():
    model, x = small_network()
    fast = optimize_for_inference(model)
    with torch.no_grad():
        fast(x)
        program = torch.export.export(
            fast, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},)
        )
        targets = {str(node.target) for node in program.graph.nodes}
        assert not any("mkldnn" in target for target in targets)
        other = torch.randn(3, 3, 12, 12)
        torch.testing.assert_close(program.module()(other), model(other), rtol=1e-3, atol=1e-4)


def test_a_cuda_graph_replays_it(cuda):
    model, x = small_network()
    fast = optimize_for_inference(model.to(cuda), torch.float16)
    x = x.to(cuda)
    with torch.no_grad():
        for _ in range(3):
            expected = fast(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = fast(x)
        result.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(result, expected)


# ---- convolutions on packed weights --------------------------------------------------------------


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
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
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


# ---- the document --------------------------------------------------------------------------------


def test_the_document(tmp_path, caplog):
    document = ROOT / "docs" / "inference.md"
    assert broken_links(document) == []
    handlers, logger = list(logging.root.handlers), logging.getLogger("cotnet_ext.inference")
    torch.compiler.reset()
    try:
        with torch._inductor.config.patch(freezing=False):  # restored whatever the document sets
            run_document(document, tmp_path)
    finally:
        logger.setLevel(logging.NOTSET)
        logging.root.handlers[:] = handlers
    assert "replaced 3 by FusedContextualLayer" in caplog.text
