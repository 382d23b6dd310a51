"""The network of a training, built of the fused layers or of the reference."""

from __future__ import annotations

import torch
from torch import nn

from cotnet_ext.cli.command import UsageError

from .options import DIGITNET, Options


def build(options: Options, classes: int, channels: int) -> nn.Module:
    """The network `options.model`, initialised from the current random state or a checkpoint."""
    if options.model == DIGITNET:
        return _digitnet(options, classes, channels)
    from cotnet_ext import models

    if options.model not in models.list_models():
        names = ", ".join([DIGITNET, *models.list_models()])
        raise UsageError(f"--model: no network {options.model!r}; there are {names}")
    try:
        return models.create_model(
            options.model,
            num_classes=classes,
            in_chans=channels,
            drop_rate=options.drop,
            drop_path_rate=options.drop_path,
            reference=options.reference,
            checkpoint=options.checkpoint,
        )
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"--checkpoint: cannot read {options.checkpoint!r}: {reason}") from None
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from None


def _digitnet(options: Options, classes: int, channels: int) -> nn.Module:
    from cotnet_ext import modules, reference
    from cotnet_ext.demo.digits import DigitNet

    if options.drop or options.drop_path:
        raise UsageError("--drop, --drop-path: a digitnet has neither")
    namespace = reference if options.reference else modules
    layers = [options.layer] * options.depth
    return DigitNet(namespace, options.width, layers, channels, classes)


def describe(network: nn.Module, options: Options) -> str:
    """One line about the network."""
    count = sum(parameter.numel() for parameter in network.parameters())
    name = options.model
    if name == DIGITNET:
        name += f" of {options.depth} {options.layer}({options.width}, 3)"
    kind = "reference" if options.reference else "fused"
    return f"{name}, {kind} layers, {count / 1e6:.3g} million parameters"


def memory_format(options: Options) -> torch.memory_format:
    return torch.channels_last if options.channels_last else torch.contiguous_format
