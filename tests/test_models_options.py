"""What a network can be asked for: maps, strides, heads, rates; and how PyTorch's tools take it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from cotnet_ext import models, modules
from cotnet_ext.models import create_model, get_variant
from cotnet_ext.models.blocks import BlurPool, Bottleneck, DropPath, SplitAttention

# One of each kind: plain, grouped, with split attention, with blur pooling.
KINDS = ("cotnet50", "cotnext50_2x48d", "se_cotnetd_50", "se_cotnetd_152")


def trained_like(model: nn.Module) -> nn.Module:
    """No block at its shortcut, no norm at its default."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.4)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return model


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return trained_like(create_model("se_cotnetd_50", num_classes=10)).eval()


def images(count: int = 2, channels: int = 3, size: int = 64) -> torch.Tensor:
    return torch.rand(count, channels, size, size)


# ---- Maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [*((name, 32) for name in KINDS), ("cotnet50", 8), ("se_cotnetd_152", 8), ("cotnet50", 16)],
)
def test_maps_are_as_announced(name, output_stride):
    options = {"features_only": True, "output_stride": output_stride}
    with torch.device("meta"):
        model = create_model(name, **options).eval()
        maps = model(torch.empty(2, 3, 96, 64))
    info = model.feature_info
    assert info.out_indices == (0, 1, 2, 3, 4)
    assert info.channels()[1:] == [256, 512, 1024, 2048]
    assert info.reduction() == [min(stride, output_stride) for stride in (2, 4, 8, 16, 32)]
    assert info.module_name() == ["act1", "layer1", "layer2", "layer3", "layer4"]
    for feature, channels, stride in zip(maps, info.channels(), info.reduction(), strict=True):
        assert feature.shape == (2, channels, 96 // stride, 64 // stride)


@pytest.mark.parametrize(
    ("asked", "got"),
    [((1, 2), (1, 2)), ([-1, 0], (0, 4)), (2, (3, 4)), ((0,), (0,)), ((3, 1), (1, 3))],
)
def test_chosen_maps(network, asked, got):
    with torch.device("meta"):
        model = create_model("se_cotnetd_50", features_only=True, out_indices=asked).eval()
    assert model.out_indices == model.feature_info.out_indices == got
    assert len(model.stage_names) == max(got)
    state = network.state_dict()
    model.load_state_dict({key: state[key] for key in model.state_dict()}, assign=True)
    picture = images()
    every = network._maps(picture)
    for index, actual in zip(got, model(picture), strict=True):
        assert torch.equal(actual, every[index])
    assert model.feature_info.get_dicts(["num_chs"]) == [
        {"num_chs": network.feature_info[index]["num_chs"]} for index in got
    ]


@pytest.mark.parametrize("output_stride", [8, 16])
def test_smaller_strides_use_the_same_weights(network, output_stride):
    with torch.device("meta"):
        model = create_model("se_cotnetd_50", num_classes=10, output_stride=output_stride)
    model.load_state_dict(network.state_dict(), assign=True)
    dilations = {m.conv.dilation[0] for m in model.modules() if isinstance(m, SplitAttention)}
    assert dilations == {1, 32 // output_stride // 2 if output_stride == 16 else 2}
    assert model.eval().forward_features(images()).shape[2] == 64 // output_stride


# ---- Heads ---------------------------------------------------------------------------------------


def test_head(network):
    picture = images()
    features = network.forward_features(picture)
    assert features.shape == (2, 2048, 2, 2)
    pooled = network.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    assert torch.equal(network.forward_head(features), network(picture))
    assert torch.equal(network.get_classifier()(pooled), network(picture))
    assert network.num_features == 2048


@pytest.mark.parametrize(
    ("pool", "shape"), [("avg", (2, 2048)), ("max", (2, 2048)), ("", (2, 2048, 2, 2))]
)
def test_without_classifier(pool, shape):
    model = create_model("se_cotnetd_50", num_classes=0, global_pool=pool).eval()
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(images()).shape == shape
    assert not any(key.startswith("fc") for key in model.state_dict())


def test_reset_classifier(network):
    model = copy.deepcopy(network).to(torch.float64)
    model.reset_classifier(7)
    assert (model.num_classes, model.global_pool) == (7, "avg")
    assert model.fc.weight.dtype == torch.float64
    assert model(images().double()).shape == (2, 7)
    model.reset_classifier(0, "")
    assert model(images().double()).shape == (2, 2048, 2, 2)
    model.reset_classifier(3, "max")
    assert model(images().double()).shape == (2, 3)
    with pytest.raises(ValueError, match="num_classes must be 0"):
        model.reset_classifier(-1)
    assert model.num_classes == 3


def test_no_weight_decay(network):
    names = network.no_weight_decay()
    parameters = dict(network.named_parameters())
    assert all(name in names for name in parameters if name.endswith(".bias"))
    assert {parameters[name].dim() for name in names} == {1}
    assert all(value.dim() > 1 for name, value in parameters.items() if name not in names)


# ---- Training ------------------------------------------------------------------------------------


def test_drop_path_rates_grow_with_the_depth():
    model = create_model("cotnet50", drop_path_rate=0.3)
    rates = [
        b.drop_path.rate
        for b in model.modules()
        if isinstance(b, Bottleneck) and isinstance(b.drop_path, DropPath)
    ]
    assert rates == pytest.approx([0.3 * block / 15 for block in range(1, 16)])
    plain = create_model("cotnet50")
    assert not any(isinstance(module, DropPath) for module in plain.modules())


def test_drop_path_drops_samples_and_keeps_the_mean():
    drop = DropPath(0.25)
    ones = torch.ones(4000, 2, 1, 1, requires_grad=True)
    result = drop(ones)
    assert result.detach().unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert torch.equal(result[:, 0], result[:, 1])
    assert result.mean().item() == pytest.approx(1, abs=0.05)
    result.sum().backward()
    assert torch.equal(ones.grad, result.detach())
    assert drop.eval()(ones) is ones


def test_dropout_and_drop_path_only_in_training(network):
    model = create_model("se_cotnetd_50", num_classes=10, drop_rate=0.5, drop_path_rate=0.5)
    model.load_state_dict(network.state_dict())
    picture = images()
    assert torch.equal(model.eval()(picture), network(picture))
    features = torch.ones(1, 2048, 2, 2)
    dropped = model.train().forward_head(features, pre_logits=True)
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    assert dropped.max() == 2


def test_gradient_checkpointing_changes_nothing():
    """Gradients and running statistics are those without, though blocks are computed twice."""
    options = {"features_only": True, "out_indices": (3,), "drop_path_rate": 0.2}
    plain = trained_like(create_model("se_cotnetd_50", **options)).double()
    sparing = copy.deepcopy(plain)
    sparing.set_grad_checkpointing()
    picture = images().double()
    for model in (plain, sparing):
        torch.manual_seed(2)
        model(picture)[0].square().mean().backward()
    state = sparing.state_dict()
    for key, expected in plain.state_dict().items():
        assert torch.equal(state[key], expected), key
    gradients = {key: value.grad for key, value in sparing.named_parameters()}
    for key, expected in plain.named_parameters():
        assert torch.equal(gradients[key], expected.grad), key
    norms = [module for module in sparing.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.momentum == 0.1 for norm in norms)
    sparing.set_grad_checkpointing(False)
    assert not sparing.grad_checkpointing


def test_gradient_checkpointing_saves_memory():
    def saved(model: nn.Module) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor
        ):
            model(images(2, size=32))
        return sum(sizes)

    model = create_model("se_cotnetd_50")
    before = saved(model)
    model.set_grad_checkpointing()
    assert saved(model) < before / 4


def test_blur_pool_is_the_binomial_filter():
    pool = BlurPool(2)
    x = torch.randn(1, 2, 5, 6)
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    rows = padded.unfold(2, 3, 2) @ line
    torch.testing.assert_close(pool(x), rows.unfold(3, 3, 2) @ line)
    assert pool(x.half()).dtype == torch.float16
    with torch.device("meta"):
        built = BlurPool(2)
    built.to_empty(device="cpu").reset_parameters()
    assert torch.equal(built(x), pool(x))


# ---- PyTorch's tools -----------------------------------------------------------------------------


def test_channels_last(network):
    picture = images()
    model = copy.deepcopy(network).to(memory_format=torch.channels_last)
    features = model.forward_features(picture.to(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(features, network.forward_features(picture))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(network, dtype):
    picture = images()
    expected = network(picture)
    scale = expected.abs().max()
    actual = copy.deepcopy(network).to(dtype)(picture.to(dtype))
    assert actual.dtype == dtype
    assert ((actual.float() - expected).abs().max() / scale) < 0.1
    with torch.autocast("cpu", dtype):
        actual = network(picture)
    assert ((actual.float() - expected).abs().max() / scale) < 0.1


def test_copies_and_pickles(network):
    picture = images()
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    copies = (
        copy.deepcopy(network),
        pickle.loads(pickle.dumps(network)),
        torch.load(file, weights_only=False),
    )
    for other in copies:
        assert other.variant == network.variant
        assert torch.equal(other(picture), network(picture))


def test_built_without_memory_and_filled_later(network):
    with torch.device("meta"):
        model = create_model("se_cotnetd_50", num_classes=10).eval()
    model.load_state_dict(network.state_dict(), assign=True)
    picture = images()
    assert torch.equal(model(picture), network(picture))


@pytest.fixture(scope="module")
def short() -> nn.Module:
    """A stem and three blocks, which is what compilers have time for here."""
    return trained_like(create_model("cotnet50", features_only=True, out_indices=(0, 1))).double()


def test_compile_without_a_break(short):
    model = copy.deepcopy(short).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    picture = images().double()
    with torch.no_grad():
        for actual, expected in zip(compiled(picture), model(picture), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compile_in_training(short, checkpointing):
    model, other = copy.deepcopy(short), copy.deepcopy(short)
    other.set_grad_checkpointing(checkpointing)
    compiled = torch.compile(other, backend="aot_eager")
    picture = images().double()
    for step in (model, compiled):
        step(picture)[-1].square().mean().backward()
    for (key, expected), actual in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, msg=key)
    state = other.state_dict()
    for key, expected in model.state_dict().items():
        torch.testing.assert_close(state[key], expected, msg=key)


def test_export(network):
    picture = images()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network, (picture,), dynamic_shapes=({0: batch},))
    other = images(3)
    torch.testing.assert_close(program.module()(other), network(other))


# ---- Bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_classes": -1}, ValueError, "num_classes must be 0 .no classifier. or more, got -1"),
        ({"num_classes": 1.5}, TypeError, "num_classes must be an int, got 1.5"),
        ({"num_classes": True}, TypeError, "num_classes must be an int, got True"),
        ({"in_chans": 0}, ValueError, "in_chans must be at least 1, got 0"),
        ({"in_chans": "3"}, TypeError, "in_chans must be an int, got '3'"),
        ({"drop_rate": 1.0}, ValueError, "drop_rate must be at least 0 and less than 1, got 1.0"),
        ({"drop_path_rate": -0.1}, ValueError, "drop_path_rate must be at least 0 and less than 1"),
        ({"drop_path_rate": None}, TypeError, "drop_path_rate must be a number, got None"),
        ({"output_stride": 4}, ValueError, "output_stride must be 8, 16 or 32, got 4"),
        ({"global_pool": "mean"}, ValueError, "global_pool must be 'avg', 'max' or '' .none."),
        ({"global_pool": ""}, ValueError, "global_pool='' needs num_classes=0, got 1000"),
        ({"out_indices": (1,)}, ValueError, "out_indices needs features_only=True"),
        ({"features_only": True, "out_indices": (5,)}, ValueError, "-5 to 4, each once, got .5,."),
        ({"features_only": True, "out_indices": (1, -4)}, ValueError, "each once, got .1, -4."),
        ({"features_only": True, "out_indices": ()}, ValueError, "each once, got .."),
        ({"features_only": True, "out_indices": 6}, ValueError, "from 1 to 5, got 6"),
        ({"features_only": True, "out_indices": "12"}, TypeError, "sequence of ints.*got '12'"),
        ({"features_only": True, "out_indices": (1.0,)}, TypeError, "sequence of ints.*got .1.0,."),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        create_model("cotnet50", **options)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("cotnet_50", "cotnet50"),
        ("CoTNeXt-101", "cotnext101_2x48d"),
        ("SE-CoTNetD-152-L", "se_cotnetd_152_L"),
        ("resnet50", "cotnet50"),
    ],
)
def test_unknown_names(name, nearest):
    with pytest.raises(ValueError, match=f"no model is named '{name}'; did you mean '{nearest}'"):
        create_model(name)
    with pytest.raises(TypeError, match="name must be a str, got int"):
        get_variant(50)


def test_names_are_functions():
    model = models.cotnet50(num_classes=5, reference=False)
    assert model.fc.out_features == 5
    assert isinstance(model.layer1[0].conv2, modules.CotLayer)
    with pytest.raises(TypeError, match="positional"):
        models.cotnet50(5)
