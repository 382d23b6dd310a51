"""How the demo measures: error, time and peak memory."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def median_seconds(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The median wall time of each call. The calls take turns, so that a machine which slows down
    or speeds up in between treats all of them alike."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(repeats):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that tensors made during `call` hold at one time, its results included.

    Counted from the allocations and frees that PyTorch's CPU allocator reports to the profiler,
    so it is exact and repeatable; memory that other libraries take for themselves is not in it.
    """
    # Kineto otherwise announces each start and stop on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()  # kept until the recording ends: a result is memory too
    del result
    events = recorded.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def scaled_error(
    result: Sequence[Tensor], exact: Sequence[Tensor], *as_exact: Sequence[Tensor]
) -> float:
    """The largest difference between two lists of tensors, in units of the largest entry. With
    more answers that are `as_exact`, what lies between the least and the largest has none.

    The unit is one for a whole list (outputs, or all gradients of a step), because entries that
    are zero up to rounding, such as the gradient of a bias that a norm cancels, have no size of
    their own to compare with.
    """
    unit = torch.stack([tensor.double().abs().max() for tensor in exact]).max()
    differences = []
    for ours, *answers in zip(result, exact, *as_exact, strict=True):
        ours, answers = ours.double(), torch.stack(answers).double()
        least, largest = answers.amin(0), answers.amax(0)
        differences.append((ours - ours.clamp(least, largest)).abs().max())
    return float(torch.stack(differences).max() / unit)  # NaN stays NaN
