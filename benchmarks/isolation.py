"""Work in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

LARGEST = (32 << 20) - (64 << 10)  # bytes; glibc does not learn from larger blocks


def in_own_process(work: Callable[[], Result], threads: int) -> Result:
    """What `work` returns in a copy of this process, which may not have used more than one thread.

    What an allocation costs, and so the time of whoever makes large temporaries, depends on what a
    process has allocated and freed before: the C library keeps memory or gives it back to the
    system by the sizes that it has seen. A copy has seen nothing.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(threads)
        sender.send(work())

    process = context.Process(target=run)
    process.start()
    sender.close()  # here; the copy has one of its own
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"a measurement ended with exit status {process.exitcode}; what it printed is above"
        ) from None
    finally:
        process.join()


def keep_what_is_freed() -> None:
    """Makes the heap of this process what it is after a network has run: nothing goes back soon.

    glibc learns from the largest block of up to 32 MB that was ever freed. What is no larger stays
    in the heap, and the end of the heap goes back to the system only where twice as much lies idle.
    """
    torch.empty(LARGEST, dtype=torch.uint8)
