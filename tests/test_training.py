"""examples/train.py: what it learns, that it goes on after a kill as if nothing had been, and what
each of its options does."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from documents import environment
from training import checkpoint, data, loop, main
from training.distributed import World
from training.options import LAYERS, parse
from training_runs import (
    CONFIGS,
    EXAMPLES,
    SHORT,
    assert_same_run,
    flags,
    make_pictures,
    table,
    timeless,
    train,
)

# Everything that has a state of its own or draws random numbers.
STATEFUL = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "reprob": 0.5,
    "smoothing": 0.1,
    "ema": True,
    "ema_decay": 0.9,
    "amp": "float16",
    "clip_grad": 1.0,
    "accumulate": 2,
    "batch_size": 96,
    "width": 8,
    "epochs": 8,
    "warmup_epochs": 1,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The rows of `SHORT` as it is."""
    return train(tmp_path_factory.mktemp("plain"))


# ---- Going on after the end came too early -------------------------------------------------------


def test_a_killed_training_goes_on_as_if_nothing_had_been(tmp_path):
    """SIGKILL in the midst of an epoch; the rest is bit for bit that of the unbroken training."""
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    train(unbroken, **STATEFUL)

    options = dataclasses.replace(SHORT, out=str(killed), **STATEFUL)
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "train.py"), *flags(options)],
        env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not (killed / "last.pt").exists():
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    done = torch.load(killed / "last.pt", weights_only=True)["epoch"]
    assert 1 <= done < options.epochs

    train(killed, resume=True, **STATEFUL)
    assert_same_run(unbroken, killed)
    assert len(table(killed)) == options.epochs


def test_folders_with_workers_go_on_as_well(tmp_path, monkeypatch):
    """Augmentation in worker processes: their random numbers come from this one's."""
    changes = {
        "data": str(make_pictures(tmp_path / "data", train=4)),
        "image_size": 32, "workers": 1, "batch_size": 4, "epochs": 2,
        "aa": "rand-m15-mstd0.5-n2", "mixup": 0.8, "cutmix": 1.0, "reprob": 0.3,
    }  # fmt: skip
    train(tmp_path / "unbroken", **changes)

    def stop_after_one(run, log, epoch, epochs, original=main._epoch):
        if epoch:
            raise KeyboardInterrupt
        return original(run, log, epoch, epochs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(main, "_epoch", stop_after_one)
        train(tmp_path / "stopped", **changes)
    assert len(table(tmp_path / "stopped")) == 1
    train(tmp_path / "stopped", resume=True, **changes)
    assert_same_run(tmp_path / "unbroken", tmp_path / "stopped")


def test_resume_of_nothing_starts_and_of_the_end_ends(tmp_path, plain):
    rows = train(tmp_path, resume=True)
    assert timeless(rows) == timeless(plain)
    before = (tmp_path / "last.pt").read_bytes()
    assert train(tmp_path, resume=True) == rows
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save({"epoch": 1}, path)
    with pytest.raises(Exception, match="[Pp]ickle"):
        checkpoint.save({"epoch": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}


# ---- What it learns ------------------------------------------------------------------------------


def test_the_digits_are_learnt(tmp_path):
    """The configuration as it is, though fewer epochs: 97 of 100 after five."""
    options = parse(["--config", str(CONFIGS / "digits.yaml"), "--out", str(tmp_path)])
    options = dataclasses.replace(options, epochs=5, tensorboard=False)
    rows = main.train(options, World())
    assert rows[-1]["top1"] >= 97
    assert rows[-1]["top5"] >= rows[-1]["top1"]
    rates = [row["lr"] for row in rows]
    assert rates[0] < rates[1] < rates[2] > rates[3] > rates[4]


@pytest.mark.parametrize("layer", LAYERS)
def test_fused_and_reference_layers_learn_alike(tmp_path, layer):
    fused = train(tmp_path / "fused", layer=layer)
    plain = train(tmp_path / "reference", layer=layer, reference=True)
    for ours, theirs in zip(fused, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["test_loss"] == pytest.approx(theirs["test_loss"], abs=1e-3)
    assert fused[0]["loss"] > fused[1]["loss"]


def test_folders_are_learnt(tmp_path):
    """Red and blue pictures are told apart, with 3 + 3 of them in batches of 4 held out."""
    rows = train(
        tmp_path / "out", data=str(make_pictures(tmp_path / "data")), image_size=32, workers=0,
        batch_size=8, eval_batch_size=4, epochs=3, color_jitter=0.0, scale=(0.5, 1.0), depth=1,
    )  # fmt: skip
    assert rows[-1]["top1"] == 100
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_evaluation_counts_every_image_once(tmp_path):
    """Among several processes, each image is looked at by exactly one of them."""
    options = dataclasses.replace(SHORT, eval_batch_size=100)
    run, _ = main.set_up(options, World())
    whole = loop.evaluate(run, run.network)
    shares = [data.load(options, World(rank, 7)) for rank in range(7)]
    assert sum(share.test_count for share in shares) == 360
    scores, labels = [], []
    for share in shares:
        for images, numbers in share.test:
            with torch.no_grad():
                scores.append(run.network.eval()(images))
            labels.append(numbers)
    scores, labels = torch.cat(scores), torch.cat(labels)
    assert len(labels) == 360
    assert whole["top1"] == pytest.approx(float((scores.argmax(1) == labels).float().mean() * 100))
    among = (scores.topk(5).indices == labels[:, None]).any(1).float().mean() * 100
    assert whole["top5"] == pytest.approx(float(among))
    loss = torch.nn.functional.cross_entropy(scores, labels)
    assert whole["test_loss"] == pytest.approx(float(loss), rel=1e-5)


# ---- What the options do -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"channels_last": True}, 1e-4),
        ({"compile": "aot_eager"}, 1e-4),
        ({"amp": "bfloat16"}, 0.05),
        ({"amp": "float16"}, 0.01),
        ({"base_batch": 384, "lr": 0.4}, 1e-6),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_how_it_is_computed_changes_little(tmp_path, plain, changes, difference):
    rows = train(tmp_path, **changes)
    for row, expected in zip(rows, plain, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=difference)
    assert "amp" not in changes or timeless(rows) != timeless(plain)


def test_precision_and_layout_reach_the_layers(tmp_path):
    seen = []
    for changes in ({"amp": "bfloat16"}, {"channels_last": True}):
        run, _ = main.set_up(dataclasses.replace(SHORT, **changes), World())
        hook = lambda module, args, result: seen.append(result)  # noqa: E731
        run.network.layers[0].register_forward_hook(hook)
        loop._accumulate_gradients(run, iter(run.data.train))
    assert seen[0].dtype == torch.bfloat16
    assert seen[1].is_contiguous(memory_format=torch.channels_last)
    assert not seen[1].is_contiguous()


def gradients(**changes) -> list[torch.Tensor]:
    """Of the first update, without norms that see one batch at a time."""
    run, _ = main.set_up(dataclasses.replace(SHORT, **changes), World())
    run.network.eval()
    loop._accumulate_gradients(run, iter(run.data.train))
    return [parameter.grad for parameter in run.network.parameters()]


def test_accumulated_gradients_are_those_of_the_whole_batch():
    whole, parts = gradients(), gradients(batch_size=64, accumulate=3)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped(monkeypatch):
    run, _ = main.set_up(dataclasses.replace(SHORT, clip_grad=0.01), World())
    loop._accumulate_gradients(run, iter(run.data.train))
    monkeypatch.setattr(run.optimizer, "zero_grad", lambda: None)
    loop._update(run)
    norm = torch.stack([parameter.grad.norm() for parameter in run.network.parameters()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_the_average_follows_the_weights(tmp_path):
    run, _ = main.set_up(dataclasses.replace(SHORT, ema=True, ema_decay=0.75), World())
    start = run.network.head.weight.detach().clone()
    loop._accumulate_gradients(run, iter(run.data.train))
    loop._update(run)
    expected = 0.75 * start + 0.25 * run.network.head.weight
    torch.testing.assert_close(run.ema.module.head.weight, expected)
    rows = train(tmp_path, ema=True, ema_decay=0.5)
    saved = torch.load(tmp_path / "best.pt", weights_only=True)
    assert {"ema_top1", "ema_top5", "ema_test_loss"} <= set(rows[-1])
    assert set(saved["state_dict_ema"]) == set(saved["state_dict"])


def test_mixing_ends_at_its_epoch():
    options = dataclasses.replace(SHORT, mixup=0.8, mixup_off_epoch=1)
    run, _ = main.set_up(options, World())
    images, labels = next(iter(run.data.train))
    for epoch, mixed in ((0, True), (1, False)):
        run.data.start_epoch(epoch, options)
        _, shares = run.data.augment(images.clone(), labels)
        assert shares.shape == (len(labels), 10)
        assert bool((shares.max(1).values < 0.999).any()) is mixed


def test_schedule_by_epochs_is_that_of_the_official_recipe():
    """Linear from warmup_lr to lr, then a half cosine down to min_lr, one rate for an epoch."""
    options = dataclasses.replace(
        SHORT, epochs=10, warmup_epochs=2, warmup_lr=1e-4, min_lr=1e-5, lr=0.2,
        sched_on_updates=False,
    )  # fmt: skip
    run, epochs = main.set_up(options, World())
    assert epochs == 10
    rates = []
    for epoch in range(epochs):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.schedule.step_update((epoch + 1) * run.steps)
        run.schedule.step(epoch + 1)
    cosine = [1e-5 + 0.5 * (0.2 - 1e-5) * (1 + math.cos(math.pi * t / 10)) for t in range(2, 10)]
    assert rates == pytest.approx([1e-4, (1e-4 + 0.2) / 2, *cosine])
    assert run.optimizer.defaults["nesterov"] is True
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0, 5e-4}


def test_the_seed_decides(tmp_path, plain):
    again = train(tmp_path / "again")
    other = train(tmp_path / "other", seed=1)
    assert timeless(again) == timeless(plain)
    assert timeless(other) != timeless(plain)


# ---- What it leaves ------------------------------------------------------------------------------


def test_table_and_tensorboard_tell_the_same(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = train(tmp_path, tensorboard=True, log_interval=2)
    written = table(tmp_path)
    assert [float(row["loss"]) for row in written] == [row["loss"] for row in rows]
    assert list(written[0])[:6] == ["epoch", "lr", "loss", "test_loss", "top1", "top5"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"epoch/loss", "epoch/top1", "step/loss", "step/lr"} <= set(events.Tags()["scalars"])
    losses = events.Scalars("epoch/loss")
    assert [event.step for event in losses] == [7, 14]
    assert [event.value for event in losses] == pytest.approx([row["loss"] for row in rows])
    assert [event.step for event in events.Scalars("step/loss")] == [2, 4, 6, 9, 11, 13]


def test_an_epoch_that_was_lost_is_logged_once(tmp_path, monkeypatch):
    """Stopped after the second epoch was logged and before it was saved."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def fail(run, out, history, original=main._save):
        if len(history) == 2:
            raise KeyboardInterrupt
        original(run, out, history)

    options = {"tensorboard": True, "log_interval": 3}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(main, "_save", fail)
        train(tmp_path, **options)
    assert len(table(tmp_path)) == 2
    train(tmp_path, resume=True, **options)
    assert [row["epoch"] for row in table(tmp_path)] == ["1", "2"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("epoch/loss")] == [7, 14]
    assert [event.step for event in events.Scalars("step/loss")] == [3, 6, 10, 13]


def test_the_best_epoch_is_kept(tmp_path, monkeypatch):
    shares = iter([50.0, 70.0, 60.0])
    stub = lambda run, network: {"test_loss": 1.0, "top1": next(shares), "top5": 99.0}  # noqa: E731
    monkeypatch.setattr(main, "evaluate", stub)
    train(tmp_path, epochs=3)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] == 2
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 3


def test_a_log_file_has_lines_only(tmp_path, capsys):
    train(tmp_path)
    out = capsys.readouterr().out
    assert "\r" not in out and "\x1b" not in out
    lines = out.splitlines()
    assert "CotLayer(16, 3)" in lines[0] and "1 x cpu" in lines[1]
    assert [line.split()[:2] for line in lines[2:]] == [["epoch", "1"], ["epoch", "2"]]


def test_a_terminal_gets_a_progress_bar(tmp_path, monkeypatch):
    from rich.console import Console
    from training import log

    terminal = Console(force_terminal=True, file=io.StringIO())
    monkeypatch.setattr(log, "Console", lambda **options: terminal)
    shown = []
    original = log.Progress.update
    monkeypatch.setattr(
        log.Progress, "update",
        lambda self, *args, **kwargs: (shown.append(self.disable), original(self, *args, **kwargs)),
    )  # fmt: skip
    train(tmp_path, log_interval=3)
    assert shown and not any(shown)


def test_divergence_stops_with_one_line(tmp_path, capsys):
    options = dataclasses.replace(SHORT, out=str(tmp_path), lr=1e30)
    assert main.main(flags(options)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nan" in error and "last.pt" in error and "--lr" in error
