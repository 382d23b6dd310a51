"""A training from beginning to end: set up, resume, train, evaluate, save."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cotnet_ext.cli.command import UsageError, make_folder, require

from . import checkpoint, data, model
from .distributed import World, distribute, joined, synchronise_norms
from .log import Log
from .loop import Diverged, Run, evaluate, train_epoch
from .options import DIGITNET, PROGRAM, Options, check, parse

# What a checkpoint must agree in, or its state would not fit; all else may be changed on the way.
FIXED = ("model", "data", "ema", "opt")
FIXED_OF_DIGITNETS = ("layer", "width", "depth")


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains as the command line says. Exit code 2 and one line for what cannot be done."""
    try:
        options = parse(arguments)
        check(options)
        require("train", "timm", "rich", *(["tensorboard"] if options.tensorboard else []))
        if options.threads:
            torch.set_num_threads(options.threads)
        with joined(options.device) as world:
            train(options, world)
        return 0
    except UsageError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(
            f"{PROGRAM}: stopped: {error}; the state before it is in {checkpoint.LAST}. A smaller "
            "--lr, a --clip-grad or bfloat16 in place of float16 may help.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; go on with --resume", file=sys.stderr)
        return 130


def train(options: Options, world: World) -> list[dict[str, Any]]:
    """Trains, and returns one row per epoch: what `log.csv` holds."""
    out = Path(options.out)
    saved = _saved(options, out)  # before anything is made
    if len(set(world.gather(saved and saved["epoch"]))) > 1:
        raise UsageError(f"--out: {options.out!r} is not the same folder for all processes")
    run, epochs = set_up(options, world)
    if world.first:
        make_folder("--out", out)
    epoch, history = _restore(run, saved, out) if saved else (0, [])
    log = Log(out, world.first, options.tensorboard, epoch * run.steps + 1)
    _introduce(run, log, epoch, saved)
    try:
        for number in range(epoch, epochs):
            history.append(_epoch(run, log, number, epochs))
            log.epoch(history[-1], history, (number + 1) * run.steps)
            _save(run, out, history)
    finally:
        log.close()
    return history


def set_up(options: Options, world: World) -> tuple[Run, int]:
    """A training before its first step, and its number of epochs."""
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3

    batches = data.load(options, world)
    checkpoint.seed(options.seed)
    network = model.build(options, batches.classes, batches.channels)
    network = network.to(world.device, memory_format=model.memory_format(options))
    if options.sync_bn:
        network = synchronise_norms(network, world)
    ema = None
    if options.ema:
        ema = ModelEmaV3(network, decay=options.ema_decay, use_warmup=options.ema_warmup)
    per_update = options.batch_size * world.size * options.accumulate
    rate = options.lr * per_update / (options.base_batch or per_update)
    try:
        optimizer = create_optimizer_v2(
            network,
            opt=options.opt,
            lr=rate,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
        )
    except (ValueError, AssertionError) as error:
        raise UsageError(f"--opt: {error}") from None
    schedule, epochs = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=options.epochs,
        warmup_epochs=options.warmup_epochs,
        warmup_lr=min(options.warmup_lr, rate),
        min_lr=min(options.min_lr, rate),
        cooldown_epochs=options.cooldown_epochs,
        step_on_epochs=not options.sched_on_updates,
        updates_per_epoch=len(batches.train) // options.accumulate,
    )
    if batches.mixup:  # which smoothes the labels, too
        criterion = SoftTargetCrossEntropy()
    elif options.smoothing:
        criterion = LabelSmoothingCrossEntropy(options.smoothing)
    else:
        criterion = torch.nn.CrossEntropyLoss()
    if options.compile:
        network.compile(backend=options.compile)
    scaler = torch.amp.GradScaler(world.device.type, enabled=options.amp == "float16")
    called = distribute(network, world)
    # From here on every process augments its own images in its own way.
    checkpoint.seed(options.seed + world.rank)
    return (
        Run(options, world, batches, network, called, ema, optimizer, schedule, scaler, criterion),
        epochs,
    )


def _introduce(run: Run, log: Log, epoch: int, saved: dict[str, Any] | None) -> None:
    options, world = run.options, run.world
    batch = f"{world.size} x {options.batch_size}" + (
        f" x {options.accumulate}" if options.accumulate > 1 else ""
    )
    log.line(model.describe(run.network, options))
    log.line(
        f"{world.size} x {world.device.type}, images per update {batch}, {run.steps} updates per "
        f"epoch, output in {options.out}"
    )
    if saved:
        log.line(f"resumed after epoch {epoch}")
        if len(saved["random_states"]) != world.size:
            before = len(saved["random_states"])
            log.line(
                f"note: {before} processes before, {world.size} now; not the same run any more"
            )


def _epoch(run: Run, log: Log, epoch: int, epochs: int) -> dict[str, Any]:
    """Trains and evaluates; the row of this epoch."""
    from timm.utils import distribute_bn

    options, world = run.options, run.world
    rate = run.optimizer.param_groups[0]["lr"]
    start = time.perf_counter()
    with log.progress(epoch, epochs, run.steps) as bar:

        def show(step: int, loss: torch.Tensor) -> None:
            bar.update(0, advance=1)
            if (step + 1) % options.log_interval == 0 and world.first:
                value = float(loss)
                bar.update(0, remark=f"loss {value:.3f}")
                values = {"step/loss": value, "step/lr": run.optimizer.param_groups[0]["lr"]}
                log.scalars(values, epoch * run.steps + step + 1)

        loss = train_epoch(run, epoch, show)
    seconds = time.perf_counter() - start
    if world.size > 1 and not options.sync_bn:
        distribute_bn(run.network, world.size, reduce=True)
        if run.ema:
            distribute_bn(run.ema.module, world.size, reduce=True)
    images = run.steps * options.accumulate * options.batch_size * world.size
    row = {"epoch": epoch + 1, "lr": rate, "loss": loss, **evaluate(run, run.network)}
    if run.ema:
        for name, value in evaluate(run, run.ema.module).items():
            row[f"ema_{name}"] = value
    return {**row, "seconds": seconds, "images_per_second": images / seconds}


def _metric(row: dict[str, Any]) -> float:
    return row.get("ema_top1", row["top1"])


def _save(run: Run, out: Path, history: list[dict[str, Any]]) -> None:
    """Writes `last.pt`, and `best.pt` when this epoch is the best so far."""
    states = run.world.gather(checkpoint.random_state(run.world.device))
    if run.world.first:
        _write(run, out, history, states)
    run.world.gather(None)  # no process goes on before the file is there


def _write(
    run: Run, out: Path, history: list[dict[str, Any]], states: list[dict[str, Any]]
) -> None:
    weights = {"arch": run.options.model, "epoch": len(history)}
    weights["state_dict"] = run.network.state_dict()
    if run.ema:
        weights["state_dict_ema"] = run.ema.module.state_dict()
    if _metric(history[-1]) >= max(map(_metric, history)):
        checkpoint.save(weights, out / checkpoint.BEST)
    content = {
        **weights,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "random_states": states,
        "history": history,
        "options": dataclasses.asdict(run.options),
    }
    checkpoint.save(content, out / checkpoint.LAST)


def _saved(options: Options, out: Path) -> dict[str, Any] | None:
    """The checkpoint to go on from, if there is one and this is asked for."""
    path = out / checkpoint.LAST
    if not path.exists():
        return None
    if not options.resume:
        raise UsageError(
            f"--out: {str(path)!r} is there already; go on with it by --resume, or choose another"
        )
    saved = checkpoint.load(path)
    names = FIXED + (FIXED_OF_DIGITNETS if options.model == DIGITNET else ())
    for name in names:
        before, now = saved["options"].get(name), getattr(options, name)
        if before != now:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option}: {str(path)!r} was made with {before!r}, got {now!r}")
    return saved


def _restore(run: Run, saved: dict[str, Any], out: Path) -> tuple[int, list[dict[str, Any]]]:
    """Puts everything back as it was; the epochs done, and their rows.

    The schedule needs no state: it is a function of the epoch and the step.
    """
    try:
        run.network.load_state_dict(saved["state_dict"])
        if run.ema:
            run.ema.module.load_state_dict(saved["state_dict_ema"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.scaler.load_state_dict(saved["scaler"])
    except (KeyError, RuntimeError, ValueError) as error:
        first = " ".join(str(error).split())[:200]
        raise UsageError(
            f"--resume: {str(out / checkpoint.LAST)!r} does not fit: {first}"
        ) from None
    states = saved["random_states"]
    if len(states) == run.world.size:
        checkpoint.set_random_state(states[run.world.rank], run.world.device)
    epoch = saved["epoch"]
    run.schedule.step_update(epoch * run.steps)
    run.schedule.step(epoch)
    return epoch, list(saved["history"])
