"""One epoch of training, and an evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Data
from .distributed import World
from .options import Options


class Diverged(Exception):
    """The loss is no number any more."""


@dataclass
class Run:
    """Everything that a training changes, and what it is made of.

    `network` holds the parameters; `model` is what is called in training: the network itself, or
    DistributedDataParallel around it.
    """

    options: Options
    world: World
    data: Data
    network: nn.Module
    model: nn.Module
    ema: Any | None
    optimizer: torch.optim.Optimizer
    schedule: Any
    scaler: torch.amp.GradScaler
    criterion: nn.Module

    @property
    def steps(self) -> int:
        """Updates per epoch; batches that do not fill one are left out."""
        return len(self.data.train) // self.options.accumulate

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.options.amp == "none":
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, getattr(torch, self.options.amp))

    def format(self, images: Tensor) -> Tensor:
        if self.options.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images


def train_epoch(run: Run, epoch: int, on_step: Callable[[int, Tensor], None]) -> float:
    """Trains for one epoch and returns its mean loss over all processes.

    `on_step(step, loss)` is called after each update with the loss of this process, on its device.
    """
    run.data.start_epoch(epoch, run.options)
    run.model.train()
    batches = iter(run.data.train)
    total = torch.zeros((), device=run.world.device, dtype=torch.float64)
    for step in range(run.steps):
        loss = _accumulate_gradients(run, batches)
        _update(run)
        run.schedule.step_update(epoch * run.steps + step + 1)
        total += loss
        on_step(step, loss)
    run.schedule.step(epoch + 1)
    mean = float(run.world.sum(total)) / (run.steps * run.world.size)
    if mean != mean or abs(mean) == float("inf"):
        raise Diverged(f"the loss is {mean} in epoch {epoch + 1}")
    return mean


def _accumulate_gradients(run: Run, batches: Any) -> Tensor:
    """The gradients of as many batches as an update takes, and their mean loss."""
    count = run.options.accumulate
    total = 0
    for number in range(count):
        images, targets = run.data.augment(*next(batches))
        last = number == count - 1
        wait = contextlib.nullcontext() if last or run.world.size == 1 else run.model.no_sync()
        with wait:
            with run.autocast():
                loss = run.criterion(run.model(run.format(images)), targets) / count
            run.scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


def _update(run: Run) -> None:
    from timm.utils import dispatch_clip_grad

    if run.options.clip_grad is not None:
        run.scaler.unscale_(run.optimizer)
        dispatch_clip_grad(run.network.parameters(), run.options.clip_grad, run.options.clip_mode)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    if run.ema:
        run.ema.update(run.network)


@torch.no_grad()
def evaluate(run: Run, network: nn.Module) -> dict[str, float]:
    """Mean loss and the shares (in percent) whose class is the first, or among the first five."""
    from timm.utils import accuracy

    was_training = network.training
    network.eval()
    sums = torch.zeros(4, device=run.world.device, dtype=torch.float64)  # count, loss, top 1, top 5
    left = run.data.test_count
    for images, labels in run.data.test:
        images, labels = images[:left], labels[:left]
        left -= len(labels)
        if not len(labels):
            break
        with run.autocast():
            scores = network(run.format(images))
        scores = scores.float()
        top1, top5 = accuracy(scores, labels, topk=(1, 5))
        loss = F.cross_entropy(scores, labels)
        sums += len(labels) * torch.stack([torch.ones_like(loss), loss, top1, top5]).double()
    network.train(was_training)
    count, loss, top1, top5 = run.world.sum(sums).tolist()
    return {"test_loss": loss / count, "top1": top1 / count, "top5": top5 / count}
