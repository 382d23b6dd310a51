"""Comparisons common to the ops that work on whole maps, without a window."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import cotnet_ext
from cotnet_ext import reference

from .baselines import compiled
from .byte_model import pass_bytes
from .comparison import SUBJECT, Comparison, Contender, Function, Options, copy_contender
from .inputs import Maps


def comparisons(op: str, options: Options, maps: type[Maps], count: int) -> Iterator[Comparison]:
    """Every stage, every direction and dtype, beside PyTorch and a copy.

    `op` takes what `maps` makes with `count` maps.
    """
    for direction in options.directions:
        for shape in options.shapes():
            for dtype in options.dtypes:
                total = pass_bytes(op, direction, shape, dtype)
                makers = [
                    maps(shape, dtype, layout, options.device, count)
                    for layout in ("contiguous", "channels_last")
                ]
                contenders = _contenders(op, makers, total, options)
                yield Comparison(op, direction, shape, contenders, dtype)


def _contenders(op: str, makers: list[Maps], total: int, options: Options) -> list[Contender]:
    ours, truth = (getattr(home, op) for home in (cotnet_ext, reference))
    contiguous, channels_last = makers

    def contender(provider: str, function: Function, make: Maps = contiguous) -> Contender:
        return Contender(provider, function, truth, make, total)

    contenders = [
        contender(SUBJECT, ours),
        contender(SUBJECT, ours, channels_last),
        copy_contender(total, options.device),
        contender("reference", truth),
    ]
    if options.compiled and contiguous.dtype == torch.float32:
        contenders.append(contender("reference, compiled", compiled(truth)))
    return contenders
