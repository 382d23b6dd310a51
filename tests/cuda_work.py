"""Instructions that the fast paths of aggregations may issue for a unit of work.

A unit is one weight channel at one pixel, with all channels that share it. Memory of an H200 feeds
a multiprocessor 18.6 bytes a clock, in which it issues four instructions of a warp: 6.9 for each
byte that 32 units move, or else a kernel waits for instructions and not for memory. That is 344 for
the 50 bytes of a forward of 3 x 3 taps and 8 channels in 16 bits, 578 for the 84 of both gradients.

Of a kernel's code counted is: loops of sums, as often as they run; loops that move 16 bytes at a
time, as often as the bytes of a unit take; all other code once. So both sides of a branch count,
as do all ways of copying, of which a block goes one; other loops count as if they ran once. It is a
measure of the code, which more code cannot pass unseen, and not what hardware would count.
Kernels beyond the budget have a ceiling of their own, which is what they are now: the most of their
variants and architectures, rounded up to ten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cuda_instructions import Part

WIDE = 16  # bytes of the widest move of one thread
PER_BYTE = 344 / 50


@dataclass(frozen=True)
class Work:
    """What the threads of a kernel have to do."""

    kernel: str  # a regular expression, found in names as those of Budget are
    elements: int  # of maps and weights that a unit moves from and to memory
    units: int  # of a thread
    turns: int = 1  # of each loop of sums
    loops: int = 1  # of sums: of more, which are versions of one another, the longest count
    threads: int = 1  # that compute these units together: each runs all but the loops of sums
    walks: bool = False  # down a map, so only what every step repeats counts
    # Instructions of a unit at most where they are more than the budget, and why they are.
    most: int = 0
    why: str = ""

    def per_unit(self, parts: Iterable[Part], element_bytes: int) -> float:
        """Instructions of a thread for each unit, which are a warp's for 32 units."""
        parts = [part for part in parts if part.walks or part.sums or not self.walks]
        loops = sorted((part.instructions for part in parts if part.sums), reverse=True)
        sums = self.turns * sum(loops[: self.loops])
        rest = sum(part.instructions for part in parts if not part.sums and not part.moves)
        moves = self.elements * element_bytes * self.units / WIDE
        dearest = max((part.instructions / part.moves for part in parts if part.moves), default=0)
        return (sums + self.threads * rest + moves * dearest) / self.units

    def ceiling(self, element_bytes: int) -> float:
        return max(self.most, PER_BYTE * self.elements * element_bytes)


def forward(taps: int, channels: int = 8) -> int:
    """Elements that a unit moves: of x, w and y, or of those of one gradient."""
    return 2 * channels + taps


BOTH = 3 * 8 + 2 * 9  # both gradients of 3 x 3 taps: x, grad_y, grad_x, w, grad_w
TYPES = {2: "<cotnet::(Half|BFloat16)", 4: "<float"}  # by the bytes of an element


def rows(
    kernel: str, kind: str, elements: int, units: float, most: tuple, why: str, **rest
) -> list:
    """A row for elements of 16 bits and one of 32. most: of each, 0 where they keep the budget.
    by_bytes: what the bytes of an element are multiplied with for a number of a row."""
    by_bytes = rest.pop("by_bytes", {})
    return [
        Work(
            f"aggregation_{kernel}_kernel{name}{kind}", elements,
            units * 16 / size if kernel in BY_VECTORS else units, most=ceiling, why=why,
            **rest, **{key: factor * size for key, factor in by_bytes.items()},
        )
        for (size, name), ceiling in zip(TYPES.items(), most, strict=True)
    ]  # fmt: skip


BY_VECTORS = ("direct", "pixels", "pixels_grad_weight")  # a thread has the units of 16 bytes
COPIES = "runs of a tile are cut, moved and placed in three ways; widening is as much again as FMAs"
NARROW = "few channels pay for a tile's runs, as " + COPIES
LARGE = "widening for each of many taps, beside " + COPIES
PIECES = "each copy of 16 bytes finds its place among pixels and pieces; widening as much as FMAs"
NORMALISERS = "the loop of normalisers counts as one of sums; " + COPIES
SILU = "an exponential and a division for each output, and sums over the map, beside "
HALVES = "code of both halves counts for the threads of each; " + PIECES
FEW = "widening; exponentials, or numbers of a norm, for each tap of eight channels"
SCALARS = "weights and numbers of a norm come one by one; widening for each of many taps"


def _tiles() -> list[Work]:
    found, tails = [], []
    for kind, most in {
        "Plain": ((310, 370, 490, 850, 1380), (0, 0, 0, 0, 0)),
        "Norm": ((420, 470, 590, 1270, 2200), (390, 0, 0, 0, 1830)),
        "Softmax": ((440, 500, 610, 990, 1570), (420, 0, 0, 0, 0)),
        "KnownSoftmax": ((440, 500, 620, 1150, 1950), (430, 470, 0, 0, 0)),
    }.items():
        sizes = ((3, 2), (3, 4), (3, 8), (5, 8), (7, 8))  # taps of a row, channels
        for (size, channels), *ceilings in zip(sizes, *most, strict=True):
            why = LARGE if size > 3 else COPIES if channels == 8 else NARROW
            name = f".*::{kind}Weights.*, {size}, {channels}, "
            turns = size if size > 3 else 1
            elements = forward(size * size, channels)
            found += rows("tile", name, elements, 4, tuple(ceilings), why, turns=turns)
    sizes = {(3, 2): (540, 500), (3, 4): (620, 0), (3, 8): (790, 0)}
    sizes |= {(5, 8): (1480, 0), (7, 8): (2400, 0)}
    for (size, channels), ceilings in sizes.items():
        name = f".*{size}, {channels}, .*Silu"
        elements = forward(size * size, channels) + channels
        turns = size if size > 3 else 1
        tails += rows("tile", name, elements, 4, ceilings, SILU + COPIES, turns=turns)
    for sink, most in {
        "PlainTile": ((320, 390, 520), (0, 0, 0)),
        "NormTile": ((480, 540, 680), (450, 500, 0)),
        "SoftmaxTile": ((580, 640, 780), (550, 600, 720)),
        "NormSums": ((430, 490, 620), (430, 480, 0)),
    }.items():
        for channels, *ceilings in zip((2, 4, 8), *most, strict=True):
            name, turns = f".*::{sink}Sink.*, {channels}, ", 2 if channels == 8 else 1
            why = COPIES if channels == 8 else NARROW
            elements = forward(9, channels)
            found += rows("tile_grad_weight", name, elements, 4, tuple(ceilings), why, turns=turns)
    for sink, writes, loops, *most in (  # weights are read and written, or one of these
        ("PlainTile", 1, 1, (840, 0), (1310, 0)),
        ("NormTile", 2, 1, (1020, 0), (0, 0)),
        ("SoftmaxTile", 2, 2, (1630, 0), (2560, 0)),
        ("NormSums", 1, 1, (860, 0), (1290, 0)),
    ):
        for size, ceilings in zip((5, 7), most, strict=True):
            name, elements = f".*::{sink}Sink.*, {size}>", forward(writes * size * size)
            found += rows(
                "tile_grad_weight_large", name, elements, 4, ceilings, LARGE,
                turns=8 * size, loops=loops,
            )  # fmt: skip
    for kind, most in {
        "Plain": (920, 0),
        "Softmax": (1460, 1440),
        "Norm.*false": (990, 0),
        "Norm.*true": (1190, 0),
    }.items():
        why = NORMALISERS if kind == "Softmax" else COPIES
        found += rows("tile_backward", f".*::{kind}.*", BOTH, 4, most, why, turns=8, loops=2)
    return tails + found  # the first row that fits decides


def _pixels() -> list[Work]:
    found = rows("direct", ".*Silu", forward(9) + 8, 1, (580, 0), SILU + FEW, turns=3)
    for kind, most in {"Plain": (0, 0), "Norm": (370, 0), "Softmax": (400, 0)}.items():
        found += rows("direct", f".*::{kind}Weights", forward(9), 1, most, FEW, turns=3)
    walk = {"walks": True, "by_bytes": {"turns": 2}}
    found += rows("image", ".*Silu", forward(9) + 8, 4, (760, 0), SILU + PIECES, **walk)
    both = walk | {"loops": 2, "threads": 2}
    for kind, once, twice in (
        ("Plain", (480, 0), (1260, 0)),
        ("Softmax", (560, 0), (1840, 1500)),
        ("Norm", (520, 0), (1440, 1200)),
    ):
        found += rows("image", f".*::{kind}Weights", forward(9), 4, once, PIECES, **walk)
        name = f".*::{kind}Weights.*false"
        found += rows("image_backward", name, BOTH, 4, twice, HALVES, **both)
    found += rows("image_backward", ".*true", forward(9), 4, (520, 0), PIECES, **walk)
    for kind, most in {
        "Plain": (970, 0),
        "Norm": (1470, 1540),
        "Softmax": (1350, 1520),
        "KnownSoftmax": (1310, 1450),
    }.items():
        name = f".*::{kind}Weights"
        found += rows("pixels", name, forward(25), 1, most, SCALARS, turns=25)
    for size, most in {5: (1440, 1440), 7: (2660, 2540)}.items():
        elements = forward(size * size)
        found += rows(
            "pixels_grad_weight", f".*{size}>", elements, 1 / size, most, SCALARS, turns=8
        )
    return found


WORK: tuple[Work, ...] = (*_tiles(), *_pixels())
