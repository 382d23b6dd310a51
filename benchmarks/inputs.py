"""Input sets. Equal makers give equal sets; the values are the same in every dtype and layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import Shape

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Maker:
    """Makes the inputs of one op for one shape."""

    shape: Shape
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    device: str = "cpu"

    def __call__(self) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def random(self, sizes: list[int], seed: int, layout: str = "contiguous") -> Tensor:
        home = "cuda" if torch.device(self.device).type == "cuda" else "cpu"
        generator = torch.Generator(home).manual_seed(seed)
        values = torch.randn(sizes, generator=generator, device=home)
        return values.to(device=self.device, dtype=self.dtype, memory_format=LAYOUTS[layout])

    def map(self, channels: int, seed: int) -> Tensor:
        """`[N, channels, H, W]`, standard normal, in the layout."""
        sizes = [self.shape.batch, channels, self.shape.size, self.shape.size]
        return self.random(sizes, seed, self.layout)


    def weights(self, seed: int) -> Tensor:
        """The weights of windows `[N, 1, C/8, K, H, W]`, made as a layer makes them, a view of the
        map that a 1x1 convolution wrote. So with channels_last the taps of all weight channels lie
        side by side at every pixel."""
        shape = self.shape
        return self.map(shape.weight_channels * shape.taps, seed).view(
            shape.batch, 1, shape.weight_channels, shape.taps, shape.size, shape.size
        )


@dataclass(frozen=True)
class Maps(Maker):
    """`count` maps `[N, C, H, W]`."""

    count: int = 1

    def __call__(self) -> tuple[Tensor, ...]:
        return tuple(self.map(self.shape.channels, seed=i) for i in range(self.count))


@dataclass(frozen=True)
class MapsAndLogits(Maps):
    """`count` maps, then `[N, C, 2]`."""

    def __call__(self) -> tuple[Tensor, ...]:
        logits = self.random([self.shape.batch, self.shape.channels, 2], seed=self.count)
        return (*super().__call__(), logits)


@dataclass(frozen=True)
class MapsAndWeights(Maps):
    """`count` maps, then the weights of windows."""

    def __call__(self) -> tuple[Tensor, ...]:
        return (*super().__call__(), self.weights(seed=self.count))


@dataclass(frozen=True)
class Window(Maker):
    """A map and the weights of its windows; if asked, norm weight and bias."""

    norm: bool = False

    def __call__(self) -> tuple[Tensor, ...]:
        shape = self.shape
        values = shape.weight_channels * shape.taps
        inputs = (self.map(shape.channels, seed=0), self.weights(seed=1))
        if not self.norm:
            return inputs
        return (*inputs, 1 + 0.1 * self.random([values], seed=2), self.random([values], seed=3))


@dataclass(frozen=True)
class CopyBuffers:
    """Source and destination of a copy that reads and writes so many `floats`."""

    floats: int
    device: str
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    def __call__(self) -> tuple[Tensor, ...]:
        # Written once, so that the first copy does not pay for page faults.
        return torch.zeros(self.floats, device=self.device), torch.ones(
            self.floats, device=self.device
        )
