"""What a wrong kernel must fail: small problems that use every barrier, wait and mask.

Run as a program, this is a server with AddressSanitizer loaded and PyTorch imported: for each line
"check mutant folder" on its input it tests that mutant of the module in the folder in a process
forked for it, writes what that says to the file `log<mutant>` of the folder, and answers with the
exit status.
"""

from __future__ import annotations

import itertools
import os
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import emulated_norms as norms
import test_cuda_context_fusion as fusion
import test_cuda_group_norm_aggregation_pool as pool
import test_cuda_spatial_softmax_gate as gate
import torch
from cases import CASES, Case
from emulated_aggregations import check_schedules
from emulated_maps import GPUS, MODULE_FOLDER, load_kernels, shaped
from mutants import CHOICE
from oracle import FUSION, GATE, LOCAL, Function, expected
from test_cuda_aggregation_large import WINDOWS
from test_cuda_aggregations import TILES, tiled
from tolerances import assert_same_bits

SECONDS = 120  # of a core, for one module: a wait may never end


def schedules() -> Iterator[str]:
    for name in ("forward", "backward", "random"):
        load_kernels().set_schedule(name)
        yield name


# Two planes in the last block where others have more, strips, channels in two turns, bulk copies of
# these, large windows, maps without tiles; channels_last ones, of small windows and of large.
NAMES = ("tile_7x7", "tile_31x41", "tile_14x14", "large_9x11_k5")
LAST = (
    tiled("image_19x37", 1, 12, 2, 19, 37),
    replace(tiled("pixels_7x9", 1, 4, 8, 7, 9), kernel_size=5, padding=2),
    replace(tiled("pixels_9x8", 1, 4, 16, 9, 8), kernel_size=5, padding=2, stride=2),
)
AGGREGATIONS = (
    *(case for case in TILES + WINDOWS if case.name in NAMES),
    tiled("direct_30x40", 1, 2, 8, 30, 40),
    *LAST,
)


def local_aggregation() -> None:
    for case in AGGREGATIONS:
        for gpu in ("H200", "small"):
            for asked in LOCAL.arguments:
                check_schedules(
                    load_kernels(), schedules, LOCAL, case, torch.float32, case in LAST,
                    gpu=GPUS[gpu], asked={asked}.__contains__,
                )  # fmt: skip


# Blocks of many rows, the last with fewer; rows of several teams; a row that fills no vectors; one
# that several blocks share, or one block in many steps; slabs with channels to spare.
MAPS = (
    shaped("rows_7x5x5", 1, 7, 5, 5),
    shaped("rows_300x5x3", 1, 300, 5, 3),
    shaped("rows_3x9x67", 1, 3, 9, 67),
    shaped("row_1x1301", 1, 1, 1, 1301),
    shaped("rows_2x96x97", 1, 2, 96, 97),
    shaped("slab_6x33x31", 1, 6, 33, 31),
)


def check_maps(module: ModuleType, function: Function) -> None:
    """Values under every order of threads on GPUs of three sizes, in both layouts."""
    for case in MAPS:
        known = expected(function, case, torch.float32)
        for last in (False, True):
            for gpu in ("H200", "small", "wide"):
                first = None
                for schedule in schedules():
                    results = module.run(load_kernels(), known, case, last, gpu=GPUS[gpu])
                    module.compare(results, known)
                    first = first or results
                    for name, result in results.items():
                        assert_same_bits(result, first[name], f"{name}, {schedule} schedule")


def spatial_softmax_gate() -> None:
    check_maps(gate, GATE)


def context_fusion() -> None:
    check_maps(fusion, FUSION)


# Rows of several teams and many rows, the last block with fewer; a vector of three rows; several
# chunks of a plane; slabs with channels to spare.
SWEEPS = ((7, 7, 5, 5), (100, 3, 5, 3), (2, 6, 1, 2), (1, 2, 64, 65), (1, 135, 5, 7))


def check_sweeps(names: tuple[str, ...]) -> None:
    for name, shape in itertools.product(names, SWEEPS):
        args, truth = norms.known(name, shape, torch.float32)
        for last, gpu in itertools.product((False, True), ("H200", "small")):
            first = None
            for schedule in schedules():
                results = norms.run(load_kernels(), name, args, last, gpu=GPUS[gpu])
                norms.assert_close(name, results, truth, torch.float32)
                first = first or results
                for one, result in zip(first, results, strict=True):
                    assert_same_bits(result, one, f"{name}, {schedule} schedule")


OF_NORMS = tuple(name for name in norms.OPERATORS if "fusion" not in name)
OF_FUSION = tuple(name for name in norms.OPERATORS if "fusion" in name)


def batch_norm() -> None:
    check_sweeps(OF_NORMS)


def batch_norm_fusion() -> None:
    check_sweeps(OF_FUSION)


# Each kernel of the aggregation: tiles of several planes, strips, direct, channels_last, any other.
FIRST = ("tile_7x7", "tile_31x41", "direct_30x40")
POOLED = (
    *((case, False) for case in AGGREGATIONS if case.name in FIRST),
    (LAST[0], True),
    (CASES["heads2"], False),
)


def group_norm_aggregation_pool() -> None:
    for case, last in POOLED:
        pool.check_schedules(load_kernels(), schedules, case, torch.float32, last)


# By the op whose kernels are bound.
CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        local_aggregation,
        spatial_softmax_gate,
        context_fusion,
        batch_norm_fusion,  # before what its name begins with
        batch_norm,
        group_norm_aggregation_pool,
    )
}


def compute_truth(functions: tuple[Function, ...], cases: tuple[Case, ...]) -> None:
    """Once, before the processes are forked that need it."""
    for function in functions:
        for case in cases:
            expected(function, case, torch.float32)


def check_forked(check: str, mutant: str, folder: Path) -> int:
    process = os.fork()
    if process == 0:
        log = os.open(folder / f"log{mutant}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {MODULE_FOLDER: str(folder), CHOICE: mutant}
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        status = 1
        try:
            CHECKS[check]()
            status = 0
        except Exception:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def serve() -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    compute_truth((LOCAL,), AGGREGATIONS)
    compute_truth((GATE, FUSION), MAPS)
    for name, shape in itertools.product(norms.OPERATORS, SWEEPS):
        norms.known(name, shape, torch.float32)
    for line in sys.stdin:
        check, mutant, folder = line.split(maxsplit=2)
        print(check_forked(check, mutant, Path(folder.strip())), flush=True)


if __name__ == "__main__":
    serve()
