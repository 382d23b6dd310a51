"""Training steps of blocks where only a part of the block has a gradient."""

from __future__ import annotations

import pytest
import torch
from cases import randn
from layers import assert_equal
from test_models_training import block, both, image
from torch import Tensor, nn


def inner_map(made: nn.Module, x: Tensor) -> Tensor:
    """What the attention gets."""
    caught = []
    with made.conv2.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0])):
        made(x)
    return caught[0]


def without_attention(made: nn.Module, x: Tensor) -> Tensor:
    """The result, with what the attention leaves as a constant."""
    with made.conv2.register_forward_hook(lambda _, __, output: output.detach()):
        return made(x)


@pytest.mark.parametrize("kind", ["plain", "strided", "averaged"])
@pytest.mark.parametrize("part", [inner_map, without_attention])
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_a_part_of_the_block(kind, part, create_graph):
    """What has no part in the loss has no gradient, rather than a zero one."""
    results = []
    for made in both(kind):
        torch.manual_seed(3)
        x = image().requires_grad_()
        y = part(made, x)
        wanted = {"input": x, **dict(made.named_parameters())}
        grads = torch.autograd.grad(
            y, list(wanted.values()), randn(*y.shape, key="grad"),
            create_graph=create_graph, allow_unused=True,
        )  # fmt: skip
        results.append({key: g for key, g in zip(wanted, grads, strict=True) if g is not None})
    assert_equal(*results)


@pytest.mark.parametrize("kind", ["plain", "strided", "averaged"])
@pytest.mark.parametrize("part", [inner_map, without_attention])
def test_batches_of_gradients_of_a_part_of_the_block(kind, part):
    made, x = block(kind, True), image().requires_grad_()
    y = part(made, x)
    wanted = [x, *(p for p in made.parameters())]
    grads = randn(3, *y.shape, key="grads")

    def gradients(grad: Tensor, **options) -> dict[str, Tensor]:
        found = torch.autograd.grad(
            y, wanted, grad, retain_graph=True, allow_unused=True, **options
        )
        return {str(i): g for i, g in enumerate(found) if g is not None}

    single = [gradients(grad) for grad in grads]
    expected = {key: torch.stack([each[key] for each in single]) for key in single[0]}
    assert_equal(gradients(grads, is_grads_batched=True), expected)
