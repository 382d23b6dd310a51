"""Every shape that is benchmarked, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """A feature map `[batch, channels, size, size]` under a square window that keeps its size.

    `channels / 8` weight channels, as in every layer of CoTNet.
    """

    batch: int
    channels: int
    size: int
    kernel_size: int = 3

    @property
    def weight_channels(self) -> int:
        return self.channels // 8

    @property
    def taps(self) -> int:
        return self.kernel_size**2

    @property
    def padding(self) -> int:
        return self.kernel_size // 2

    @property
    def positions(self) -> int:
        return self.size * self.size

    def __str__(self) -> str:
        return f"{self.batch}x{self.channels}x{self.size}x{self.size}"


def stages(batch: int) -> tuple[Shape, ...]:
    """The maps of the four stages of CoTNet at 224 x 224 pixels."""
    return tuple(Shape(batch, *stage) for stage in ((64, 56), (128, 28), (256, 14), (512, 7)))


STAGES = stages(batch=8)
GPU_BATCHES = 16  # times the batch of any shape, on a GPU: 128 for the stages
MEMORY_BOUND = replace(STAGES[0], batch=32)  # large enough that half the bytes must show in time

COT_ATTENTION = (Shape(2, 64, 40), Shape(50, 512, 7))
COT_ATTENTION_TRAIN = (*COT_ATTENTION, *STAGES)
COT_LAYER_EVAL = stages(batch=4)
COT_LAYER_TRAIN = STAGES

TINY = Shape(1, 8, 4)  # small enough that a call costs nothing but its overhead
# Every path in seconds; such numbers mean nothing. With two images, the batch norm of the pooled
# map in `se` would divide by the difference of two numbers, and magnify every rounding.
QUICK = (Shape(6, 64, 6),)
