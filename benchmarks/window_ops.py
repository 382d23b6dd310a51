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

from . import baselines, official, one_thread
from .byte_model import pass_bytes
from .comparison import SUBJECT, Comparison, Contender, Function, Options, copy_contender
from .inputs import Window
from .shapes import MEMORY_BOUND, Shape

PLAIN = "local_aggregation"  # what a fused op is compared with: the same without the fusion


def comparisons(op: str, options: Options, norm: bool = False) -> Iterator[Comparison]:
    """Every stage, forward and with backward: float32 beside its peers, bfloat16 beside float32.
    On a GPU backward alone, and every dtype beside its peers.

    `op` takes `(input, weight, kernel_size=, padding=)`, after the weight also norm weight and norm
    bias if `norm`.
    """
    if options.gpu:
        yield from _on_gpu(op, options, norm)
        return
    for direction in ("forward", "forward+backward"):
        for shape in options.shapes():
            case = _Case(op, direction, shape, options, norm)
            yield Comparison(op, direction, shape, case.float32())
            yield Comparison(op, direction, shape, case.bfloat16(), torch.bfloat16)
    if op == PLAIN and not options.quick:
        case = _Case(op, "forward", MEMORY_BOUND, options, norm)
        yield Comparison(op, "forward", MEMORY_BOUND, case.bfloat16(), torch.bfloat16)


def _on_gpu(op: str, options: Options, norm: bool) -> Iterator[Comparison]:
    for direction in options.directions:
        for shape in options.shapes():
            case = _Case(op, direction, shape, options, norm)
            for dtype in options.dtypes:
                yield Comparison(op, direction, shape, case.with_peers(dtype), dtype)


@dataclass(frozen=True)
class _Case:
    op: str
    direction: str
    shape: Shape
    options: Options
    norm: bool

    def float32(self) -> list[Contender]:
        shift = self._contender("shift", getattr(baselines, self.op))
        contenders = self.with_peers(torch.float32)
        return [*contenders[:4], shift, *contenders[4:]]

    def with_peers(self, dtype: torch.dtype) -> list[Contender]:
        ours, shift = getattr(cotnet_ext, self.op), getattr(baselines, self.op)
        contenders = [
            self._contender(SUBJECT, ours, dtype),
            self._contender(SUBJECT, ours, dtype, "channels_last"),
            self._copy(dtype),
            self._contender("unfold", getattr(reference, self.op), dtype),
        ]
        if self.op != PLAIN:
            contenders.append(self._plain(dtype))
        if self.options.compiled:
            contenders.append(self._contender("shift, compiled", baselines.compiled(shift), dtype))
        if self.op == PLAIN and self.options.gpu:
            contenders += self._kernels(dtype)
        return contenders

    def _kernels(self, dtype: torch.dtype) -> Iterator[Contender]:
        """Other CUDA kernels: a plain one of our own, and those of the official repository."""
        yield self._contender("one thread per result", one_thread.local_aggregation, dtype)
        if self.options.official and dtype == torch.float32:
            yield self._contender("official CuPy", official.late(self.options.official))

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

    def _plain(self, dtype: torch.dtype) -> Contender:
        """local_aggregation on the inputs of the fused op, which uses the weights as they are."""
        ours, truth = (_without_norm(getattr(home, PLAIN)) for home in (cotnet_ext, reference))
        return dataclasses.replace(self._contender(PLAIN, ours, dtype), reference=self._bind(truth))

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
