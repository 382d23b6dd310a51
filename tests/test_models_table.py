"""The table of the networks: counted again, and as the README prints it."""

from __future__ import annotations

import pytest
import torch
from networks_table import DOCUMENTS, parts, render
from torch import nn

from cotnet_ext import reference
from cotnet_ext.models import VARIANTS, create_model


def count_macs(model: nn.Module, images: torch.Tensor) -> int:
    """Multiplications of convolutions, classifier and aggregations for these images."""
    total = 0

    def count(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, reference.LocalConvolution):
            total += output.numel() * module.kernel_size**2

    for module in model.modules():
        module.register_forward_hook(count)
    model(images)
    return total


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_costs_are_counted(variant):
    with torch.device("meta"):
        model = create_model(variant.name, reference=True).eval()
        macs = count_macs(model, torch.empty(1, *variant.input_size))
    assert sum(p.numel() for p in model.parameters()) == variant.params
    assert float(f"{macs / 1e9:.4g}") == variant.gmacs


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_have_this_table(document):
    assert parts(document)[1] == render(), "run: python tests/networks_table.py"
