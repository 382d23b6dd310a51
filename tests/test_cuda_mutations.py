"""Real kernels with classic mistakes: each must fail the tests, or the tests do not look at it.

A mutation is a change of text in a copy of csrc/cuda, compiled for float32 only; mutation_checks.py
has the tests that it must fail.
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from cpp_build import ROOT, run
from emulated_maps import TARGET
from mutation_checks import CHECKS
from test_sanitizers import environment

ANY = "aggregation.cuh"
TILE = "aggregation_tile.cuh"
GRADIENT = "aggregation_tile_grad_weight.cuh"
COPIES = "aggregation_tile_copies.cuh"
DIRECT = "aggregation_direct.cuh"
LARGE = "aggregation_tile_large.cuh"
PLACE = "aggregation_tile_place.cuh"
IMAGE = "aggregation_image.cuh"
BOTH = "aggregation_image_backward.cuh"
PIXELS = "aggregation_pixels.cuh"
LAST_THREAD = "if (rest >= pixels.threads) return;\n"
WAIT = "    cp_async_wait<0>();\n"
BARRIER = "  sync_block();\n"
READY = "  copies.ready_to_store();\n"
MUTATIONS = {
    "nothing changed": (TILE, "", ""),
    "no barrier after the copies": (COPIES, f"{WAIT}  {BARRIER}", WAIT),
    "no wait for the copies": (COPIES, WAIT, ""),
    "no wait for the bulk copies": (COPIES, "mbarrier_wait(barrier_, phase_);", ""),
    "a wait for the copies before": (COPIES, "phase_ ^= 1;", ""),
    "no fence before bulk stores": (COPIES, "if (bulk_) fence_proxy_async();", ""),
    "no wait for bulk stores": (COPIES, "if (bulk_) bulk_store_wait();", ""),
    "no barrier before y replaces x": (TILE, f"{BARRIER}\n  // y takes", "\n  // y takes"),
    "no barrier before y leaves": (TILE, READY, ""),
    "a column before the map": (TILE, "first_column ? acc(0) : widen(from[-1])", "widen(from[-1])"),
    "a row outside of the map": (TILE, "if (source < 0 || source >= height) continue;", ""),
    "a weight from outside of the map": (TILE, "last_column ? acc(0) : w[t]", "w[t]"),
    "a run too long": (PLACE, "kTaps * planes *", "kTaps * tile.planes *"),
    "channels overwritten too early": (GRADIENT, "if (chunk > 0) sync_block();", ""),
    "no barrier before grad_w leaves": (GRADIENT, READY, ""),
    "a column outside of a large map": (LARGE, "inside(i) ? widen(from[i", "true ? widen(from[i"),
    "the end of another row": (DIRECT, "values[0] = first ? acc(0) :", "values[0] ="),
    "a row of another plane": (DIRECT, "bool inside = row + u - 1 >= 0 &&", "bool inside ="),
    "a lane without a neighbour": (DIRECT, "lane == 31 ? beside : behind", "behind"),
    "threads beyond the last": (DIRECT, "busy ? rest : direct.threads - 1", "rest"),
    "no wait for the rows": (IMAGE, WAIT, ""),
    "pixels of another row": (IMAGE, "unsigned(at.width);", "~0u;"),
    "beyond the ring": (IMAGE, "place < ring ? place :", "place <= ring ? place :"),
    "weight channels of nobody": (IMAGE, "if (there) store_vec", "store_vec"),
    "no barrier after the rows of both": (BOTH, "sync_block();  // these", "// these"),
    "windows put in order too early": (BOTH, "sync_warp();", ""),
    "no barrier after putting in order": (BOTH, f"{BARRIER}    const bool", "    const bool"),
    "a tap behind the map": (PIXELS, "at < in ? at : -1", "at"),
    "a tap below the map": (PIXELS, "place < out ? place : -1", "true ? place : -1"),
    "a step between pixels": (PIXELS, "&& place * stride == at", ""),
    "pixels beyond the last": (PIXELS, LAST_THREAD, ""),
    "channels of another chunk": (PIXELS, "chunk * kPixelSharers", "chunk"),
    "no barrier before a row leaves": (BOTH, f"{BARRIER}        COTNET_U", "        COTNET_U"),
}  # fmt: skip

SHARED = "spatial_softmax_gate_common.cuh"
ROWS = "spatial_softmax_gate_tile.cuh"
SWEEP = "spatial_softmax_gate_sweep.cuh"
OWN = "unit, chunk);"
MUTATIONS |= {
    "nothing changed in the gate": (SHARED, "", ""),
    "gate: sums of another maximum": (SHARED, "    other.raise(most);\n", ""),
    "gate: half of a warp's sums": (SHARED, "d = lanes; d < 32;", "d = lanes; d < 16;"),
    "gate: a warp's sums": (SHARED, "memory + i, warps, width", "memory + i, warps - 1, width"),
    "gate: no barrier before warps merge": (SHARED, f"{BARRIER}  SoftmaxSums", "  SoftmaxSums"),
    "gate: no barrier before totals": (SHARED, f"  }}\n{BARRIER}", "  }\n"),
    "gate: no barrier after the copies": (ROWS, f"{BARRIER}  sum_tile_rows", "  sum_tile_rows"),
    "gate: no barrier before teams merge": (ROWS, f"{BARRIER}  if (thread", "  if (thread"),
    "gate: no barrier before results": (ROWS, f".normalised();\n{BARRIER}", ".normalised();\n"),
    "gate: a team's sums": (ROWS, "thread * teams, teams, 1", "thread * teams, teams - 1, 1"),
    "gate: zeros beyond the row": (ROWS, "minus_infinity<scalar_t>()", "scalar_t(0)"),
    "gate: the row before": (ROWS, "i < left ? first : second", "first"),
    "gate: rows beyond the last": (ROWS, "left < plan.rows_per_block ? int(left) :", ""),
    "gate: zeros beyond the chunk": (SWEEP, "minus_infinity<scalar_t>()", "scalar_t(0)"),
    "gate: a batch kept in part": (SWEEP, "step + kCount > kept.steps", "step >= kept.steps"),
    "gate: the first batch": (SWEEP, "step >= 0; step -=", "step > 0; step -="),
    "gate: the last chunk": (SWEEP, "chunk < plan.chunks;", "chunk < plan.chunks - 1;"),
    "gate: all chunks in one place": (SWEEP, f"own = partial_of(partial, vectors, plan, {OWN}",
                                      "own = partial_of(partial, vectors, plan, unit, 0);"),
}  # fmt: skip

FUSION = "context_fusion.cuh"
LOGITS = "weights_of(maps.logits, first_row + int(threadIdx.x));\n"
SLAB = "slab * width + i);\n"
PART = "memory.part[team] = sum;\n"
STAY = "mend_slot(in[b].g, maps.grad_y, slots[b], zero);"
MUTATIONS |= {
    "nothing changed in the fusion": (FUSION, "", ""),
    "fusion: no barrier after the weights": (FUSION, LOGITS + BARRIER, LOGITS),
    "fusion: no barrier before rows": (FUSION, f"  {BARRIER}    sum_products", "    sum_products"),
    "fusion: no barrier before teams merge": (FUSION, PART + BARRIER, PART),
    "fusion: no barrier after a slab's weights": (FUSION, SLAB + BARRIER, SLAB),
    "fusion: no barrier before warps merge": (FUSION, f"sums[i];\n{BARRIER}", "sums[i];\n"),
    "fusion: a team's sum": (FUSION, "0; i < plan.teams_per_row;", "1; i < plan.teams_per_row;"),
    "fusion: a warp's sum": (FUSION, "warp < warps;", "warp < warps - 1;"),
    "fusion: half of a warp's sums": (FUSION, "d = plan.lanes; d < 32;", "d = plan.lanes; d < 16;"),
    "fusion: the last chunk": (FUSION, "chunk < plan.chunks;", "chunk < plan.chunks - 1;"),
    "fusion: ends that fill no vector": (FUSION, f"if (kBackward) {STAY}", ""),
    "fusion: the row before": (FUSION, "p = memory.row[++row];", "++row;"),
    "fusion: rows beyond the last": (FUSION, "left < plan.rows_per_block ? int(left) :", ""),
    "fusion: channels beyond the last": (FUSION, "if (channel >= plan.channels) return;", ""),
}  # fmt: skip

PASSES = "map_sweep.cuh"
TABLES = "norm_table.cuh"
MOMENTS = "batch_norm_statistics.cuh"
KEPT = "keep(sums);\n    sync_block();\n"
MERGED = "  sums_of_rows.merge(block, vectors.first);\n"
FIRST = "first_sums.merge(block, vectors.first);\n"
MEANS = "first_sums.total(row, 0) / acc(block.length);\n"
SLAB_MEANS = "first_sums.total(0, i) / acc(block.pixels);\n"
MUTATIONS |= {
    "nothing changed in the sweep": (PASSES, "", ""),
    "sweep: no barrier after coefficients": (PASSES, f"{BARRIER}\n  COTNET_UNROLL\n", "\n"),
    "sweep: no barrier before rows": (PASSES, f"  {BARRIER}  {MERGED}", f"  {MERGED}"),
    "sweep: no barrier before teams merge": (PASSES, f"{MERGED}  {BARRIER}", MERGED),
    "sweep: no barrier after a slab's": (PASSES, f"{BARRIER}  acc coeff", "  acc coeff"),
    "sweep: no barrier before warps merge": (PASSES, KEPT, "keep(sums);\n"),
    "sweep: elements of nobody": (PASSES, "if (!slot.has(i)) continue;", ""),
    "sweep: pixels beyond the last": (PASSES, "if (!slots[b].has(e)) continue;", ""),
    "sweep: the row before": (PASSES, "enter(++row);", "enter(row), ++row;"),
    "sweep: another piece of a vector": (PASSES, "v == first ? piece : 0", "0"),
    "table: no barrier before warps add up": (TABLES, BARRIER, ""),
    "nothing changed in the statistics": (MOMENTS, "", ""),
    "statistics: no barrier before rows": (MOMENTS, f"{BARRIER}  {FIRST}", f"  {FIRST}"),
    "statistics: no barrier before teams merge": (MOMENTS, f"{FIRST}{BARRIER}", FIRST),
    "statistics: no barrier after means": (MOMENTS, f"{MEANS}{BARRIER}", MEANS),
    "statistics: no barrier after a slab's": (MOMENTS, f"{SLAB_MEANS}{BARRIER}", SLAB_MEANS),
    "statistics: pixels beyond the last": (MOMENTS, "slots[b].has(e) ? widen(packs[b].at[e])",
                                           "true ? widen(packs[b].at[e])"),
}  # fmt: skip

POOL = "group_norm_aggregation_pool.cuh"
OF_POOL = POOL.removesuffix(".cuh")
MUTATIONS |= {
    "nothing changed in the pooling": (POOL, "", ""),
    "pool: shifts of the first plane": (TILE, "of_plane + j * p.weight", "j * p.weight", OF_POOL),
    "pool: a shift of all sharers": (DIRECT, "tail.of(channel + j * p.weight_channels)",
                                     "tail.of(channel)", OF_POOL),
    "pool: a shift of four channels": (IMAGE, "tail.of(channel + i)", "tail.of(channel)", OF_POOL),
    "pool: a shift of all channels": (ANY, "tail.of(channel + c * p.weight_channels)",
                                      "tail.of(channel)", OF_POOL),
    "pool: the first map alone": (POOL, "i < kMaps", "i < 1"),
    "pool: sums for means": (POOL, "1 / double(p.out_plane())", "1.0"),
    "pool: nothing but the sum": (POOL, "ShiftedSilu<acc>{shift}", "NoTail{}"),
}  # fmt: skip

# What compiles once for all mutants, as it is most of the work: the headers of other projects.
HEADERS = """
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <functional>
#include <map>
#include <sstream>
"""
EMULATOR = ROOT / "tests" / "cuda_emulator"


def compile_cpp(*arguments: str | Path) -> None:
    includes = run(sys.executable, "-m", "pybind11", "--includes").split()
    run(
        os.environ.get("CXX", "c++"), "-std=c++17", "-Og", "-g1", "-fPIC", "-fvisibility=hidden",
        # Checks of addresses as calls, and of nothing on the stack: compiling takes half the time.
        "-fsanitize=address", "--param", "asan-instrumentation-with-call-threshold=0", "--param",
        "asan-stack=0", "-DCOTNET_EMULATED", "-DCOTNET_FLOAT32_ONLY", *includes, *arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "headers.h").write_text(HEADERS)
    compile_cpp("-x", "c++-header", folder / "headers.h", "-o", folder / "headers.h.gch")
    sources = [f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", EMULATOR / "module.cpp"]
    compile_cpp("-include", folder / "headers.h", "-c", *sources, "-o", folder / "module.o")
    return folder


def op_of(name: str, old: str = "", new: str = "", op: str | None = None) -> str:
    """The op whose kernels a mutation of a file of csrc/cuda is tested with."""
    if op is not None:
        return op
    if name in (PASSES, TABLES):
        return "batch_norm_fusion"
    return next((op for op in CHECKS if name.startswith(op)), "local_aggregation")


def build(folder: Path, prepared: Path, name: str, old: str, new: str, *op: str) -> None:
    """The module of one op alone, from a copy of the kernels with one change."""
    shutil.copytree(ROOT / "csrc" / "cuda", folder / "cuda")
    text = (folder / "cuda" / name).read_text()
    assert not old or old in text, f"{name} has changed: the mutation finds nothing"
    (folder / "cuda" / name).write_text(text.replace(old, new, 1) if old else text)
    sources = [f"-I{folder}", f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]
    sources += [EMULATOR / f"{op_of(name, old, new, *op)}.cpp", prepared / "module.o"]
    library = folder / f"{TARGET}{sysconfig.get_config_var('EXT_SUFFIX')}"
    compile_cpp("-include", prepared / "headers.h", "-shared", *sources, "-o", library)


class Server:
    """A process of mutation_checks.py."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "mutation_checks.py"],
            env=environment(folder) | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def check(self, op: str, folder: Path) -> tuple[int, str]:
        """Exit status and output of the checks of an op with the module in a folder."""
        self.process.stdin.write(f"{op} {folder}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), (folder / "log").read_text(errors="replace")


@pytest.fixture(scope="module")
def outcomes(request, prepared) -> Iterator[dict[str, Future]]:
    """What becomes of each mutation that is asked for, worked out on all cores."""
    workers = len(os.sched_getaffinity(0))
    servers = [Server(prepared) for _ in range(workers)]
    idle = queue.SimpleQueue()
    for server in servers:
        idle.put(server)

    def outcome(number: int, mutation: str) -> tuple[int, str]:
        folder = prepared / str(number)
        build(folder, prepared, *MUTATIONS[mutation])
        server = idle.get()
        try:
            return server.check(op_of(*MUTATIONS[mutation]), folder)
        finally:
            idle.put(server)

    items = [i for i in request.session.items if i.originalname == "test_mutations_are_caught"]
    asked = [item.callspec.params["mutation"] for item in items]
    with ThreadPoolExecutor(workers) as pool:
        yield {name: pool.submit(outcome, i, name) for i, name in enumerate(asked)}
        pool.shutdown(cancel_futures=True)
    for server in servers:
        server.process.communicate()


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(outcomes, mutation):
    status, log = outcomes[mutation].result()
    if mutation.startswith("nothing changed"):
        assert status == 0, log[-3000:]
        return
    reasons = ("AssertionError", "Error: ", "AddressSanitizer")
    assert status and any(reason in log for reason in reasons), (status, log[-3000:])
