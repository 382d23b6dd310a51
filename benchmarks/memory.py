"""The largest amount of memory that one call holds at once, beyond what was held before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(call: Callable[[], object], device: str) -> int:
    """Results, saved tensors and temporaries at their highest point, in bytes.

    PyTorch's allocators count every tensor, whoever made it. Buffers that a library takes from
    the C library behind their back are not seen.
    """
    if torch.device(device).type == "cuda":
        return _peak_cuda(call)
    return _peak_cpu(call)


def _peak_cuda(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _peak_cpu(call: Callable[[], object]) -> int:
    """The CPU allocator keeps no peak, but the profiler records each allocation and release."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()  # alive to the end, as in use
    del result
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
