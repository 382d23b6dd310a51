"""The demo: what it measures with, that it runs without a terminal, and that it can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cotnet_ext import modules, reference
from cotnet_ext.demo import compare, digits, measure, photographs
from cotnet_ext.demo import run as demo


def test_peak_memory_is_exact():
    mib = 1 << 20

    def call():
        first = torch.empty(3 * mib, dtype=torch.uint8)
        second = torch.empty(2 * mib, dtype=torch.uint8)
        del first
        third = torch.empty(2 * mib, dtype=torch.uint8)
        return second, third

    assert measure.peak_bytes(call) == 5 * mib
    assert measure.peak_bytes(call) == 5 * mib


def test_error_is_in_units_of_the_largest_entry():
    exact = [torch.tensor([1.0, -8.0]), torch.zeros(2)]
    found = [torch.tensor([1.0, -8.0]), torch.tensor([0.0, 0.5])]
    assert measure.scaled_error(found, exact) == 0.5 / 8
    found[1][0] = torch.nan
    error = measure.scaled_error(found, exact)
    assert error != error


def test_median_of_calls_that_take_turns():
    order = []
    times = measure.median_seconds([lambda: order.append("a"), lambda: order.append("b")], 3)
    assert order == ["a", "b"] * 4
    assert len(times) == 2


@pytest.mark.parametrize("stage", photographs.STAGES)
def test_feature_maps_are_white(stage):
    """Channels of the maps are uncorrelated with mean 0 and variance 1 over the photographs."""
    photos = photographs.load_photographs()
    filters, bias = photographs.principal_filters(photos, stage)
    batch = torch.stack(list(photos.values()))
    values = nn.functional.conv2d(batch.double(), filters.double(), bias.double(), stride=4)
    values = values.transpose(0, 1).flatten(1)
    identity = torch.eye(stage.channels, dtype=torch.float64)
    torch.testing.assert_close(values.cov(correction=0), identity, rtol=0, atol=1e-3)
    torch.testing.assert_close(values.mean(1), torch.zeros_like(values[:, 0]), rtol=0, atol=1e-4)

    side = photographs.CROP // stage.stride
    maps = photographs.feature_maps(photos, stage, per_photograph=1)
    assert maps.shape == (2, stage.channels, side, side)


def small_maps() -> dict[int, torch.Tensor]:
    photos = photographs.load_photographs()
    return {
        stage.channels: photographs.feature_maps(photos, stage, 2)[..., :9, :11].contiguous()
        for stage in photographs.STAGES
    }


def test_every_function_and_module_is_compared():
    rows = list(compare.compare(small_maps(), seed=0, repeats=1))
    assert [row.name for row in rows if not row.passed] == []
    compared = {row.name for row in rows}
    assert compared == {
        *("local_aggregation", "softmax_aggregation", "group_norm_aggregation"),
        *("spatial_softmax_gate", "context_fusion"),
        *("LocalConvolution", "CoTAttention", "CotLayer", "CoXtLayer"),
    }


class Inexact(modules.CotLayer):
    """Off by one part in a thousand."""

    def forward(self, x):
        return super().forward(x) * 1.001


def test_a_wrong_module_is_found(monkeypatch):
    monkeypatch.setattr(compare.modules, "CotLayer", Inexact)
    failed = [row.name for row in compare.compare(small_maps(), 0, 1) if not row.passed]
    assert set(failed) == {"CotLayer"}


def test_a_fifth_of_the_digits_is_held_out():
    data = digits.load_digits(seed=3)
    assert data.images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    assert data.images.min() == -1
    assert data.images.max() == 1
    assert (data.test_labels.bincount() >= 34).all()
    again, other = digits.load_digits(seed=3), digits.load_digits(seed=4)
    assert torch.equal(data.images, again.images)
    assert not torch.equal(data.test_labels, other.test_labels)


def few(data: digits.Digits) -> digits.Digits:
    """Four batches of digits."""
    count = 4 * digits.BATCH
    return digits.Digits(
        data.images[:count], data.labels[:count], data.test_images, data.test_labels
    )


def test_training_is_repeatable_and_counted():
    data = few(digits.load_digits(seed=0))
    seen = []
    first = digits.train(modules, data, 0, 2, lambda training: seen.append(training.losses[-1]))
    second = digits.train(modules, data, 0, 2)
    assert first.losses == second.losses == seen
    assert len(first.losses) == 8
    assert len(first.accuracies) == 2
    assert first.epoch_losses[0] == pytest.approx(sum(first.losses[:4]) / 4)


def test_curves_are_judged():
    """The same network passes; one whose gradients are wrong by a percent does not."""

    class WrongGradient(modules.CotLayer):
        def forward(self, x):
            y = super().forward(x)
            return y + 0.01 * (y - y.detach())

    data = digits.load_digits(seed=0)
    wrong = SimpleNamespace(CotLayer=WrongGradient, CoTAttention=modules.CoTAttention)
    theirs, good, bad = (digits.train(kind, data, 0, 1) for kind in (reference, modules, wrong))
    assert all(check.holds for check in demo._learning(good, theirs))
    assert not all(check.holds for check in demo._learning(bad, theirs))


def test_accuracy_is_judged_after_a_whole_training():
    def trained(accuracy: float, epochs: int) -> digits.Training:
        return digits.Training(nn.Identity(), [1.0] * epochs, [accuracy] * epochs)

    def holds(accuracy: float, epochs: int) -> bool:
        training = trained(accuracy, epochs)
        return all(check.holds for check in demo._learning(training, training))

    assert holds(0.98, demo.EPOCHS)
    assert not holds(0.96, demo.EPOCHS)
    assert holds(0.5, demo.EPOCHS - 1)


def test_the_quick_demo_runs_without_a_terminal(tmp_path):
    """As in a log of a build server: no terminal, no UTF-8, no display."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "TERM": "dumb", "COLUMNS": "80"}
    environment.pop("DISPLAY", None)
    done = subprocess.run(
        [sys.executable, "-m", "cotnet_ext.cli", "demo", "--quick", "--epochs", "1"]
        + ["--threads", "2", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for case in compare.CASES:
        assert case.name in done.stdout
    assert "FAILED" not in done.stdout
    assert "digits, cotnet_ext" in done.stdout

    from PIL import Image

    with Image.open(tmp_path / demo.PICTURE) as picture:
        assert min(picture.size) > 1000
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(64 * 64)) > 100
