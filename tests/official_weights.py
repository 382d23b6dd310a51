"""Weights and images that anybody can make again, bit for bit, from the names of the parameters.

Integer arithmetic only, so that no generator of random numbers of any version takes part. With them
`tests/data/official_outputs.json` was made by the code of JDAI-CV/CoTNet (its CuPy layer replaced
by `reference.LocalConvolution`), in float64 on a CPU.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

SIZE, BATCH, CLASSES = 64, 2, 1000


def uniform(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers from [-1, 1) in float64 that depend on the name and the place only."""
    mask = (1 << 32) - 1
    start = zlib.crc32(name.encode())
    x = (torch.arange(math.prod(shape), dtype=torch.int64) * 2654435761 + start) & mask
    for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 0x297A2D39)):
        x = ((x ^ (x >> shift)) * factor) & mask
    return (x.double() / 2.0**31 - 1).reshape(shape)


def official_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values for every entry: trained-like statistics and scales, no norm left at its default.

    The last norm of each block is small, as in networks that were trained: otherwise the error of
    the first block is multiplied in every other.
    """
    return {key: _value(key, tuple(old.shape)) for key, old in state_dict.items()}


def _value(key: str, shape: tuple[int, ...]) -> Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.tensor(7)
    values = uniform(key, shape)
    if key.endswith("running_var"):
        return 1 + values / 2
    if len(shape) > 1:
        return values * math.sqrt(4 / math.prod(shape[1:]))
    if key.endswith("bn3.weight"):
        return (1 + values / 2) / 5
    return 1 + values / 2 if key.endswith("weight") else values / 5


def images() -> Tensor:
    return uniform("images", (BATCH, 3, SIZE, SIZE)) * 2


def labels() -> Tensor:
    return torch.tensor([3, 870])


def summary(model: torch.nn.Module, training: bool) -> dict[str, list[float]]:
    """What is compared: logits, loss and norms of gradients of one step; running statistics."""
    model.train(training).zero_grad()
    picture = images().requires_grad_()
    logits = model(picture)
    loss = torch.nn.functional.cross_entropy(logits, labels())
    loss.backward()
    stages = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")
    named = list(model.named_parameters())
    groups = [[p.grad for name, p in named if name.startswith(stage)] for stage in stages]
    norms = [math.sqrt(sum(g.square().sum().item() for g in group)) for group in groups]
    statistics = [v.norm().item() for k, v in model.state_dict().items() if "running" in k]
    return {
        "logits": logits.detach()[:, ::125].flatten().tolist(),
        "loss": [loss.item()],
        "gradient_norms": norms,
        "gradient_of_images": [picture.grad.norm().item()],
        "running_statistics": [math.fsum(statistics)],
    }
