"""The networks that are measured, and what makes them fit for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch._inductor.config
from torch import Tensor, nn

from cotnet_ext import models

from .comparison import Options, Tensors
from .inputs import Maps
from .shapes import GPU_BATCHES, Shape


@dataclass(frozen=True)
class Network:
    """A name of `cotnet_ext.models`, and the images of a pass."""

    name: str
    eval_shape: Shape = Shape(4, 3, 224)
    train_shape: Shape | None = None


NETWORKS = (
    Network("cotnet50", train_shape=Shape(16, 3, 224)),
    Network("cotnext50_2x48d"),
    Network("se_cotnetd_50"),
)
# With images enough for the batch norms of pooled maps.
QUICK = (Network("cotnet50", Shape(4, 3, 64), Shape(4, 3, 64)),)
CLASSES = 1000


def networks(options: Options) -> tuple[Network, ...]:
    if options.quick:
        return QUICK
    return tuple(_on_gpu(network) for network in NETWORKS) if options.gpu else NETWORKS


def _on_gpu(network: Network) -> Network:
    """Batches of 128 for both passes."""
    shape = replace(network.eval_shape, batch=8 * GPU_BATCHES)
    return replace(network, eval_shape=shape, train_shape=network.train_shape and shape)


@dataclass(frozen=True)
class Images(Maps):
    """Images for a network, whose result is not like them and whose gradients are many."""

    as_one: bool = True  # see accuracy.py

    def upstream(self, inputs: Tensors) -> Tensor:
        """The gradient of a loss with respect to the logits."""
        return torch.randn(self.shape.batch, CLASSES).to(inputs[0]) / self.shape.batch


def build(name: str, device: str, reference: bool) -> nn.Module:
    """A network with the numbers of one that has seen images; the same ones for both kinds.

    Left as it is initialised, each block would be its shortcut. Blocks that count for as much as
    their shortcuts would make gradients in float32 a matter of luck.
    """
    torch.manual_seed(0)
    network = models.create_model(name, num_classes=CLASSES, reference=True)
    for key, value in network.named_parameters():
        if value.dim() == 1 and not key.startswith("fc"):
            nn.init.uniform_(value, *_range(key))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics of the first batch are all that count
    with torch.no_grad():
        network(torch.randn(8, 3, 64, 64))
    if not reference:
        state = network.state_dict()
        network = models.create_model(name, num_classes=CLASSES)
        network.load_state_dict(state)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return network.to(device)


def _range(key: str) -> tuple[float, float]:
    """Of the values of a parameter of a norm, or of a bias."""
    if key.endswith("bn3.weight"):
        return 0.05, 0.1
    return (0.5, 1.5) if key.endswith("weight") else (-0.5, 0.5)


def compiled_for_inference(model: nn.Module) -> nn.Module:
    """`torch.compile` at its best for evaluation: parameters are constants of the program."""
    # As an option of this one call, parameters would not become constants.
    torch._inductor.config.freezing = True
    return torch.compile(model, fullgraph=True, dynamic=False)
