"""`convert`: models of other people's layers compute the same, and what they hold is kept."""

from __future__ import annotations

import copy
import io

import pytest
import timm
import torch
from cases import randn
from conversions import converted, passes, settle, swapped
from detector import LAYERS, Detector
from foreign import official
from layers import assert_equal, both_modes, build, every_kind, make_input, run
from torch import nn
from torch.nn.utils import parametrizations, prune

import cotnet_ext
from cotnet_ext import convert
from cotnet_ext.conversion import Finding

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
