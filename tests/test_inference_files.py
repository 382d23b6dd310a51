"""optimize_for_inference: copies and files of models whose blocks became graphs."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from optimised import Residual, calibrate
from torch import Tensor, nn

from cotnet_ext import optimize_for_inference
from cotnet_ext.models import create_model


class Annotated(Residual):
    """With types in its signature, which are strings in this file."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class AnnotatedByClasses(Residual):
    """The types themselves, as in a file without postponed annotations."""

    def forward(self, x):
        return super().forward(x)


AnnotatedByClasses.forward.__annotations__ = {"x": Tensor, "return": Tensor}


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_copies(fast: nn.Module, images: Tensor) -> None:
    assert any(isinstance(module, torch.fx.GraphModule) for module in fast.modules())
    with torch.no_grad():
        expected = fast(images)
        for twin in (
            copy.deepcopy(fast),
            pickle.loads(pickle.dumps(fast)),
            pickle.loads(pickle.dumps(copy.deepcopy(fast))),
            saved_and_loaded(fast),
        ):
            assert torch.equal(twin(images), expected)


@pytest.mark.parametrize("kind", [Annotated, AnnotatedByClasses])
def test_blocks_with_types_in_their_signature(kind):
    images = torch.randn(2, 16, 9, 7)
    model = calibrate(nn.Sequential(kind(), kind()), images)
    assert_copies(optimize_for_inference(model), images)


@pytest.mark.parametrize("name", ["cotnet50", "cotnext50_2x48d", "se_cotnetd_50"])
def test_networks(name):
    images = torch.randn(1, 3, 64, 64)
    model = create_model(name, num_classes=5).eval()
    assert_copies(optimize_for_inference(model), images)
