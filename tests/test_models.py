"""The networks beside the official ones: names, shapes, numbers, initialisation."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest
import torch
from official_weights import official_weights, summary
from torch import nn

import cotnet_ext
from cotnet_ext import models, reference
from cotnet_ext.models import create_model, list_models

DATA = Path(__file__).parent / "data"
STATE_DICTS = json.loads(gzip.decompress((DATA / "official_state_dicts.json.gz").read_bytes()))
OUTPUTS = json.loads((DATA / "official_outputs.json").read_text())
# One of each kind: plain, grouped, with split attention, with blur pooling.
KINDS = ("cotnet50", "cotnext50_2x48d", "se_cotnetd_50", "se_cotnetd_152")


def on_meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **options)


# ---- As the official networks --------------------------------------------------------------------


def test_names_are_the_official_ones():
    assert sorted(list_models()) == sorted(STATE_DICTS)
    assert cotnet_ext.models is models
    for name in list_models():
        assert name in models.__all__
        assert getattr(models, name).__name__ == name


@pytest.mark.parametrize("name", STATE_DICTS)
def test_keys_and_shapes_are_the_official_ones(name):
    for plain in (False, True):
        state = on_meta(name, reference=plain).state_dict()
        assert [[key, list(value.shape)] for key, value in state.items()] == STATE_DICTS[name]


@pytest.mark.parametrize("name", OUTPUTS)
def test_numbers_are_the_official_ones(name):
    """Logits, loss, gradient norms by stage and running statistics in float64."""
    model = create_model(name).double()
    weights = official_weights(model.state_dict())
    for mode, expected in OUTPUTS[name].items():
        model.load_state_dict(weights)
        actual = summary(model, training=mode == "train")
        # The statistics of a batch of two images with 2x2 pixels in the end multiply roundings.
        tolerance = {"eval": 1e-10, "train": 1e-6}[mode]
        for what, numbers in expected.items():
            error = max(abs(x - y) for x, y in zip(actual[what], numbers, strict=True))
            assert error <= tolerance * max(map(abs, numbers)), f"{mode}, {what}: {error:.1e}"


@pytest.mark.parametrize("name", KINDS)
def test_initialisation(name):
    """He's for convolutions, norms at identity, the last norm of a block at zero."""
    model = create_model(name)
    for key, value in model.state_dict().items():
        module = model.get_submodule(key.rpartition(".")[0])
        if isinstance(module, nn.Conv2d) and value.dim() == 4:
            fan_out = value.shape[0] * value.shape[2] * value.shape[3]
            expected = (2 / fan_out) ** 0.5
            assert value.std().item() == pytest.approx(expected, rel=0.2), key
        elif isinstance(module, nn.BatchNorm2d) and key.endswith("weight"):
            assert (value == (0 if key.endswith("bn3.weight") else 1)).all(), key
        elif isinstance(module, nn.BatchNorm2d) and key.endswith("bias"):
            assert (value == 0).all(), key


def test_the_same_seed_gives_the_same_weights_as_the_reference():
    networks = []
    for plain in (False, True):
        torch.manual_seed(1)
        networks.append(create_model("se_cotnetd_50", reference=plain).state_dict())
    assert all(torch.equal(networks[0][key], networks[1][key]) for key in networks[0])


def test_reference_is_made_of_the_reference_modules():
    ours, plain = on_meta("cotnext50_2x48d"), on_meta("cotnext50_2x48d", reference=True)
    count = sum(isinstance(module, cotnet_ext.CoXtLayer) for module in ours.modules())
    assert count == 16
    assert sum(isinstance(module, reference.CoXtLayer) for module in plain.modules()) == count
    assert not any(isinstance(module, cotnet_ext.CoXtLayer) for module in plain.modules())


def test_building_is_quick():
    start = time.process_time()  # seconds of processors, which other processes do not lengthen
    create_model("se_cotnetd_270")
    assert time.process_time() - start < 3
