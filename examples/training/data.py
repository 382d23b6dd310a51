"""Batches to train on and to evaluate with: scikit-learn's digits, or images in folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from cotnet_ext.cli.command import UsageError, require

from .distributed import World
from .folder import find_folders
from .options import DIGITS, Options

SPLIT_SEED = 0  # of the held-out fifth of the digits, the same for every seed of a training


@dataclass(frozen=True)
class Data:
    """Batches `(images, labels)` on the device of this process.

    Attributes:
        train: shuffled anew every epoch, whole batches only; each process gets others.
        test: this process's share of the held-out images, in batches.
        test_count: images in that share; what follows them in `test` only fills the last batch.
        classes, channels: of the labels and of the images.
        augment: what is still to be done to a batch of `train`; labels become shares of classes
            where it mixes.
        mixup: timm's object that mixes, or None.
    """

    train: Iterable[tuple[Tensor, Tensor]]
    test: Iterable[tuple[Tensor, Tensor]]
    test_count: int
    classes: int
    channels: int
    augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    mixup: Any | None

    def start_epoch(self, epoch: int, options: Options) -> None:
        """Chooses the order of the images, which depends on nothing else."""
        sampler = self.train.sampler
        sampler = sampler.sampler if isinstance(sampler, BatchSampler) else sampler
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        if self.mixup:
            off = options.mixup_off_epoch
            self.mixup.mixup_enabled = not off or epoch < off


def load(options: Options, world: World) -> Data:
    data = (_digits if options.data == DIGITS else _images)(options, world)
    if not len(data.train):
        raise UsageError(
            f"--data: too few images for one batch of {options.batch_size} in each of "
            f"{world.size} processes"
        )
    if len(data.train) < options.accumulate:
        raise UsageError(
            f"--accumulate: an epoch has only {len(data.train)} batches, got {options.accumulate}"
        )
    if options.num_classes is not None and options.num_classes != data.classes:
        raise UsageError(
            f"--num-classes: the data has {data.classes} classes, got {options.num_classes}"
        )
    return data


def _digits(options: Options, world: World) -> Data:
    require("train", "sklearn")
    from cotnet_ext.demo.digits import load_digits

    digits = load_digits(SPLIT_SEED)
    train = TensorDataset(digits.images.to(world.device), digits.labels.to(world.device))
    # A process takes every size-th image of the same order, so that the batches of all processes
    # together are the batches of one process that takes as many images at once.
    order = DistributedSampler(train, world.size, world.rank, seed=options.seed, drop_last=True)
    batches = BatchSampler(order, options.batch_size, drop_last=True)
    mine = slice(world.rank, None, world.size)
    test = TensorDataset(
        digits.test_images[mine].to(world.device), digits.test_labels[mine].to(world.device)
    )
    test_batches = BatchSampler(range(len(test)), options.eval_batch_size, drop_last=False)
    mixup = _mixup(options, 10, on_collate=False)
    return Data(
        train=DataLoader(train, batch_size=None, sampler=batches),
        test=DataLoader(test, batch_size=None, sampler=test_batches),
        test_count=len(test),
        classes=10,
        channels=1,
        augment=_augmentation(options, mixup, world.device),
        mixup=mixup,
    )


def _augmentation(
    options: Options, mixup: Any | None, device: torch.device
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Random erasing and mixing of whole batches."""
    from timm.data.random_erasing import RandomErasing

    erase = RandomErasing(
        options.reprob, mode=options.remode, max_count=options.recount, device=device
    )

    def augment(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if options.reprob:
            images = erase(images)
        return mixup(images, labels) if mixup else (images, labels)

    return augment


def _mixup(options: Options, classes: int, on_collate: bool) -> Any | None:
    if not (options.mixup or options.cutmix):
        return None
    from timm.data import FastCollateMixup, Mixup

    return (FastCollateMixup if on_collate else Mixup)(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        label_smoothing=options.smoothing,
        num_classes=classes,
    )


def _images(options: Options, world: World) -> Data:
    folders = find_folders(options.data)
    from timm.data import ImageDataset, create_loader

    mixup = _mixup(options, len(folders.classes), on_collate=True)
    common = {
        "input_size": (3, options.image_size, options.image_size),
        "interpolation": options.interpolation,
        "num_workers": options.workers,
        "distributed": world.size > 1,
        "pin_memory": world.device.type == "cuda",
        "device": world.device,
        # Workers that outlive an epoch keep random states that no checkpoint could hold.
        "persistent_workers": False,
    }
    train = create_loader(
        ImageDataset(str(folders.train), class_map=folders.classes),
        batch_size=options.batch_size,
        is_training=True,
        scale=options.scale,
        ratio=options.ratio,
        hflip=options.hflip,
        vflip=options.vflip,
        color_jitter=options.color_jitter,
        auto_augment=options.aa,
        re_prob=options.reprob,
        re_mode=options.remode,
        re_count=options.recount,
        collate_fn=mixup,
        **common,
    )
    held_out = ImageDataset(str(folders.test), class_map=folders.classes)
    test = create_loader(
        held_out, batch_size=options.eval_batch_size, crop_pct=options.crop_pct, **common
    )
    return Data(
        train=train,
        test=test,
        test_count=len(range(world.rank, len(held_out), world.size)),
        classes=len(folders.classes),
        channels=3,
        augment=lambda images, labels: (images, labels),
        mixup=mixup,
    )
