"""How long one call takes: by the clock of the host, or between two events on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .comparison import Call, Tensors

Clock = Callable[[Call, int], tuple[float, Tensors]]  # milliseconds per call, and the last result

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
CYCLES = 2_000_000  # of a GPU in a millisecond, at most
LEAST_MS, MOST_MS = 0.5, 10.0  # of waiting before a sample


def clock(device: str, cold: bool = True, host: bool = False) -> Clock:
    return host_clock if host or torch.device(device).type != "cuda" else CudaClock(device, cold)


def host_clock(call: Call, repeat: int) -> tuple[float, Tensors]:
    start = time.perf_counter_ns()
    for _ in range(repeat):
        result = call()
    return (time.perf_counter_ns() - start) / 1e6 / repeat, result


class CudaClock:
    """The time of the kernels of a call, and not of the host that launches them.

    Before the first event the GPU waits for so long that all launches are queued when it goes on;
    so gaps between kernels are the GPU's own. For cold samples a large buffer is then read: what
    the inputs left in the L2 cache is gone, and reading leaves nothing that must be written back.
    """

    def __init__(self, device: str, cold: bool):
        size = FLUSH_BYTES // 4 if cold else 0
        self._flush = torch.zeros(size, dtype=torch.int32, device=device)
        self._head_ms = LEAST_MS

    def __call__(self, call: Call, repeat: int) -> tuple[float, Tensors]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(CYCLES * self._head_ms))
        if self._flush.numel():
            self._flush.sum(dtype=torch.int32)
        queued = time.perf_counter_ns()
        start.record()
        for _ in range(repeat):
            result = call()
        end.record()
        launching = (time.perf_counter_ns() - queued) / 1e6
        end.synchronize()
        self._head_ms = min(MOST_MS, max(self._head_ms, 1.5 * launching))
        return start.elapsed_time(end) / repeat, result
