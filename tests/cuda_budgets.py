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
    # Instructions in the code, where a bulk copy stands for any number of accesses of 16 bytes.
    wide_loads: int = 0  # global loads of 16 bytes, at least
    wide_stores: int = 0
    narrow_loads: int | None = None  # global loads of fewer bytes, at most; None: any number
    narrow_stores: int | None = None
    instructions: int | None = None  # in the code, at most: for kernels that are unrolled
    since: int = 0  # the first architecture for which these five hold, such as 90


def registers_for(threads: int, blocks: int) -> int:
    """Registers of each thread with which so many blocks of so many threads stay resident."""
    return min(255, REGISTERS // (threads * blocks) // 8 * 8)


# Blocks of these sizes are what the choosers in csrc/cuda/<op>_launch.h launch; the reasons for the
# numbers are there, and the bounds that the compiler keeps to stand beside each kernel.
BUDGETS: tuple[Budget, ...] = (
    Budget(
        "context_fusion_planes_kernel", registers_for(256, 3), "three blocks of 256 resident",
        wide_loads=6, wide_stores=4,
    ),
    Budget(
        "context_fusion_images_kernel", registers_for(256, 2), "two blocks of 256 resident",
        wide_loads=6, wide_stores=4,
    ),
    Budget("context_fusion_grad_logits_kernel", 64, "sums a few numbers per channel"),
    Budget(
        "spatial_softmax_gate_tile_kernel<double", registers_for(448, 1), "one block of 448",
        wide_loads=6, wide_stores=2,
    ),
    Budget(
        "spatial_softmax_gate_tile_kernel", registers_for(448, 2), "two blocks of 448 resident",
        wide_loads=6, wide_stores=2,
    ),
    Budget(
        "spatial_softmax_gate_whole_kernel<cotnet::Plane", registers_for(768, 1), "blocks of 768",
        wide_loads=10, wide_stores=2,
    ),
    Budget(
        "spatial_softmax_gate_whole_kernel<cotnet::Image", registers_for(512, 1), "blocks of 512",
        wide_loads=10, wide_stores=2,
    ),
    Budget(
        "spatial_softmax_gate_gather_kernel<cotnet::Plane", registers_for(768, 1), "blocks of 768",
        wide_loads=4,
    ),
    Budget(
        "spatial_softmax_gate_gather_kernel<cotnet::Image", registers_for(512, 1), "blocks of 512",
        wide_loads=4,
    ),
    Budget(
        "spatial_softmax_gate_finish_kernel<cotnet::Plane", registers_for(768, 1), "blocks of 768",
        wide_loads=6, wide_stores=2,
    ),
    Budget(
        "spatial_softmax_gate_finish_kernel<cotnet::Image", registers_for(512, 1), "blocks of 512",
        wide_loads=6, wide_stores=2,
    ),
)  # fmt: skip
