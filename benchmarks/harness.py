"""Timing: contenders take turns on cold inputs, then the result of each is checked.

Speeds drift on a shared machine, but neighbours in a round drift together. So everybody has one
turn per round, A B C A B C ..., and ratios are medians of per-round ratios, not ratios of medians.
A turn is a few calls, each on inputs that have left the caches. The first is not timed: it brings
back the code of this contender, which the one before has displaced, and wakes the threads.
"""

from __future__ import annotations

import copy
import math
import statistics
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from . import accuracy, clocks, memory
from .comparison import (
    COPY,
    PASSES,
    Call,
    Comparison,
    Contender,
    Function,
    InputMaker,
    Options,
    Tensors,
    dtype_name,
    inputs_for,
    prepare,
)
from .isolation import in_own_process, keep_what_is_freed


def measure(comparison: Comparison, options: Options) -> list[dict]:
    """One row per contender. A contender that fails or is wrong gets an `error` and no times."""
    if options.own_process:
        return in_own_process(lambda: _measure(comparison, options), options.threads)
    return _measure(comparison, options)


def _measure(comparison: Comparison, options: Options) -> list[dict]:
    torch.compiler.reset()  # every comparison compiles for its own shape
    if options.own_process and comparison.keep_results:
        keep_what_is_freed()
    entries = _enter(comparison, options)
    with torch.set_grad_enabled(PASSES[comparison.direction].records):
        for entry in entries:
            _note_failure(entry, lambda entry=entry: entry.next_call()())
        clock = clocks.clock(options.device, cold=not options.warm, host=comparison.host)
        _time_rounds([e for e in entries if e.error is None], comparison, clock, options)
        # Afterwards, since results in float64 are larger than whatever a user of the op allocates.
        truths: Truths = {}
        for entry in entries:
            _note_failure(entry, lambda entry=entry: _examine(entry, truths, options))
    return [_row(entry, entries, comparison) for entry in entries]


def _note_failure(entry: _Entry, action: Callable[[], object]) -> None:
    """One broken contender must not hide the others."""
    if entry.error is not None:
        return
    try:
        action()
    except Exception as error:
        entry.error = textwrap.shorten(f"{type(error).__name__}: {error}", 160)
    if entry.error is not None:
        entry.ms = []


class Pool:
    """Input sets handed out in turn, so many that each has left the caches when its turn comes."""

    def __init__(self, make: InputMaker, direction: str, options: Options):
        first = inputs_for(direction, make)
        copies = _sets_needed(sum(t.nbytes for t in first), options) - 1
        self.sets = [first, *(_copy_of(first) for _ in range(copies))]
        self._turn = 0

    def take(self) -> Tensors:
        self._turn = (self._turn + 1) % len(self.sets)
        return self.sets[self._turn]


def _copy_of(inputs: Tensors) -> Tensors:
    return tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in inputs)


def _sets_needed(set_bytes: int, options: Options) -> int:
    if options.warm:
        return 1
    return min(max(2, math.ceil(options.rotate_bytes / max(1, set_bytes))), options.max_sets)


@dataclass
class _Entry:
    """A contender, and what is known about it so far."""

    contender: Contender
    direction: str
    pool: Pool
    accuracy: accuracy.Accuracy | None = None
    peak_bytes: int | None = None
    error: str | None = None
    ms: list[float] = field(default_factory=list)

    def next_call(self) -> Call:
        return prepare(self.contender.function, self.pool.take(), self.direction)


def _enter(comparison: Comparison, options: Options) -> list[_Entry]:
    pools: dict[InputMaker, Pool] = {}
    entries = []
    for contender in comparison.contenders:
        # A copy has no backward: its one forward moves the bytes of the whole pass.
        direction = "forward" if contender.provider == COPY else comparison.direction
        if contender.make not in pools:
            pools[contender.make] = Pool(contender.make, direction, options)
        entries.append(_Entry(contender, direction, pools[contender.make]))
    return entries


# ---- result and memory -------------------------------------------------------------------------


# By reference and inputs: its results in float64, and in the dtype of the inputs.
Truths = dict[tuple[Function, InputMaker], tuple[Tensors, Tensors]]


def _examine(entry: _Entry, truths: Truths, options: Options) -> None:
    """Check the result; only a right one is looked at further."""
    entry.accuracy = _check(entry, truths)
    if entry.accuracy is not None and not entry.accuracy.within(entry.contender.leeway):
        entry.error = f"wrong result: {entry.accuracy}"
        return
    entry.peak_bytes = memory.peak_extra_bytes(entry.next_call(), options.device)


def _check(entry: _Entry, truths: Truths) -> accuracy.Accuracy | None:
    """One result beside what the reference makes of the same inputs."""
    reference, make = entry.contender.reference, entry.contender.make
    if reference is None:
        return None
    inputs = entry.pool.sets[0]
    if (reference, make) not in truths:
        exact = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in inputs)
        truths[reference, make] = (
            prepare(_in_dtype(reference, torch.float64), exact, entry.direction)(),
            prepare(_in_dtype(reference, make.dtype), inputs, entry.direction)(),
        )
    result = prepare(entry.contender.function, inputs, entry.direction)()
    compared = (result, *truths[reference, make])
    if getattr(make, "as_one", False):
        compared = tuple(accuracy.as_one(tensors) for tensors in compared)
    return accuracy.compare(*compared)


def _in_dtype(function: Function, dtype: torch.dtype) -> Function:
    """A module as a copy with parameters in `dtype`; a function takes any dtype as it is."""
    return copy.deepcopy(function).to(dtype) if isinstance(function, nn.Module) else function


# ---- rounds -------------------------------------------------------------------------------------


def _time_rounds(
    entries: list[_Entry], comparison: Comparison, clock: clocks.Clock, options: Options
) -> None:
    """Everybody once per round, until the time is spent; fills in `ms`."""
    if not entries:
        return
    # The result of an operator lives as long as inputs do, so that the allocator hands out memory
    # that is as cold. A module fills its memory with temporaries anyway; its result is consumed.
    kept = max(len(e.pool.sets) for e in entries) if comparison.keep_results else 1
    results: deque[Tensors] = deque(maxlen=kept)

    def turn(entry: _Entry) -> float:
        """Median time of the calls of one turn."""
        calls = [entry.next_call() for _ in range(1 + options.turn_calls)]
        times = []
        for call in calls:
            ms, result = clock(call, comparison.repeat)
            times.append(ms)
            results.append(result)
        return statistics.median(times[1:])

    # Warm up, until no result takes memory that this process has never used.
    calls = len(entries) * (1 + options.turn_calls)
    for _ in _rounds(options.budget_s / 5, 2 + kept // calls, options.max_rounds):
        for entry in entries:
            turn(entry)
    for _ in _rounds(options.budget_s, options.min_rounds, options.max_rounds):
        for entry in entries:
            entry.ms.append(turn(entry))


def _rounds(budget_s: float, at_least: int, at_most: int) -> Iterator[int]:
    end = time.perf_counter() + budget_s
    for done in range(at_most):
        if done >= at_least and time.perf_counter() >= end:
            return
        yield done


# ---- rows --------------------------------------------------------------------------------------


def quantiles(samples: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return {"p20": deciles[1], "p50": deciles[4], "p80": deciles[7]}


def paired_ratio(numerators: list[float], denominators: list[float]) -> float | None:
    """Median of the ratios within each round; None when one side was not timed."""
    if not numerators or not denominators:
        return None
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def _row(entry: _Entry, entries: list[_Entry], comparison: Comparison) -> dict:
    contender, subject = entry.contender, entries[0]
    return {
        "comparison": comparison.name,
        "op": comparison.op,
        "pass": comparison.direction,
        "shape": str(comparison.shape),
        "kernel_size": comparison.shape.kernel_size,
        "provider": contender.provider,
        "dtype": dtype_name(contender.make.dtype),
        "layout": contender.make.layout,
        "sets": len(entry.pool.sets),
        "rounds": len(entry.ms),
        "ms": quantiles(entry.ms) if entry.ms else None,
        "ratio": paired_ratio(entry.ms, subject.ms),
        "bytes": contender.bytes,
        "gb_per_s": _gb_per_s(entry),
        "share_of_copy": _share_of_copy(entry, entries),
        "peak_bytes": entry.peak_bytes,
        "peak_ratio": _quotient(entry.peak_bytes, subject.peak_bytes),
        "accuracy": entry.accuracy and vars(entry.accuracy),
        "error": entry.error,
    }


def _gb_per_s(entry: _Entry) -> float | None:
    """Bytes of the byte model over the median time."""
    if not entry.ms or not entry.contender.bytes:
        return None
    return entry.contender.bytes / statistics.median(entry.ms) / 1e6


def _share_of_copy(entry: _Entry, entries: list[_Entry]) -> float | None:
    """The same bandwidth as a share of what the copy reached in the same rounds."""
    copies = [e for e in entries if e.contender.provider == COPY]
    if not copies or not entry.contender.bytes:
        return None
    speed_up = paired_ratio(copies[0].ms, entry.ms)
    return speed_up and speed_up * entry.contender.bytes / copies[0].contender.bytes


def _quotient(numerator: int | None, denominator: int | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None
