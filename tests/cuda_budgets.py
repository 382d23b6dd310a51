"""What each CUDA kernel may use, as the compiled library shows it. `cuda_gate.py` reads this table.

A kernel is judged by the first row whose pattern is found in its name, which reads
`cotnet::a_kernel<float, 3> for sm_90`. Every kernel needs a row, and every row a kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# A multiprocessor deals warps out to four quarters; the warps of a quarter share its registers, in
# units of 8 for each thread.
QUARTERS, REGISTERS = 4, 16384


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
    work: bool = False  # a fast path of aggregations: cuda_work.py has a row for it too


def registers_for(threads: int, blocks: int) -> int:
    """Registers of each thread with which so many blocks of so many threads stay resident."""
    warps = -(-threads // 32 * blocks // QUARTERS)  # of the fullest quarter
    return min(255, REGISTERS // (32 * warps) // 8 * 8)


def wide(loads: int, stores: int) -> dict[str, int]:
    return {"wide_loads": loads, "wide_stores": stores}


ONLY_WIDE = {"narrow_loads": 0, "narrow_stores": 0}


def constant(name: str) -> int:
    """A number of the kernels' own, such as the threads of their blocks."""
    folder = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
    text = "".join(path.read_text() for path in sorted(folder.glob("*.*h")))
    return int(re.search(rf"constexpr int {name} = (\d+);", text).group(1))


TILE = constant("kTileThreads")
PIXELS, BOTH = constant("kImageThreads"), constant("kImageBackwardThreads")
DIRECT = constant("kDirectThreads")
ANY = registers_for(constant("kAnyThreads"), 1)
ROWS = registers_for(constant("kGateRowThreads"), 1)
IMAGES = registers_for(constant("kGateImageBackwardThreads"), 1)
SPLIT_ROWS = registers_for(constant("kGateSplitThreads"), 3)
SPLIT_IMAGES = registers_for(constant("kGateSplitThreads"), 2)
FUSION = constant("kFusionThreads")
TILES = constant("kGateTileThreads")
SWEEP, SLAB = constant("kSweepThreads"), constant("kSweepImageThreads")
TABLE = registers_for(constant("kTableThreads"), 1)
NORM = constant("kNormThreads")
GATE = "spatial_softmax_gate_"

PIXEL = registers_for(constant("kPixelThreads"), 3)
FAST = {"work": True}

BUDGETS: tuple[Budget, ...] = (
    # Any shape: a value at a time, and as many registers as a block can have. Nothing is spilled.
    Budget("aggregation_(forward|grad_input|grad_weight)_kernel", ANY, "a block must fit"),
    # Eleven vectors a row of taps, and nothing narrower but the columns beside a warp's; and sums
    # over the map, where they are asked for.
    Budget("aggregation_direct_k.*Silu", registers_for(DIRECT, 3), "three", **wide(19, 8), **FAST),
    Budget(
        "aggregation_direct_kernel",
        registers_for(DIRECT, 3),
        "three blocks",
        **wide(11, 8),
        narrow_stores=0,
        **FAST,
    ),  # fmt: skip
    # Runs of a tile come and go in 16 bytes, but for their ends.
    Budget("aggregation_tile_kernel", registers_for(TILE, 2), "two blocks", **wide(6, 3), **FAST),
    Budget(
        "aggregation_tile_grad_weight_k.*Sums", registers_for(TILE, 2), "two", **wide(2, 0), **FAST
    ),
    Budget(
        "aggregation_tile_grad_weight_kernel", registers_for(TILE, 2), "two", **wide(2, 1), **FAST
    ),
    # Of large windows: 28 sums, a row of weights and a row of one channel.
    Budget(
        "aggregation_tile_grad_weight_large_k.*Sums",
        registers_for(TILE, 2),
        "two",
        **wide(4, 0),
        **FAST,
    ),
    Budget(
        "aggregation_tile_grad_weight_large_k", registers_for(TILE, 2), "two", **wide(4, 1), **FAST
    ),
    # channels_last: all moves in 16 bytes, but for numbers of a group norm and sums in double.
    Budget(
        "aggregation_image_k.*Norm", registers_for(PIXELS, 3), "three blocks", **wide(4, 1), **FAST
    ),
    Budget(
        "aggregation_image_kernel",
        registers_for(PIXELS, 4),
        "four",
        **wide(4, 1),
        **ONLY_WIDE,
        **FAST,
    ),
    Budget(
        "aggregation_image_b.*true", registers_for(PIXELS, 2), "two blocks", **wide(6, 0), **FAST
    ),
    Budget("aggregation_image_b.*Norm", registers_for(BOTH, 2), "two blocks", **wide(6, 2), **FAST),
    Budget("aggregation_image_b", registers_for(BOTH, 2), "two", **wide(6, 2), **ONLY_WIDE, **FAST),
    Budget(
        "aggregation_tile_backward_k.*, false>", registers_for(TILE, 2), "two", **wide(8, 3), **FAST
    ),
    Budget(
        "aggregation_tile_backward_kernel",
        registers_for(TILE, 2),
        "two blocks",
        **wide(8, 6),
        **FAST,
    ),
    # Weights in the official order, and numbers of a norm, come element by element.
    Budget(
        "aggregation_pixels_kernel", PIXEL, "three blocks", **wide(8, 8), narrow_stores=0, **FAST
    ),
    Budget(
        "aggregation_pixels_grad_weight_k",
        PIXEL,
        "three blocks",
        **wide(6, 5),
        narrow_loads=0,
        **FAST,
    ),
    Budget("softmax_normaliser_kernel", registers_for(constant("kAnyThreads"), 3), "three blocks"),
    Budget("group_norm_image_st", registers_for(NORM, 3), "three", **wide(2, 0), narrow_loads=0),
    Budget("group_norm_statistics_kernel", registers_for(NORM, 3), "three blocks: reads w alone"),
    Budget("group_norm_sums_kernel", registers_for(NORM, 1), "a block must fit"),
    Budget("group_norm_(means|merge|parameters|strips)_k", registers_for(NORM, 2), "little to do"),
    # Vectors of 16 bytes, several under way; narrower accesses are for the ends of unaligned maps.
    Budget("context_fusion_planes_kernel", registers_for(FUSION, 3), "three blocks", **wide(6, 4)),
    Budget("context_fusion_images_kernel", registers_for(FUSION, 2), "two blocks", **wide(6, 4)),
    Budget("context_fusion_grad_logits_kernel", 64, "sums a few numbers per channel"),
    # Sweeps that write maps, and those that leave sums alone. Narrow accesses as above.
    Budget("sweep_planes_k.*(ard|Blend)>", registers_for(SWEEP, 3), "three blocks", **wide(4, 2)),
    Budget("sweep_planes_kernel", registers_for(SWEEP, 3), "three blocks", **wide(4, 0)),
    Budget("sweep_images_k.*(ard|Blend)>", registers_for(SLAB, 3), "three blocks", **wide(8, 4)),
    Budget("sweep_images_kernel", registers_for(SLAB, 3), "three blocks", **wide(6, 0)),
    Budget("sweep_merge_kernel", 64, "sums a few numbers per channel"),
    Budget("batch_norm_st.*_planes_k", registers_for(SWEEP, 3), "three blocks", **wide(4, 0)),
    Budget("batch_norm_st.*_images_k", registers_for(SLAB, 4), "four blocks", **wide(8, 0)),
    Budget("norm_table_kernel|batch_norm_statistics_merge_kernel", TABLE, "a block must fit"),
    Budget(f"{GATE}tile_kernel<double", registers_for(TILES, 1), "one block", **wide(6, 2)),
    Budget(f"{GATE}tile_kernel", registers_for(TILES, 2), "two blocks", **wide(6, 2)),
    Budget(f"{GATE}whole_kernel<cotnet::Plane", ROWS, "a block must fit", **wide(10, 2)),
    Budget(f"{GATE}whole_kernel<cotnet::Image", IMAGES, "a block must fit", **wide(10, 2)),
    Budget(f"{GATE}gather_kernel<cotnet::Plane", SPLIT_ROWS, "three blocks", **wide(4, 0)),
    Budget(f"{GATE}gather_kernel<cotnet::Image", SPLIT_IMAGES, "two blocks", **wide(4, 0)),
    Budget(f"{GATE}finish_kernel<cotnet::Plane", SPLIT_ROWS, "three blocks", **wide(6, 2)),
    Budget(f"{GATE}finish_kernel<cotnet::Image", SPLIT_IMAGES, "two blocks", **wide(6, 2)),
)
