"""The public functions as names: signatures, defaults, re-exports, documentation."""

from __future__ import annotations

import inspect

import pytest
import torch
from oracle import FUNCTIONS

import cotnet_ext
from cotnet_ext import functional, reference

WINDOW = "kernel_size=3, stride=1, padding=0, dilation=1, *, padding_mode='zeros'"
SIGNATURES = {
    "local_aggregation": f"input, weight, {WINDOW}",
    "softmax_aggregation": f"input, logits, {WINDOW}",
    "group_norm_aggregation": (
        f"input, weight, norm_weight=None, norm_bias=None, eps=1e-05, {WINDOW}"
    ),
    "spatial_softmax_gate": "logits, value, static",
    "context_fusion": "dynamic, static, logits",
}


def _signature(function) -> str:
    """Names, defaults and kinds of the parameters, without annotations."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def test_every_function_is_tested():
    assert {function.name for function in FUNCTIONS} == set(SIGNATURES) == set(functional.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
@pytest.mark.parametrize("module", [functional, reference], ids=["functional", "reference"])
def test_signature(module, name):
    assert _signature(getattr(module, name)) == f"({SIGNATURES[name]})"


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_package_exports_the_function_itself(name):
    assert getattr(cotnet_ext, name) is getattr(functional, name)
    assert name in cotnet_ext.__all__


@pytest.mark.parametrize("name", SIGNATURES)
def test_documentation(name):
    """Formula, arguments, result and errors are in every docstring; every parameter is named."""
    documentation = inspect.getdoc(getattr(functional, name))
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in documentation
    for parameter in inspect.signature(getattr(functional, name)).parameters:
        assert parameter in documentation


def test_meta_tensors_without_gradients():
    """Shapes are found for devices that know no autocast."""
    input, weight = (
        torch.empty(2, 8, 5, 6, device="meta"),
        torch.empty(2, 1, 4, 9, 5, 6, device="meta"),
    )
    with torch.no_grad():
        assert functional.local_aggregation(input, weight, padding=1).shape == (2, 8, 5, 6)
