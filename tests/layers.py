"""The layers under test, each beside its reference, and what one pass of them gives."""

from __future__ import annotations

import pytest
import torch
from cases import randn
from torch import Tensor, nn

# In narrow dtypes a result may be this many times as far from the truth as the reference is.
FACTOR = 4.0

# name: class, constructor arguments, shape of the input.
LAYERS = {
    "attention": ("CoTAttention", (16, 3), (3, 16, 7, 6)),
    "attention_k5": ("CoTAttention", (8, 5), (2, 8, 9, 10)),
    "attention_k1": ("CoTAttention", (8, 1), (4, 8, 5, 5)),
    "attention_wide_and_small": ("CoTAttention", (128, 3), (6, 128, 4, 5)),
    "cot": ("CotLayer", (16, 3), (6, 16, 7, 6)),
    "cot_k5": ("CotLayer", (24, 5), (5, 24, 8, 9)),
    "cot_k1": ("CotLayer", (8, 1), (6, 8, 5, 5)),
    "cot_wide_and_small": ("CotLayer", (128, 3), (6, 128, 4, 5)),
    "coxt": ("CoXtLayer", (32, 3), (6, 32, 7, 6)),
    "coxt_k5": ("CoXtLayer", (16, 5), (5, 16, 8, 9)),
    "coxt_wide_and_small": ("CoXtLayer", (128, 3), (6, 128, 4, 5)),
}
# One of each, for what does not depend on sizes.
KINDS = ("attention", "cot", "coxt")

every_layer = pytest.mark.parametrize("name", LAYERS)
every_kind = pytest.mark.parametrize("name", KINDS)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
both_layouts = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"]
)


def build(package, name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A layer of `modules` or `reference` whose norms are not at their trivial start."""
    kind, arguments, _ = LAYERS[name]
    torch.manual_seed(0)
    layer = getattr(package, kind)(*arguments)
    for key, t in [*layer.named_parameters(), *layer.named_buffers()]:
        if t.is_floating_point() and t.dim() == 1:
            values = randn(*t.shape, key=(name, key)) / 2
            t.data.copy_(values.square() + 0.5 if "var" in key else values + ("weight" in key))
    return layer.to(dtype)


def smooth(layer: nn.Module) -> nn.Module:
    """The layer without kinks, at which a rounding may turn a gradient on or off."""
    for path, module in list(layer.named_modules()):
        if isinstance(module, nn.ReLU):
            layer.set_submodule(path, nn.SiLU())
    return layer


def make_input(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(*LAYERS[name][2], dtype=dtype, key=(name, "input"))


def run(layer: nn.Module, x: Tensor, layout=torch.contiguous_format) -> dict[str, Tensor]:
    """Output, gradients of the input and of all parameters, and buffers after one pass."""
    leaf = x.detach().clone(memory_format=layout).requires_grad_()
    layer.zero_grad()
    y = layer(leaf)
    y.backward(randn(*y.shape, dtype=y.dtype, key="grad"))
    results = {"output": y.detach(), "input": leaf.grad}
    results |= {key: p.grad for key, p in layer.named_parameters()}
    return results | {key: b.clone() for key, b in layer.named_buffers()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to float64 rounding, name by name."""
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        torch.testing.assert_close(
            actual[key], value, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
        )


def assert_no_worse(
    actual: dict[str, Tensor], truth: dict[str, Tensor], same: dict[str, Tensor]
) -> None:
    """Not much further from the float64 truth than the reference in the same dtype is.

    The distance is that of whole tensors; single elements are compared in float64.
    """
    assert list(actual) == list(truth)
    for key, value in actual.items():
        assert value.dtype == same[key].dtype, key
        if not value.is_floating_point():
            assert torch.equal(value, truth[key]), key
            continue
        error, reference_error = (
            torch.linalg.vector_norm(t.double() - truth[key]) for t in (value, same[key])
        )
        rounding = torch.finfo(value.dtype).eps * torch.linalg.vector_norm(truth[key])
        limit = FACTOR * reference_error + rounding
        assert error <= limit, f"{key}: off by {error:.3g}, the reference by {reference_error:.3g}"
