"""`convert`: models of other people's layers compute the same with ours in their place."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import timm
import torch
from cases import randn
from detector import LAYERS, Detector
from foreign import official
from layers import assert_equal, both_modes, build, every_kind, make_input, run
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import cotnet_ext
from cotnet_ext import compat, convert, reference
from cotnet_ext.conversion import Finding


def converted(model: nn.Module) -> tuple[nn.Module, list[Finding]]:
    report: list[Finding] = []
    assert convert(model, report=report) is model
    return model, report


def swapped(report: list[Finding]) -> list[str]:
    return sorted(finding.path for finding in report if finding.replacement)


def settle(model: nn.Module) -> nn.Module:
    """The model with statistics of some data, in float64."""
    model = model.double()
    for key, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_floating_point() and t.dim() == 1:
            values = randn(*t.shape, key=key) / 4
            t.data.copy_(values.square() + 0.5 if "var" in key else values + ("weight" in key))
    return model


def passes(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients of the image and of all parameters, and buffers after one pass."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    outputs = model(x)
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    sum((y * randn(*y.shape, key=i)).sum() for i, y in enumerate(outputs)).backward()
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)} | {"input": x.grad}
    results |= {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return results | {key: b.clone() for key, b in model.named_buffers()}


# ---- Single layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [reference, official], ids=["reference", "official"])
@both_modes
@every_kind
def test_a_layer_computes_the_same(package, training, name):
    layer = build(package, name).train(training)
    expected = run(copy.deepcopy(layer), make_input(name))
    kind = type(layer).__name__
    ours, report = converted(layer)
    assert type(ours) is getattr(cotnet_ext, kind)
    assert report[0] == Finding("", f"{package.__name__}.{kind}", f"cotnet_ext.{kind}")
    assert_equal(run(ours, make_input(name)), expected)


class CoTAttention(nn.Module):
    """As in many forks of YOLO: other names for the same things, and an argument of its own."""

    def __init__(self, c1: int, c2: int | None = None) -> None:
        super().__init__()
        self.c1, self.k = c1, 3
        self.key_embed = nn.Sequential(
            nn.Conv2d(c1, c1, 3, padding="same", groups=4, bias=False),
            nn.BatchNorm2d(c1),
            nn.SiLU(),
        )
        self.value_embed = nn.Sequential(nn.Conv2d(c1, c1, 1, bias=False), nn.BatchNorm2d(c1))
        self.attention_embed = nn.Sequential(
            nn.Conv2d(2 * c1, c1 // 2, 1, bias=False),
            nn.BatchNorm2d(c1 // 2),
            nn.SiLU(),
            nn.Conv2d(c1 // 2, 9 * c1, 1),
        )

    def forward(self, x):
        k1, v = self.key_embed(x), self.value_embed(x).flatten(2)
        att = self.attention_embed(torch.cat([k1, x], 1))
        att = att.reshape(len(x), self.c1, self.k**2, -1).mean(2)
        return k1 + (torch.softmax(att, -1) * v).reshape(x.shape)


class YoloCoT(CoTAttention):
    """A subclass that only calls the constructor in another way."""

    def __init__(self, c1: int, *_: object) -> None:
        super().__init__(c1)


class CotLayer(CoTAttention):
    """The layer with the softmax under the name of the one with the window."""


@pytest.mark.parametrize("kind", [CoTAttention, YoloCoT, CotLayer])
@both_modes
def test_copies_with_small_changes(kind, training):
    layer = settle(kind(16, 16)).train(training)
    x = randn(3, 16, 7, 6)
    expected = passes(copy.deepcopy(layer), x)
    ours, _ = converted(layer)
    assert type(ours) is cotnet_ext.CoTAttention
    assert (ours.dim, ours.kernel_size, ours.c1, ours.k) == (16, 3, 16, 3)
    assert_equal(passes(ours, x), expected)


class CoTLayer(official.CotLayer):
    """As `models/cotnet_hybrid.py` of the official repository names it."""


def test_the_official_hybrid_layer():
    layer = settle(CoTLayer(16, 3))
    expected = passes(copy.deepcopy(layer), randn(3, 16, 7, 6))
    ours, report = converted(nn.ModuleList([layer]))
    assert [finding.replacement for finding in report] == [
        "cotnet_ext.CotLayer",
        "cotnet_ext.LocalConvolution",
    ]
    assert type(ours[0]) is type(compat.CoTLayer(16, 3)) is cotnet_ext.CotLayer
    assert_equal(passes(ours[0], randn(3, 16, 7, 6)), expected)


# ---- Local convolutions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "size"),
    [
        ({"kernel_size": 3}, (7, 6)),
        ({"kernel_size": 5, "stride": 2, "padding": 2}, (5, 4)),
        ({"kernel_size": 2, "padding": 1, "dilation": 2}, (9, 8)),
        ({"kernel_size": (3, 1), "stride": (1, 2), "padding": (1, 0)}, (9, 4)),
        ({"kernel_size": 3, "padding": 1, "pad_mode": 1}, (9, 8)),
    ],
)
def test_local_convolution(window, size):
    theirs = official.LocalConvolution(8, 8, **window)
    ours, report = converted(copy.deepcopy(theirs))
    assert [str(finding) for finding in report] == [
        "the model itself: foreign_official.LocalConvolution -> cotnet_ext.LocalConvolution"
    ]
    assert type(ours) is cotnet_ext.LocalConvolution
    kernel = window["kernel_size"]
    taps = kernel[0] * kernel[1] if isinstance(kernel, tuple) else kernel**2
    x, weight = randn(2, 8, 9, 8), randn(2, 1, 4, taps, *size)
    torch.testing.assert_close(ours(x, weight), theirs(x, weight), rtol=1e-12, atol=1e-12)


class LocalConvolution(nn.Module):
    """The original, which needs CuPy: its attributes, and a forward that cannot run here."""

    def __init__(self, kernel_size=3, padding=1, pad_mode=0) -> None:
        super().__init__()
        self.in_channels = self.out_channels = 8
        self.kernel_size, self.padding, self.pad_mode = kernel_size, padding, pad_mode
        self.stride = self.dilation = 1

    def forward(self, input, weight):
        raise ModuleNotFoundError("No module named 'cupy'")


class LocalConvolutionDilate(LocalConvolution):
    def forward(self, input, weight, dilation):
        raise ModuleNotFoundError("No module named 'cupy'")


class LocalConvolutionMix(LocalConvolution):
    def __init__(self) -> None:
        super().__init__()
        self.kernel_size1, self.kernel_size2, self.padding1, self.padding2 = 3, 5, 1, 2

    def forward(self, input, weight1, weight2):
        raise ModuleNotFoundError("No module named 'cupy'")


class LocalConvolutionMixMerge(LocalConvolutionMix):
    def __init__(self) -> None:
        super().__init__()
        self.head_num, self.w_channels = 2, 4

    def forward(self, input, weight):
        raise ModuleNotFoundError("No module named 'cupy'")


def test_originals_that_need_cupy():
    parts = (LocalConvolution, LocalConvolutionDilate)
    parts += (LocalConvolutionMix, LocalConvolutionMixMerge)
    model, report = converted(nn.ModuleList(part() for part in parts))
    for module, part, finding in zip(model, parts, report, strict=True):
        package = cotnet_ext if part is LocalConvolution else compat
        assert type(module) is getattr(package, part.__name__)
        assert "cupy" in finding.remark
    x = randn(1, 8, 6, 5)
    weight = randn(1, 2, 4, 9, 6, 5)
    expected = reference.local_aggregation(x, weight, padding=1)
    torch.testing.assert_close(model[0](x, weight), expected)
    torch.testing.assert_close(model[1](x, weight, [1, 1, 1, 1]), expected)
    weight2 = randn(1, 2, 4, 25, 6, 5)
    expected = torch.cat((expected, reference.local_aggregation(x, weight2, 5, padding=2)), 1)
    torch.testing.assert_close(model[2](x, weight, weight2), expected)
    merged = torch.cat((weight.flatten(1, 3), weight2.flatten(1, 3)), 1)
    torch.testing.assert_close(model[3](x, merged), expected)


class Unwritten(compat.LocalConvolutionMix):
    """Ours under another name stays."""


def test_settings_that_the_originals_ignore():
    dilate = LocalConvolutionDilate()
    dilate.stride = 2
    model, report = converted(
        nn.ModuleList([LocalConvolution(pad_mode=1), dilate, Unwritten(8, 8, 3, 5)])
    )
    assert [type(module) for module in model] == [
        LocalConvolution,
        LocalConvolutionDilate,
        Unwritten,
    ]
    assert [finding.remark for finding in report] == [
        "its pad_mode=1 is ignored by the original and honoured by LocalConvolution; "
        "set it to 0 to keep the numbers",
        "its stride=2 is ignored by the original and honoured by LocalConvolutionDilate; "
        "set it to 1 to keep the numbers",
    ]


# ---- Whole models --------------------------------------------------------------------------------


@both_modes
def test_a_detector(training):
    model = settle(Detector(official)).train(training)
    image = randn(2, 3, 64, 48)
    expected = passes(copy.deepcopy(model), image)
    keys = list(model.state_dict())
    model, report = converted(model)
    assert swapped(report) == sorted(LAYERS)
    assert list(model.state_dict()) == keys
    assert_equal(passes(model, image), expected)
    assert [type(m).__module__ for m in model.modules()].count("foreign_official") == 0


@both_modes
def test_a_resnet_of_timm(training):
    model = timm.create_model("resnet26", num_classes=5)
    for stage in (model.layer2, model.layer3):
        block = stage[-1]
        dim = block.conv2.out_channels
        block.conv2 = (
            official.CotLayer(dim, 3) if stage is model.layer2 else official.CoXtLayer(dim, 3)
        )
    model = settle(model).train(training)
    image = randn(2, 3, 64, 64)
    expected = passes(copy.deepcopy(model), image)
    model, report = converted(model)
    assert [finding.path for finding in report if "Layer" in finding.original] == [
        "layer2.1.conv2",
        "layer3.1.conv2",
    ]
    assert_equal(passes(model, image), expected)


def test_a_step_of_an_optimizer_made_before():
    """Optimizers hold the parameters, which stay the same objects."""
    theirs = settle(Detector(official))
    ours = copy.deepcopy(theirs)
    results = []
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if model is ours:
            convert(model)
        for _ in range(2):
            optimizer.zero_grad()
            loss = sum(y.square().mean() for y in model(randn(2, 3, 64, 48)))
            loss.backward()
            optimizer.step()
        results.append({"loss": loss.detach()} | model.state_dict())
    assert_equal(results[1], results[0])


# ---- What is kept --------------------------------------------------------------------------------


def test_objects_are_kept():
    model = Detector(official)
    model.c3.m[0].cv2.note = "mine"
    model.c4.requires_grad_(False)
    model.c4.m[0].cv2.eval()
    model.p3.half()
    modules = dict(model.named_modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    modes = {path: module.training for path, module in modules.items()}
    needs = {path: (t.requires_grad, t.dtype, t.device) for path, t in tensors.items()}
    convert(model)
    assert {path: id(module) for path, module in model.named_modules()} == {
        path: id(module) for path, module in modules.items()
    }
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(after) == list(tensors)
    assert all(after[path] is t for path, t in tensors.items())
    assert {path: module.training for path, module in model.named_modules()} == modes
    assert {path: (t.requires_grad, t.dtype, t.device) for path, t in after.items()} == needs
    assert model.c3.m[0].cv2.note == "mine"


def test_a_layer_on_the_meta_device():
    with torch.device("meta"):
        layer = official.CotLayer(16, 3)
        convert(layer)
    assert type(layer) is cotnet_ext.CotLayer
    assert layer(torch.empty(2, 16, 5, 4, device="meta")).shape == (2, 16, 5, 4)


def test_random_state_and_statistics_are_not_touched():
    model = Detector(official)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    state = torch.get_rng_state()
    convert(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(model.state_dict(), before)


@every_kind
def test_hooks_are_kept(name):
    """Hooks of the layer and of its parts fire as often, and their handles still remove them."""
    layer = build(official, name)
    calls = []

    def note(what):
        return lambda *_: calls.append(what)

    embed = dict(layer.named_children())["attention_embed" if name == "attention" else "embed"]
    handles = []
    for what, part in {"layer": layer, "norm": layer.key_embed[1], "join": embed[0]}.items():
        handles += [
            part.register_forward_pre_hook(note(f"{what} before")),
            part.register_forward_hook(note(f"{what} after")),
        ]
        if what != "norm":  # its result is changed in place, which PyTorch refuses then
            handles.append(part.register_full_backward_hook(note(f"{what} backward")))
    layer.register_state_dict_post_hook(note("state_dict"))
    layer.register_load_state_dict_post_hook(note("load_state_dict"))
    results = []
    for _ in range(2):
        run(layer, make_input(name))
        layer.load_state_dict(layer.state_dict())
        results.append(sorted(calls))
        calls.clear()
        convert(layer)
    assert results[0] == results[1]
    for handle in handles:
        handle.remove()
    run(layer, make_input(name))
    assert calls == []


def test_shared_layers_stay_shared():
    layer = official.CotLayer(8, 3)
    model, report = converted(nn.Sequential(layer, nn.ReLU(), layer))
    assert model[0] is model[2] is layer
    assert swapped(report) == ["0", "0.local_conv"]


def test_layers_that_no_module_lists_are_swapped_with_those_that_share_them():
    layer = official.CoTAttention(8)
    model = nn.Sequential(layer)
    hidden = [layer]
    convert(model)
    assert type(hidden[0]) is cotnet_ext.CoTAttention


def test_converting_twice_changes_nothing():
    model, _ = converted(Detector(official))
    before = {path: type(module) for path, module in model.named_modules()}
    _, report = converted(model)
    assert report == []
    assert {path: type(module) for path, module in model.named_modules()} == before


def test_dry_run_changes_nothing():
    model = Detector(official)
    before = {path: type(module) for path, module in model.named_modules()}
    attributes = {path: sorted(vars(module)) for path, module in model.named_modules()}
    report: list[Finding] = []
    assert convert(model, dry_run=True, report=report) is model
    assert swapped(report) == sorted(LAYERS)
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert {path: sorted(vars(module)) for path, module in model.named_modules()} == attributes


@every_kind
def test_replaced_parts_are_kept(name):
    """Norms of another kind, folded norms, parametrized and pruned convolutions, other acts."""
    layer = build(official, name)
    last = dict(layer.named_children())["attention_embed" if name == "attention" else "embed"]
    values = dict(layer.named_children())["value_embed" if name == "attention" else "conv1x1"]
    parametrizations.weight_norm(last[3])
    prune.l1_unstructured(values[0], "weight", 0.5)
    layer.key_embed[1] = nn.SyncBatchNorm(layer.dim)
    layer.key_embed[2] = nn.Hardswish()
    last[0].bias = nn.Parameter(randn(last[0].out_channels))
    last[1] = nn.Identity()
    layer = layer.double().eval()
    expected = run(layer, make_input(name))  # in evaluation, which changes no statistics
    parts = list(layer.modules())
    ours, report = converted(layer)
    assert report[0].replacement and not report[0].remark
    assert [id(part) for part in ours.modules()] == [id(part) for part in parts]
    assert_equal(run(ours, make_input(name)), expected)


class Traced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 1), official.CotLayer(8, 3)

    def forward(self, x):
        return self.second(self.first(x))


def test_inside_a_graph_of_fx():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return name == "second" or super().is_leaf_module(m, name)

    root = Traced().double()
    graph = torch.fx.GraphModule(root, Tracer().trace(root))
    expected = graph(randn(3, 8, 5, 4))
    graph, report = converted(graph)
    assert swapped(report) == ["second", "second.local_conv"]
    torch.testing.assert_close(graph(randn(3, 8, 5, 4)), expected)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.ModuleDict({"a": model, "b": nn.ModuleList([model])})["a"],
        copy.deepcopy,
    ],
    ids=["DataParallel", "compiled", "containers", "deepcopy"],
)
@pytest.mark.parametrize("name", ["cot"])
def test_wrapped_models(wrap, name):
    torch.compiler.reset()
    layer = build(official, name).eval()
    expected = layer(make_input(name))
    model = wrap(layer)
    torch.testing.assert_close(model(make_input(name)), expected)  # compiles
    _, report = converted(model)
    assert len(swapped(report)) == 2
    aggregation = "cotnet_ext::"
    with torch.profiler.profile() as profile, torch.no_grad():
        actual = model(make_input(name))
    torch.testing.assert_close(actual, expected)
    assert any(aggregation in event.key for event in profile.key_averages())


def test_a_model_in_distributed_data_parallel(tmp_path):
    """Its buckets and broadcasts refer to parameters and buffers, which stay."""
    theirs = build(official, "cot")
    ours = copy.deepcopy(theirs)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(ours))
        run(wrapped, make_input("cot"))
        convert(wrapped)
        actual = run(wrapped, make_input("cot"))
    finally:
        torch.distributed.destroy_process_group()
    assert type(wrapped.module[0]) is cotnet_ext.CotLayer
    run(theirs, make_input("cot"))
    expected = run(nn.Sequential(theirs), make_input("cot"))
    assert_equal({key.removeprefix("module."): t for key, t in actual.items()}, expected)


def test_pickled_models():
    model = Detector(official)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded, report = converted(torch.load(file, weights_only=False))
    assert swapped(report) == sorted(LAYERS)
    again = io.BytesIO()
    torch.save(loaded, again)
    again.seek(0)
    loaded = torch.load(again, weights_only=False).eval()
    image = randn(1, 3, 32, 32, dtype=torch.float32)
    for actual, expected in zip(loaded(image), model.eval()(image), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# ---- What is left alone --------------------------------------------------------------------------


def altered(package, name: str, **children) -> nn.Module:
    """A layer of `package` with these paths set to other modules, or removed where None."""
    layer = getattr(package, name)(16, 3)
    for path, child in children.items():
        if child is None:
            delattr(layer, path)
        elif "__" in path:
            layer.set_submodule(path.replace("__", "."), child)
        else:
            setattr(layer, path, child)
    return layer


def conv(*sizes, **options) -> nn.Conv2d:
    return nn.Conv2d(*sizes, **{"bias": False, **options})


STRUCTURES = {
    "no key_embed": (("CotLayer", {"key_embed": None}), "it has no key_embed, which CotLayer has"),
    "no se": (("CotLayer", {"se": None}), "it has no se, which CotLayer has"),
    "more": (
        ("CoTAttention", {"drop": nn.Dropout()}),
        "it has drop, which CoTAttention has not",
    ),
    "a parameter": (
        ("CoTAttention", {"gamma": nn.Parameter(torch.ones(1))}),
        "it has gamma, which CoTAttention has not",
    ),
    "a linear key": (
        ("CotLayer", {"key_embed": nn.Linear(16, 16)}),
        "key_embed does not begin with a Conv2d",
    ),
    "an empty key": (
        ("CotLayer", {"key_embed": nn.Sequential()}),
        "key_embed does not begin with a Conv2d",
    ),
    "3-d": (
        ("CoTAttention", {"key_embed__0": nn.Conv3d(16, 16, 3)}),
        "key_embed[0] has kernel_size=(3, 3, 3), expected a square one of a Conv2d",
    ),
    "an even kernel": (
        ("CoTAttention", {"key_embed__0": conv(16, 16, 2, groups=4)}),
        "kernel_size must be a positive odd number, got 2",
    ),
    "odd channels": (
        ("CotLayer", {"key_embed__0": conv(12, 12, 3)}),
        "dim must be a positive multiple of 8, got 12",
    ),
    "groups": (
        ("CoTAttention", {"key_embed__0": conv(16, 16, 3, padding=1, groups=2)}),
        "key_embed[0] has groups=2, expected 4",
    ),
    "stride": (
        ("CotLayer", {"conv1x1__0": conv(16, 16, 1, stride=2)}),
        "conv1x1[0] has stride=(2, 2), expected (1, 1)",
    ),
    "padding": (
        (
            "CotLayer",
            {"key_embed__0": conv(16, 16, 3, padding=1, groups=4, padding_mode="reflect")},
        ),
        "key_embed[0] has padding_mode=reflect, expected zeros",
    ),
    "hidden channels": (
        ("CoTAttention", {"attention_embed__0": conv(32, 4, 1)}),
        "attention_embed[0] has out_channels=4, expected 8",
    ),
    "shared by others": (
        ("CotLayer", {"embed__3": conv(8, 36, 1, bias=True)}),
        "embed[3] has out_channels=36, expected 18",
    ),
    "a bias": (
        ("CoTAttention", {"value_embed__0": conv(16, 16, 1, bias=True)}),
        "value_embed[0] has a bias, which is not so in the original",
    ),
    "no bias": (
        ("CotLayer", {"se__3": conv(32, 32, 1)}),
        "se[3] has no bias, which is not so in the original",
    ),
    "no convolution": (
        ("CotLayer", {"se__0": nn.Linear(16, 32)}),
        "se[0] is a Linear, expected a Conv2d",
    ),
    "length": (
        ("CotLayer", {"conv1x1": nn.Sequential(conv(16, 16, 1))}),
        "conv1x1 is a Sequential of 1, expected a Sequential of 2",
    ),
    "no sequence": (
        ("CotLayer", {"se": nn.Conv2d(16, 32, 1)}),
        "se is a Conv2d, expected a Sequential of 4",
    ),
    "norm channels": (
        ("CotLayer", {"bn": nn.BatchNorm2d(8)}),
        "bn has 8 channels, expected 16",
    ),
    "no norm": (
        ("CotLayer", {"embed__4": nn.Dropout(0.5)}),
        "embed[4] is a Dropout, expected a GroupNorm",
    ),
    "norm groups": (
        ("CotLayer", {"embed__4": nn.GroupNorm(1, 18)}),
        "embed[4] has num_groups=1, expected 2",
    ),
    "activation": (
        ("CotLayer", {"act": nn.PReLU(16)}),
        "act is a PReLU, expected an activation without parameters",
    ),
    "window": (
        ("CotLayer", {"local_conv": official.LocalConvolution(16, 16, 3)}),
        "local_conv has padding=0, expected 1",
    ),
    "weights of its own": (
        ("CotLayer", {"local_conv": nn.Conv2d(16, 16, 3)}),
        "local_conv is a Conv2d, expected a LocalConvolution",
    ),
    "local without its padding": (
        ("LocalConvolution", {"padding": None}),
        "it has no padding, which LocalConvolution has",
    ),
}


@pytest.mark.parametrize("what", STRUCTURES)
def test_other_structures_are_left_alone(what, caplog):
    (name, children), reason = STRUCTURES[what]
    if name == "LocalConvolution":
        layer = official.LocalConvolution(16, 16, 3)
        del layer.padding
    else:
        layer = altered(official, name, **children)
    kind, attributes = type(layer), sorted(vars(layer))
    layer, report = converted(layer)
    assert type(layer) is kind
    assert sorted(vars(layer)) == attributes
    assert report[0].replacement is None
    assert report[0].remark == reason
    assert caplog.record_tuples[0] == (
        "cotnet_ext.conversion",
        logging.WARNING,
        f"the model itself: foreign_official.{name} left alone: {report[0].remark}",
    )


class Residual(official.CoTAttention):
    def forward(self, x):
        return x + super().forward(x)


class Droplet(official.CotLayer):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Windows(official.CotLayer):
    def forward(self, x):
        k = self.key_embed(x)
        return super().forward(k.unflatten(2, (-1, 7)).flatten(2, 3))


class Two(official.CotLayer):
    def forward(self, x, mask=None):
        return super().forward(x)


class Loading(official.CotLayer):
    def train(self, mode=True):
        return super().train(False)


class Calling(official.CoTAttention):
    def __call__(self, x):
        return super().__call__(x) / 2


class Scaled(official.LocalConvolution):
    def forward(self, input, weight):
        return 2 * super().forward(input, weight)


def replaced_forward() -> nn.Module:
    layer = official.CoTAttention(16)
    layer.forward = lambda x: x
    return layer


OTHERS = {
    "another forward": (
        lambda: Residual(16),
        "its forward gives other numbers in evaluation",
    ),
    "another forward in training": (
        lambda: Droplet(16, 3),
        "its forward gives other numbers in training",
    ),
    "a failing forward": (
        lambda: Windows(16, 3),
        "its forward fails on a map [2, 16, 8, 16]: RuntimeError: ",
    ),
    "more arguments": (lambda: Two(16, 3), "its forward takes (x, mask), expected 1 argument(s)"),
    "another train": (lambda: Loading(16, 3), "class Loading overrides train of nn.Module"),
    "another call": (lambda: Calling(16), "class Calling overrides __call__ of nn.Module"),
    "a forward of the object": (
        replaced_forward,
        "its forward was replaced on the object, not in its class",
    ),
    "another aggregation": (
        lambda: Scaled(8, 8, 3),
        "its forward gives other numbers",
    ),
    "a window that cannot be": (
        lambda: official.LocalConvolution(8, 8, 0),
        "kernel_size must be from 1 to 2147483647, got 0",
    ),
    "a script": (
        lambda: torch.jit.script(Plain(16)),
        "it is a TorchScript module; convert before torch.jit.script or trace",
    ),
    "a graph": (
        lambda: torch.fx.symbolic_trace(Plain(16)),
        "it is a graph of torch.fx; convert before tracing",
    ),
}


class CoT_Attention(nn.Module):
    """What can be scripted and traced."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.key_embed = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.key_embed(x)


Plain = CoT_Attention


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("what", OTHERS)
def test_other_behaviour_is_left_alone(what):
    make, reason = OTHERS[what]
    layer = make()
    kind = type(layer)
    layer, report = converted(layer)
    assert type(layer) is kind
    assert report[0].replacement is None
    assert report[0].remark == reason or reason.endswith(": ") and reason in report[0].remark


def test_a_forward_that_cannot_begin_here():
    """Such as one that imports CuPy: the structure decides, and the report tells."""

    class CotLayer(official.CotLayer):
        def forward(self, x):
            raise ImportError("No module named 'cupy'")

    class Tokens(official.CotLayer):
        def forward(self, x):
            n, tokens, c = x.shape
            return super().forward(x.transpose(1, 2).reshape(n, c, -1, 4))

    model, report = converted(nn.ModuleList([CotLayer(8, 3), CotLayer(8, 3), Tokens(8, 3)]))
    remark = "not compared, as its forward does not run on the CPU: ImportError: No module named "
    layers = [finding for finding in report if "local_conv" not in finding.path]
    assert [finding.replacement for finding in layers] == ["cotnet_ext.CotLayer"] * 2 + [None]
    assert [finding.remark for finding in layers[:2]] == [f"{remark}'cupy'"] * 2
    assert layers[2].remark.startswith("its forward fails on a map [2, 8, 8, 16]: ValueError: too ")
    assert model[0](randn(2, 8, 5, 4, dtype=torch.float32)).shape == (2, 8, 5, 4)


def test_attributes_of_the_object_count():
    """Two layers of one class that compute different things are told apart."""

    class CoTAttention(official.CoTAttention):
        shortcut = False

        def forward(self, x):
            y = super().forward(x)
            return x + y if self.shortcut else y

    model = nn.Sequential(*(CoTAttention(8) for _ in range(4)))
    model[1].shortcut = model[3].shortcut = True
    _, report = converted(model)
    assert swapped(report) == ["0", "2"]


def test_lost_methods_are_told():
    class CoTAttention(official.CoTAttention):
        def fuse(self):
            return self

        @property
        def width(self):
            return self.dim

    _, report = converted(CoTAttention(8))
    assert str(report[0]).endswith("-> cotnet_ext.CoTAttention (without its fuse, width)")


def test_the_parts_of_a_refused_layer_are_swapped():
    layer, report = converted(Two(8, 3))
    assert type(layer) is Two
    assert type(layer.local_conv) is cotnet_ext.LocalConvolution
    assert swapped(report) == ["local_conv"]


def test_other_modules_are_not_mentioned(caplog):
    caplog.set_level(logging.DEBUG)
    _, report = converted(nn.Sequential(nn.Conv2d(8, 8, 3), nn.MultiheadAttention(8, 2)))
    assert report == []
    assert caplog.records == []


def test_swaps_are_logged(caplog):
    caplog.set_level(logging.INFO)
    convert(nn.Sequential(official.CoTAttention(8)))
    assert caplog.record_tuples == [
        (
            "cotnet_ext.conversion",
            logging.INFO,
            "0: foreign_official.CoTAttention -> cotnet_ext.CoTAttention",
        )
    ]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("yolov5s.pt",), {}, "model must be a torch.nn.Module, got str"),
        (
            ({"model": nn.ReLU()},),
            {},
            "model must be a torch.nn.Module, got dict; a checkpoint that holds a whole model "
            "usually has it under 'model' or 'ema'",
        ),
        ((nn.ReLU(),), {"dry_run": 1}, "dry_run must be a bool, got 1"),
        ((nn.ReLU(),), {"report": True}, "report must be a list to add to, got bool"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(TypeError) as refused:
        convert(*arguments, **options)
    assert str(refused.value) == message
