"""What a function that stands for a whole layer must not do differently from its modules."""

from __future__ import annotations

import gc

import pytest
import torch
from cases import randn
from layers import both_modes, build, every_kind, make_input
from torch import Tensor, nn

from cotnet_ext import modules, reference


def tensors_alive() -> int:
    gc.collect()
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


@every_kind
def test_steps_leave_no_tensors(name):
    layer, x = build(modules, name), make_input(name).requires_grad_()
    counts = []
    for _ in range(3):
        for _ in range(5):
            layer(x).sum().backward()
            layer(x)  # and one without a backward
        counts.append(tensors_alive())
    assert counts[2] <= counts[0]


def second_order(layer: nn.Module, x: Tensor, leaves: list[Tensor], between) -> list[Tensor]:
    """Gradients of the leaves, and of the first one's squares."""
    y = layer(x)
    between(layer)
    found = torch.autograd.grad(y, leaves, randn(*y.shape, key="grad"), create_graph=True)
    return [*found, *torch.autograd.grad(found[0].square().sum(), leaves, allow_unused=True)]


@every_kind
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_mode_may_change_before_the_backward(name, training):
    results = []
    for package in (modules, reference):
        layer = build(package, name).train(training)
        x = make_input(name).requires_grad_()
        results.append(second_order(layer, x, [x], lambda layer: layer.train(not training)))
        assert layer.training is not training
        assert all(part.training is not training for part in layer.modules())
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@every_kind
def test_tied_parameters_count_once(name):
    results = []
    for package in (modules, reference):
        layer, x = build(package, name), make_input(name).requires_grad_()
        values = layer.value_embed if name == "attention" else layer.conv1x1
        tied = values[1].weight = layer.key_embed[1].weight
        results.append(second_order(layer, x, [tied, x], lambda layer: None))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@every_kind
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_images_stay_apart_in_evaluation(name, value):
    layer, x = build(modules, name).eval(), make_input(name)
    x[1, 3, 2, 2] = value
    x.requires_grad_()
    layer(x).sum().backward()
    others = [i for i in range(len(x)) if i != 1]
    assert x.grad[others].isfinite().all()
    assert not x.grad[1].isfinite().all()


@every_kind
@both_modes
def test_batches_of_gradients(name, training):
    """What `torch.autograd.functional.jacobian(vectorize=True)` asks for."""
    layer, x = build(modules, name).train(training), make_input(name).requires_grad_()
    inputs = [x, *layer.parameters()]
    y = layer(x)
    several = torch.stack([randn(*y.shape, key=i) for i in range(3)])
    batched = torch.autograd.grad(y, inputs, several, True, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(y, inputs, one, True) for one in several]
    for ours, theirs in zip(batched, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))
    # What is saved is needed by each of them, and may go with the last.
    last = torch.autograd.grad(y, inputs, several, is_grads_batched=True)
    for ours, theirs in zip(last, batched, strict=True):
        assert torch.equal(ours, theirs)
