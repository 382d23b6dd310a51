"""Comparisons common to the ops that aggregate a window with per-pixel weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import cotnet_ext
from cotnet_ext import reference

from . import baselines
from .byte_model import pass_bytes
from .comparison import SUBJECT, Comparison, Contender, Function, Options, copy_contender
from .inputs import Window
from .shapes import MEMORY_BOUND, Shape

PLAIN = "local_aggregation"  # what a fused op is compared with: the same without the fusion


def comparisons(op: str, options: Options, norm: bool = False) -> Iterator[Comparison]:
    """Every stage, forward and with backward: float32 beside its peers, bfloat16 beside float32.

    `op` takes `(input, weight, kernel_size=, padding=)`, after the weight also norm weight and norm
    bias if `norm`.
    """
    for direction in ("forward", "forward+backward"):
        for shape in options.shapes():
            case = _Case(op, direction, shape, options, norm)
            yield Comparison(op, direction, shape, case.float32())
            yield Comparison(op, direction, shape, case.bfloat16(), torch.bfloat16)
    if op == PLAIN and not options.quick:
        case = _Case(op, "forward", MEMORY_BOUND, options, norm)
        yield Comparison(op, "forward", MEMORY_BOUND, case.bfloat16(), torch.bfloat16)


@dataclass(frozen=True)
class _Case:
    op: str
    direction: str
    shape: Shape
    options: Options
    norm: bool

    def float32(self) -> list[Contender]:
        ours, shift = getattr(cotnet_ext, self.op), getattr(baselines, self.op)
        contenders = [
            self._contender(SUBJECT, ours),
            self._contender(SUBJECT, ours, layout="channels_last"),
            self._copy(),
            self._contender("unfold", getattr(reference, self.op)),
            self._contender("shift", shift),
        ]
        if self.op != PLAIN:
            contenders.append(self._plain())
        if self.options.compiled:
            contenders.append(self._contender("shift, compiled", baselines.compiled(shift)))
        return contenders

    def bfloat16(self) -> list[Contender]:
        ours, half = getattr(cotnet_ext, self.op), torch.bfloat16
        return [
            self._contender(SUBJECT, ours, half),
            self._contender(SUBJECT, ours, half, "channels_last"),
            self._copy(half),
            self._contender(SUBJECT, ours),
        ]

    def _contender(
        self,
        provider: str,
        function: Function,
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
    ) -> Contender:
        return Contender(
            provider=provider,
            function=self._bind(function),
            reference=self._truth,
            make=Window(self.shape, dtype, layout, self.options.device, norm=self.norm),
            bytes=self._bytes(dtype),
        )

    def _plain(self) -> Contender:
        """local_aggregation on the inputs of the fused op, which uses the weights as they are."""
        ours, truth = (_without_norm(getattr(home, PLAIN)) for home in (cotnet_ext, reference))
        return dataclasses.replace(self._contender(PLAIN, ours), reference=self._bind(truth))

    @functools.cached_property
    def _truth(self) -> Function:
        """One object for all contenders, so that it is computed once."""
        return self._bind(getattr(reference, self.op))

    def _copy(self, dtype: torch.dtype = torch.float32) -> Contender:
        return copy_contender(self._bytes(dtype), self.options.device)

    def _bind(self, function: Function) -> Function:
        return functools.partial(
            function, kernel_size=self.shape.kernel_size, padding=self.shape.padding
        )

    def _bytes(self, dtype: torch.dtype) -> int:
        return pass_bytes(self.op, self.direction, self.shape, dtype)


def _without_norm(aggregation: Function) -> Function:
    def aggregate(input: Tensor, weight: Tensor, *norm: Tensor, **window: int) -> Tensor:
        return aggregation(input, weight, **window)

    return aggregate
