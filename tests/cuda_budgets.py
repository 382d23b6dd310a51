"""What each CUDA kernel may use, as the compiled library shows it. `cuda_gate.py` reads this table.

A kernel is judged by the first row whose pattern is found in its demangled name, template arguments
included. Every kernel needs a row, and every row a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

# 65536 registers of a multiprocessor, shared by its resident threads in units of 8 per thread.
REGISTERS = 65536


@dataclass(frozen=True)
class Budget:
    """The limits of one kernel, and why they are where they are."""

    kernel: str  # a regular expression
    registers: int  # a thread's at most
    why: str
    stack: int = 0  # bytes of a thread that may live in memory: none, nothing is spilled
    wide: bool = False  # 16 bytes per global access, or bulk copies, for what the kernel streams
    narrow_loads: int = 0  # load instructions of fewer bytes that a wide kernel may have beside
    narrow_stores: int = 0
    wide_since: int = 0  # the first architecture on which `wide` holds, such as 90


def registers_for(threads: int, blocks: int) -> int:
    """Registers of each thread with which so many blocks of so many threads stay resident."""
    return min(255, REGISTERS // (threads * blocks) // 8 * 8)


BUDGETS: tuple[Budget, ...] = ()
