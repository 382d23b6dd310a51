"""A small contextual-transformer network learns scikit-learn's handwritten digits.

It is trained twice from the same seed: built of the reference modules, then of ours. Parameters,
batches and their order are the same, so the two runs differ by rounding alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 32
BATCH = 48
PEAK_RATE = 0.05


@dataclass(frozen=True)
class Digits:
    """Images `[N, 1, 8, 8]` in -1..1 and their labels; the test part is a held-out fifth."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int) -> Digits:
    """The 1797 digits, a fifth of each class held out."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    data = datasets.load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        data.images / 8 - 1, data.target, test_size=0.2, stratify=data.target, random_state=seed
    )

    def images(array) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float32).unsqueeze(1)

    def labels(array) -> Tensor:
        return torch.as_tensor(array, dtype=torch.long)

    return Digits(images(train_x), labels(train_y), images(test_x), labels(test_y))


class DigitNet(nn.Module):
    """Convolution, contextual layers (each with a residual), mean over the map, linear.

    `layers` are names of modules in `namespace`.
    """

    def __init__(
        self,
        namespace: ModuleType,
        channels: int = CHANNELS,
        layers: Sequence[str] = ("CotLayer", "CoTAttention"),
        in_channels: int = 1,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        self.layers = nn.ModuleList(getattr(namespace, name)(channels, 3) for name in layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, in_channels, H, W]` to class scores `[N, classes]`."""
        maps = self.stem(images)
        for layer in self.layers:
            maps = maps + layer(maps)
        return self.head(maps.mean((2, 3)))


@dataclass
class Training:
    """What a run leaves: one loss per step, one held-out accuracy per epoch, seconds of stepping
    (evaluation not counted), and the network."""

    network: DigitNet
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def epoch_losses(self) -> list[float]:
        """The mean loss of each epoch."""
        per_epoch = torch.tensor(self.losses).reshape(len(self.accuracies), -1)
        return per_epoch.mean(1).tolist()


def steps_per_epoch(digits: Digits) -> int:
    """Whole batches of the training part; the rest sits the epoch out."""
    return len(digits.images) // BATCH


def train(
    namespace: ModuleType,
    digits: Digits,
    seed: int,
    epochs: int,
    on_step: Callable[[Training], None] = lambda training: None,
) -> Training:
    """Trains a `DigitNet` built of the modules in `namespace`; calls `on_step` after each step."""
    torch.manual_seed(seed)
    network = DigitNet(namespace)
    training = Training(network)
    order = torch.Generator().manual_seed(seed)
    steps = steps_per_epoch(digits)
    optimizer = torch.optim.SGD(network.parameters(), lr=PEAK_RATE, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=epochs * steps)
    for _ in range(epochs):
        start = time.perf_counter()
        network.train()
        shuffled = torch.randperm(len(digits.images), generator=order)
        for batch in shuffled[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(network(digits.images[batch]), digits.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            training.losses.append(loss.item())
            on_step(training)
        training.seconds += time.perf_counter() - start
        training.accuracies.append(accuracy(network, digits))
    return training


@torch.inference_mode()
def accuracy(network: nn.Module, digits: Digits) -> float:
    """The share of held-out digits that the network names rightly."""
    network.eval()
    return float((network(digits.test_images).argmax(1) == digits.test_labels).float().mean())


@torch.inference_mode()
def local_weights(network: DigitNet, images: Tensor) -> Tensor:
    """The 3x3 weights `[N, C/8, 9, H, W]` that the network's CotLayer, its first layer, gives every
    pixel, after their GroupNorm: what the aggregation multiplies the neighbours by."""
    network.eval()
    maps = network.stem(images)
    layer = network.layers[0]
    weights = layer.embed(torch.cat([maps, layer.key_embed(maps)], dim=1))
    return weights.unflatten(1, (-1, 9))
