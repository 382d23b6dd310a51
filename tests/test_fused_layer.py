"""A training step of a layer as one function: when it is taken, and that it is right.

That outputs, gradients and buffers are those of the reference, in every dtype and layout, is in
test_modules.py, which meets this path wherever a gradient is recorded.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from cases import randn
from layers import (
    assert_equal,
    assert_no_worse,
    both_layouts,
    build,
    every_kind,
    make_input,
    run,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from cotnet_ext import cli, modules, reference
from cotnet_ext._fusable import explain, is_fusable, why_not_fusable

CONTEXTUAL = ("cot", "coxt")
FUNCTIONS = {"attention": "_Attention", "cot": "_Layer", "coxt": "_Layer"}


def is_fused(name: str, y: Tensor) -> bool:
    return type(y.grad_fn).__name__ == f"{FUNCTIONS[name]}Backward"


def embed(layer: nn.Module) -> nn.Sequential:
    return layer.attention_embed if hasattr(layer, "attention_embed") else layer.embed


def values(layer: nn.Module) -> nn.Sequential:
    return layer.value_embed if hasattr(layer, "value_embed") else layer.conv1x1


def leaf(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return make_input(name, dtype).requires_grad_()


# --- when ----------------------------------------------------------------------------------------


@every_kind
@both_layouts
def test_taken_for_what_the_constructor_made(name, layout):
    x = leaf(name).detach().contiguous(memory_format=layout)
    assert why_not_fusable(build(modules, name), x) is None
    assert why_not_fusable(build(modules, name).eval(), x) is None
    y = build(modules, name)(x)
    assert is_fused(name, y)
    assert y.is_contiguous(memory_format=layout)


def _set(path: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], object]:
    return lambda layer: layer.set_submodule(path, make(layer.get_submodule(path)))


def _attribute(path: str, name: str, value: object) -> Callable[[nn.Module], object]:
    return lambda layer: setattr(layer.get_submodule(path), name, value)


def _wrapped(layer: nn.Module) -> None:
    layer.key_embed[1].weight = nn.Parameter(_Tagged(layer.key_embed[1].weight.detach()))


class _Tagged(Tensor):
    """A tensor of somebody's own class."""


Changes = dict[str, tuple[Callable[[nn.Module], object], str]]

# What to change, and how the reason begins.
WHY_NOT: Changes = {
    "SyncBatchNorm": (
        _set("key_embed.1", nn.SyncBatchNorm.convert_sync_batchnorm),
        "key_embed.1 is a SyncBatchNorm, not a BatchNorm2d",
    ),
    "more modules": (
        lambda layer: layer.key_embed.append(nn.Identity()),
        "key_embed has 4 modules, not 3",
    ),
    "a forward hook": (
        lambda layer: layer.key_embed[1].register_forward_hook(lambda *a: None),
        "key_embed.1 has hooks",
    ),
    "a backward hook": (
        lambda layer: layer.key_embed.register_full_backward_hook(lambda *a: None),
        "key_embed has hooks",
    ),
    "parametrized": (
        lambda layer: parametrizations.weight_norm(layer.key_embed[0]),
        "key_embed.0 is a ParametrizedConv2d, not a Conv2d",
    ),
    "another stride": (
        _attribute("key_embed.0", "stride", (2, 2)),
        "key_embed.0 has another window or other channels",
    ),
    "another dtype": (lambda layer: layer.key_embed[0].float(), "its key is torch.float32"),
    "a tensor subclass": (_wrapped, "its key_weight is a _Tagged"),
    "nothing to learn": (
        lambda layer: layer.requires_grad_(False),
        "nothing in it needs a gradient",
    ),
}
WHY_NOT_ATTENTION: Changes = {
    "another norm": (
        _set("value_embed.1", lambda m: nn.GroupNorm(2, m.num_features).double()),
        "value_embed.1 is a GroupNorm, not a BatchNorm2d",
    ),
    "another activation": (
        _set("attention_embed.2", lambda m: nn.GELU()),
        "attention_embed.2 is a GELU, not a ReLU",
    ),
    "other channels": (
        _attribute("attention_embed.3", "out_channels", 16),
        "attention_embed.3 has another window or other channels",
    ),
    "a bias": (
        lambda layer: layer.value_embed[0].register_parameter("bias", layer.value_embed[1].bias),
        "value_embed.0 has a bias",
    ),
}
WHY_NOT_CONTEXTUAL: Changes = {
    "another norm": (
        _set("bn", lambda m: nn.GroupNorm(2, m.num_features).double()),
        "bn is a GroupNorm, not a BatchNorm2d",
    ),
    "a norm left out": (
        _set("conv1x1.1", lambda m: nn.Identity()),
        "conv1x1.1 is a Identity, not a BatchNorm2d",
    ),
    "another activation": (_set("act", lambda m: nn.GELU()), "act is a GELU, not a SiLU"),
    "more modules": (
        lambda layer: layer.se.append(nn.Identity()),
        "se has 5 modules, not 4",
    ),
    "another forward": (
        _attribute("local_conv", "forward", lambda x, w: x),
        "local_conv has a forward of its own",
    ),
    "a bias": (
        lambda layer: layer.conv1x1[0].register_parameter("bias", layer.bn.bias),
        "conv1x1.0 has a bias",
    ),
    "other groups": (_attribute("embed.4", "num_groups", 1), "embed.4 has 1 groups, not "),
    "another window": (_attribute("local_conv", "pad_mode", 1), "local_conv has another window"),
}
CHANGES = [
    *((name, *change) for name in FUNCTIONS for change in WHY_NOT.items()),
    *(("attention", *change) for change in WHY_NOT_ATTENTION.items()),
    *((name, *change) for name in CONTEXTUAL for change in WHY_NOT_CONTEXTUAL.items()),
]


@pytest.mark.parametrize(
    "name, apply, reason",
    [(name, apply, reason) for name, _, (apply, reason) in CHANGES],
    ids=[f"{name}-{what}" for name, what, _ in CHANGES],
)
def test_says_why_not(name, apply, reason, caplog):
    layer, x = build(modules, name), make_input(name)
    apply(layer)
    assert why_not_fusable(layer, x).startswith(reason)
    with caplog.at_level(logging.DEBUG, logger="cotnet_ext"):
        assert not is_fusable(layer, x)
    (said,) = caplog.messages
    assert said.startswith(f"{type(layer).__name__} takes the composed path: {reason}")


def test_says_nothing_unless_asked(caplog):
    layer = build(modules, "cot")
    layer.act = nn.GELU()
    assert not is_fusable(layer, make_input("cot"))
    assert caplog.messages == []


@every_kind
def test_other_circumstances(name):
    layer, x = build(modules, name), make_input(name)
    with torch.no_grad():
        assert why_not_fusable(layer, x) == "no gradient is recorded"
    assert why_not_fusable(layer, x.to("meta")) == "its input is on meta"
    assert why_not_fusable(layer, x[:0]) == "its input is empty"
    one_value = "a BatchNorm has one value for each channel"
    assert why_not_fusable(layer, x[:1, :, :1, :1]) == one_value
    assert why_not_fusable(layer, x[:1]) == (one_value if name in CONTEXTUAL else None)
    assert why_not_fusable(layer, x.as_subclass(_Tagged)) == "its input is a _Tagged"
    seen = []
    layer.eval()
    torch.func.grad(lambda x: seen.append(why_not_fusable(layer, x)) or layer(x).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        seen.append(why_not_fusable(layer, x))
    assert seen == ["it runs under torch.func", "it runs in forward mode"]


def test_a_network_is_explained():
    layers = (build(modules, name) for name in ("cot", "coxt", "attention"))
    model = nn.Sequential(nn.ReLU(), *layers)
    model[2].act = nn.GELU()
    assert explain(model) == {"1": None, "2": "act is a GELU, not a SiLU", "3": None}


def test_the_command_explains(capsys):
    assert cli.main(["info", "--explain", "cotnet50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16  # blocks of the network
    assert all(line.split() == [line.split()[0], "fused"] for line in lines)
    assert cli.main(["info", "--explain", "cotnet5"]) == 2
    assert "cotnet50" in capsys.readouterr().err


# --- numbers -------------------------------------------------------------------------------------


@every_kind
def test_equals_the_composed_layer(name, monkeypatch):
    x = make_input(name)
    for training in (True, False):
        fused = run(build(modules, name).train(training), x)
        with monkeypatch.context() as patch:
            patch.setattr(modules, "is_fusable", lambda layer, input: False)
            composed = run(build(modules, name).train(training), x)
        assert_equal(fused, composed)


def _frozen(layer: nn.Module) -> None:
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


def _cumulative(layer: nn.Module) -> None:
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None


def _some_frozen(layer: nn.Module) -> None:
    values(layer)[1].eval()
    if hasattr(layer, "se"):
        layer.se[1].eval()


def _shared(layer: nn.Module) -> None:
    last = layer.bn if hasattr(layer, "bn") else values(layer)[1]
    last.weight = layer.key_embed[1].weight
    values(layer)[1].bias = layer.key_embed[1].bias


def _one_norm_twice(layer: nn.Module) -> None:
    values(layer)[1] = layer.key_embed[1]


@every_kind
@pytest.mark.parametrize("change", [_frozen, _cumulative, _some_frozen, _shared, _one_norm_twice])
def test_changed_norms(name, change):
    """Fused all the same, with the numbers of the reference over several steps."""
    ours, theirs = build(modules, name), build(reference, name)
    for layer in (ours, theirs):
        change(layer)
    for step in range(2):
        x = make_input(name) + step
        assert why_not_fusable(ours, x) is None
        actual, expected = (_results(layer, x) for layer in (ours, theirs))
        assert_equal(actual, expected)


def _results(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """As `run`, without the parameters that have no gradient."""
    x = x.detach().requires_grad_()
    learned = {k: p for k, p in layer.named_parameters() if p.requires_grad}
    y = layer(x)
    grads = torch.autograd.grad(y, [x, *learned.values()], randn(*y.shape, key="grad"))
    found = dict(zip(["input", *learned], grads, strict=True))
    return {"output": y.detach(), **found, **{k: b.clone() for k, b in layer.named_buffers()}}


PARTS = {
    "attention": ("attention_embed.0", "attention_embed.1", "attention_embed.3", "value_embed"),
    "cot": ("embed.0", "embed.3", "embed.4", "conv1x1", "bn", "se.0", "se.1"),
}
PARTS["coxt"] = PARTS["cot"]


@pytest.mark.parametrize(
    "name, prefix",
    [(name, part) for name, own in PARTS.items() for part in ("input", "key_embed.0", *own)],
)
def test_subsets_that_need_a_gradient(name, prefix):
    """Only what is asked for is given, and it is what it always is."""
    layer = build(modules, name)
    expected = run(layer, make_input(name))
    layer = build(modules, name)
    for key, parameter in layer.named_parameters():
        parameter.requires_grad_(key.startswith(prefix))
    x = make_input(name).requires_grad_(prefix == "input")
    y = layer(x)
    assert is_fused(name, y)
    y.backward(randn(*y.shape, key="grad"))
    for key, tensor in {"input": x, **dict(layer.named_parameters())}.items():
        if key.startswith(prefix):
            torch.testing.assert_close(tensor.grad, expected[key], msg=key)
        else:
            assert tensor.grad is None, key


@every_kind
def test_derivatives_of_the_gradient(name):
    """A gradient penalty: the backward is differentiated once more."""
    results = []
    for package in (modules, reference):
        layer, x = build(package, name), leaf(name)
        y = layer(x)
        (grad,) = torch.autograd.grad(y, x, randn(*y.shape, key="grad"), create_graph=True)
        grad.square().sum().backward()
        found = {key: p.grad for key, p in layer.named_parameters() if p.grad is not None}
        results.append({"grad": grad.detach(), "input": x.grad, **found})
        results[-1] |= {key: b.clone() for key, b in layer.named_buffers()}
    assert_equal(*results)


@every_kind
def test_the_graph_can_be_kept(name):
    layer, x = build(modules, name), leaf(name)
    y = layer(x)
    first = torch.autograd.grad(y.sum(), [x, *layer.parameters()], retain_graph=True)
    second = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)


@every_kind
def test_changes_in_place_are_noticed(name):
    layer, x = build(modules, name), leaf(name)
    y = layer(x)
    with torch.no_grad():
        embed(layer)[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_kind
def test_hooks_of_parameters_fire_once(name):
    layer, x = build(modules, name), leaf(name)
    expected = run(build(modules, name), make_input(name))
    seen = []
    for key, parameter in layer.named_parameters():
        parameter.register_hook(lambda grad, key=key: seen.append(key) or 2 * grad)
    y = layer(x)
    y.backward(randn(*y.shape, key="grad"))
    assert sorted(seen) == sorted(key for key, _ in layer.named_parameters())
    for key, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * expected[key], msg=key)


@every_kind
def test_checkpointed(name):
    """Recomputed once in the backward; running statistics move there too, as of any module."""
    layer, x = build(modules, name), leaf(name)
    expected = run(copy.deepcopy(layer), make_input(name))
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(1)
        return layer(2 * x)

    y = checkpoint(counted, x / 2, use_reentrant=False)
    y.backward(randn(*y.shape, key="grad"))
    assert len(calls) == 2
    torch.testing.assert_close(x.grad, expected["input"])
    for key, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], msg=key)


# Attention with many hidden maps: a ReLU that a rounding turns on or off then counts little.
@pytest.mark.parametrize("name", ["attention_wide_and_small", *CONTEXTUAL])
def test_autocast(name):
    """Computed in bfloat16, not worse than the reference in it, sums and norms in float32;
    gradients come in the dtype of the parameters."""
    x = make_input(name, torch.float32)
    truth = run(build(reference, name), x.double())
    narrow = run(build(reference, name, torch.bfloat16), x.bfloat16())
    layer = build(modules, name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert why_not_fusable(layer, x) is None
        actual = _run_cast(layer, x)
    assert actual["output"].dtype == torch.bfloat16
    same = {key: narrow[key].to(value.dtype) for key, value in actual.items()}
    assert_no_worse(actual, {key: truth[key] for key in actual}, same)


def _run_cast(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    with torch.autocast("cpu", enabled=False):
        y.backward(randn(*y.shape, dtype=torch.float64, key="grad").to(y.dtype))
    assert x.grad.dtype == x.dtype
    assert all(p.grad.dtype == p.dtype for p in layer.parameters())
    # Zero up to rounding: a norm follows, or a softmax over the map.
    skipped = {"se.0.bias", "attention_embed.3.bias"}
    grads = {key: p.grad for key, p in layer.named_parameters() if key not in skipped}
    return {"output": y.detach(), "input": x.grad, **grads}


# --- memory --------------------------------------------------------------------------------------


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Of the tensors kept for the backward, parameters aside."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert y.requires_grad
    return sum(kept.values())


@both_layouts
@pytest.mark.parametrize("size", [(64, 28), (256, 14), (128, 7)], ids=str)
@pytest.mark.parametrize(
    "kind, share", [("CoTAttention", 0.55), ("CotLayer", 0.45), ("CoXtLayer", 0.45)]
)
def test_saved_for_backward(kind, share, size, layout):
    """At most this share of what the reference keeps."""
    dim, width = size
    x = randn(4, dim, width, width, dtype=torch.float32).contiguous(memory_format=layout)
    x.requires_grad_()
    ours, theirs = (
        saved_bytes(getattr(package, kind)(dim, 3), x) for package in (modules, reference)
    )
    print(f"{ours / x.numel() / 4:.2f} of {theirs / x.numel() / 4:.2f} maps")
    assert ours <= share * theirs
