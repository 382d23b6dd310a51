"""Layers with submodules replaced, hooked, parametrized or pruned do what the reference does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layers import (
    assert_equal,
    build,
    every_kind,
    make_input,
    run,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from cotnet_ext import modules, reference


class Doubled(nn.BatchNorm2d):
    """A subclass that is not what its base class is."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input) + 1


def _swap(path: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    def change(layer: nn.Module) -> None:
        torch.manual_seed(5)
        layer.set_submodule(path, make(layer.get_submodule(path)).double())

    return change


def _group_norm(norm: nn.Module) -> nn.Module:
    channels = getattr(norm, "num_features", None) or norm.num_channels
    return nn.GroupNorm(2, channels)


def _all_norms(make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    def change(layer: nn.Module) -> None:
        for path, norm in list(layer.named_modules()):
            if type(norm) is nn.BatchNorm2d:
                _swap(path, make)(layer)

    return change


def _hooked(path: str) -> Callable[[nn.Module], None]:
    """A hook that changes what the submodule returns."""
    return lambda layer: layer.get_submodule(path).register_forward_hook(lambda *a: 2 * a[2])


def _pre_hooked(path: str) -> Callable[[nn.Module], None]:
    return lambda layer: layer.get_submodule(path).register_forward_pre_hook(
        lambda module, args: tuple(a / 2 for a in args)
    )


def _patched(path: str) -> Callable[[nn.Module], None]:
    """Another forward on the instance, as offloading tools do."""

    def change(layer: nn.Module) -> None:
        module = layer.get_submodule(path)
        original = module.forward
        module.forward = lambda *args: 2 * original(*args)

    return change


def _weight_norm(path: str) -> Callable[[nn.Module], None]:
    def change(layer: nn.Module) -> None:
        parametrizations.weight_norm(layer.get_submodule(path))
        layer.get_submodule(path).parametrizations.weight.original0.data.mul_(1.5)

    return change


def _pruned(path: str) -> Callable[[nn.Module], None]:
    return lambda layer: prune.l1_unstructured(layer.get_submodule(path), "weight", 0.5)


def _wider(conv: nn.Module) -> nn.Module:
    """A convolution that looks at the neighbours as well."""
    return nn.Conv2d(
        conv.in_channels, conv.out_channels, 3, padding=1, groups=conv.groups, bias=False
    )


def _biased(conv: nn.Module) -> nn.Module:
    return nn.Conv2d(conv.in_channels, conv.out_channels, 1, groups=conv.groups, bias=True)


def _regrouped(conv: nn.Module) -> nn.Module:
    groups = 2 if conv.groups == 1 else 1
    return nn.Conv2d(conv.in_channels, conv.out_channels, 1, groups=groups, bias=False)


def _sequence_with_more(sequence: nn.Module) -> nn.Module:
    return nn.Sequential(*sequence, nn.Tanh())


def _group_norm_with(**options) -> Callable[[nn.Module], nn.Module]:
    return lambda norm: nn.GroupNorm(norm.num_groups, norm.num_channels, **options)


EVERYWHERE = {
    "norms become GroupNorm": _all_norms(_group_norm),
    "norms become Identity": _all_norms(lambda norm: nn.Identity()),
    "norms become a subclass": _all_norms(lambda norm: Doubled(norm.num_features)),
    "norms without running statistics": _all_norms(
        lambda norm: nn.BatchNorm2d(norm.num_features, track_running_stats=False)
    ),
    "norms without parameters": _all_norms(
        lambda norm: nn.BatchNorm2d(norm.num_features, affine=False)
    ),
}
IN_ATTENTION = {
    "first becomes 3x3": _swap("attention_embed.0", _wider),
    "first has a bias": _swap("attention_embed.0", _biased),
    "first is regrouped": _swap("attention_embed.0", _regrouped),
    "first is hooked": _hooked("attention_embed.0"),
    "first is pruned": _pruned("attention_embed.0"),
    "last becomes 3x3": _swap("attention_embed.3", _wider),
    "last is hooked": _hooked("attention_embed.3"),
    "last is regrouped": _swap("attention_embed.3", _regrouped),
    "last has a weight norm": _weight_norm("attention_embed.3"),
    "last is patched": _patched("attention_embed.3"),
    "embedding is hooked": _hooked("attention_embed"),
    "embedding is longer": _swap("attention_embed", _sequence_with_more),
    "value is hooked": _hooked("value_embed"),
}
IN_LAYERS = {
    "first becomes 3x3": _swap("embed.0", _wider),
    "first has a bias": _swap("embed.0", _biased),
    "first is regrouped": _swap("embed.0", _regrouped),
    "first is hooked": _hooked("embed.0"),
    "first is pre-hooked": _pre_hooked("embed.0"),
    "first has a weight norm": _weight_norm("embed.0"),
    "first is patched": _patched("embed.0"),
    "second becomes 3x3": _swap("embed.3", _wider),
    "second is regrouped": _swap("embed.3", _regrouped),
    "value is regrouped": _swap("conv1x1.0", _regrouped),
    "value is hooked": _hooked("conv1x1.0"),
    "group norm becomes Identity": _swap("embed.4", lambda norm: nn.Identity()),
    "group norm has one group": _swap("embed.4", lambda norm: nn.GroupNorm(1, norm.num_channels)),
    "group norm has a large eps": _swap("embed.4", _group_norm_with(eps=0.3)),
    "group norm has no parameters": _swap("embed.4", _group_norm_with(affine=False)),
    "group norm is hooked": _hooked("embed.4"),
    "group norm is patched": _patched("embed.4"),
    "embedding is hooked": _hooked("embed"),
    "embedding is longer": _swap("embed", _sequence_with_more),
    "aggregation is hooked": _hooked("local_conv"),
    "aggregation is pre-hooked": _pre_hooked("local_conv"),
    "aggregation reflects": lambda layer: setattr(layer.local_conv, "pad_mode", 1),
    "aggregation is dilated": lambda layer: (
        setattr(layer.local_conv, "dilation", 2),
        setattr(layer.local_conv, "padding", 2),
    ),
    "activation becomes Tanh": _swap("act", lambda act: nn.Tanh()),
}
CHANGES = [
    pytest.param(name, change, id=f"{name}-{text}")
    for name, changes in (
        ("attention", EVERYWHERE | IN_ATTENTION),
        ("cot", EVERYWHERE | IN_LAYERS),
        ("coxt", EVERYWHERE | IN_LAYERS),
    )
    for text, change in changes.items()
]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_changed_submodules_are_respected(name, change):
    x = make_input(name)
    ours, theirs = (build(package, name) for package in (modules, reference))
    untouched = run(theirs, x)["output"]
    theirs = build(reference, name)
    change(ours)
    change(theirs)
    expected = run(theirs, x)
    assert not torch.allclose(expected["output"], untouched), "the change has no effect"
    assert_equal(run(ours, x), expected)
    assert_equal(run(ours.eval(), x), run(theirs.eval(), x))


@every_kind
def test_hooks_on_every_submodule(name):
    seen = []
    for package in (modules, reference):
        layer = build(package, name).eval()
        calls = {}
        for path, module in layer.named_modules():
            module.register_forward_hook(
                lambda module, args, result, path=path, calls=calls: calls.setdefault(
                    path, []
                ).append(result.detach().clone())
            )
        layer(make_input(name))
        seen.append(calls)
    ours, theirs = seen
    assert set(ours) == set(theirs)
    for path, results in theirs.items():
        assert len(ours[path]) == len(results) == 1, path
        torch.testing.assert_close(ours[path][0], results[0], msg=path)


@every_kind
def test_global_hooks_see_every_submodule(name):
    layer = build(modules, name)
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        layer(make_input(name))
    finally:
        handle.remove()
    assert seen == set(layer.modules())


@every_kind
def test_sync_batch_norm_in_evaluation(name):
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(build(modules, name)).eval()
    x = make_input(name)
    torch.testing.assert_close(ours(x), build(reference, name).eval()(x))


@pytest.mark.parametrize("name", ["cot", "coxt"])
def test_norms_left_in_float32(name):
    x = make_input(name, torch.bfloat16)
    layers = [build(package, name, torch.bfloat16).eval() for package in (modules, reference)]
    for layer in layers:
        layer.embed[4].float()
    ours, theirs = (layer(x) for layer in layers)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
