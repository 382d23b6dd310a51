"""Real kernels with classic mistakes: each must fail the tests, or the tests do not look at it.

mutants.py says what a mutation is, mutation_checks.py which tests it must fail.
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
from mutants import PRELUDE, Mutation, apart, plant
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
        "no barrier after the copies": (COPIES, f"{WAIT}  @{BARRIER}@", ""),
    "no wait for the copies": (COPIES, WAIT, ""),
    "no wait for the bulk copies": (COPIES, "mbarrier_wait(barrier_, phase_);", ""),
    "a wait for the copies before": (COPIES, "phase_ ^= 1;", ""),
    "no fence before bulk stores": (COPIES, "if (bulk_) fence_proxy_async();", ""),
    "no wait for bulk stores": (COPIES, "if (bulk_) bulk_store_wait();", ""),
    "no barrier before y replaces x": (TILE, f"@{BARRIER}@\n  // y takes", ""),
    "no barrier before y leaves": (TILE, READY, ""),
    "a column before the map": (TILE, "@first_column@ ? acc(0) : widen(from[-1])", "false"),
    "a row outside of the map": (TILE, "if (source < 0 || source >= height) continue;", ""),
    "a weight from outside of the map": (TILE, "@last_column@ ? acc(0) : w[t]", "false"),
    "a run too long": (PLACE, "kTaps * @planes@ *", "tile.planes"),
    "channels overwritten too early": (GRADIENT, "if (chunk > 0) sync_block();", ""),
    "no barrier before grad_w leaves": (GRADIENT, READY, ""),
    "a column outside of a large map": (LARGE, "@inside(i)@ ? widen(from[i", "true"),
    "the end of another row": (DIRECT, "values[0] = @first@ ? acc(0)", "false"),
    "a row of another plane": (DIRECT, "bool inside = @row + u - 1 >= 0@", "true"),
    "a lane without a neighbour": (DIRECT, "lane == 31 ? beside : behind", "behind"),
    "threads beyond the last": (DIRECT, "busy ? rest : direct.threads - 1", "rest"),
    "no wait for the rows": (IMAGE, WAIT, ""),
    "pixels of another row": (IMAGE, "@unsigned(at.width)@;", "~0u"),
    "beyond the ring": (IMAGE, "@place < ring@ ? place :", "place <= ring"),
    "weight channels of nobody": (IMAGE, "if (@there@) store_vec", "true"),
    "no barrier after the rows of both": (BOTH, "@sync_block();@  // these", ""),
    "windows put in order too early": (BOTH, "sync_warp();", ""),
    "no barrier after putting in order": (BOTH, f"@{BARRIER}@    const bool", ""),
    "a tap behind the map": (PIXELS, "at < in ? at : -1", "at"),
    "a tap below the map": (PIXELS, "@place < out@ ? place : -1", "true"),
    "a step between pixels": (PIXELS, "&& @place * stride == at@", "true"),
    "pixels beyond the last": (PIXELS, LAST_THREAD, ""),
    "channels of another chunk": (PIXELS, "chunk * kPixelSharers", "chunk"),
    "no barrier before a row leaves": (BOTH, f"@{BARRIER}@        COTNET_U", ""),
}  # fmt: skip

SHARED = "spatial_softmax_gate_common.cuh"
ROWS = "spatial_softmax_gate_tile.cuh"
SWEEP = "spatial_softmax_gate_sweep.cuh"
OWN = "partial_of(partial, vectors, plan, unit"
MUTATIONS |= {
    "gate: sums of another maximum": (SHARED, "    other.raise(most);\n", ""),
    "gate: half of a warp's sums": (SHARED, "d = lanes; d < @32@;", "16"),
    "gate: a warp's sums": (SHARED, "memory + i, @warps@, width", "warps - 1"),
    "gate: no barrier before warps merge": (SHARED, f"@{BARRIER}@  SoftmaxSums", ""),
    "gate: no barrier before totals": (SHARED, f"  }}\n@{BARRIER}@", ""),
    "gate: no barrier after the copies": (ROWS, f"@{BARRIER}@  sum_tile_rows", ""),
    "gate: no barrier before teams merge": (ROWS, f"@{BARRIER}@  if (thread", ""),
    "gate: no barrier before results": (ROWS, f".normalised();\n@{BARRIER}@", ""),
    "gate: a team's sums": (ROWS, "thread * teams, @teams@, 1", "teams - 1"),
    "gate: zeros beyond the row": (ROWS, "minus_infinity<scalar_t>()", "scalar_t(0)"),
    "gate: the row before": (ROWS, "i < left ? first : second", "first"),
    "gate: rows beyond the last": (ROWS, "@left < plan.rows_per_block@ ? int(left)", "false"),
    "gate: zeros beyond the chunk": (SWEEP, "minus_infinity<scalar_t>()", "scalar_t(0)"),
    "gate: a batch kept in part": (SWEEP, "step + kCount > kept.steps", "step >= kept.steps"),
    "gate: the first batch": (SWEEP, "@step >= 0@; step -=", "step > 0"),
    "gate: the last chunk": (SWEEP, "chunk < @plan.chunks@;", "plan.chunks - 1"),
    "gate: all chunks in one place": (SWEEP, f"own = {OWN}, @chunk@);", "0"),
}  # fmt: skip

FUSION = "context_fusion.cuh"
LOGITS = "weights_of(maps.logits, first_row + int(threadIdx.x));\n"
SLAB = "slab * width + i);\n"
PART = "memory.part[team] = sum;\n"
STAY = "mend_slot(in[b].g, maps.grad_y, slots[b], zero);"
MUTATIONS |= {
    "fusion: no barrier after the weights": (FUSION, f"{LOGITS}@{BARRIER}@", ""),
    "fusion: no barrier before rows": (FUSION, f"  @{BARRIER}@    sum_products", ""),
    "fusion: no barrier before teams merge": (FUSION, f"{PART}@{BARRIER}@", ""),
    "fusion: no barrier after a slab's weights": (FUSION, f"{SLAB}@{BARRIER}@", ""),
    "fusion: no barrier before warps merge": (FUSION, f"sums[i];\n@{BARRIER}@", ""),
    "fusion: a team's sum": (FUSION, "@0@; i < plan.teams_per_row;", "1"),
    "fusion: a warp's sum": (FUSION, "warp < @warps@;", "warps - 1"),
    "fusion: half of a warp's sums": (FUSION, "d = plan.lanes; d < @32@;", "16"),
    "fusion: the last chunk": (FUSION, "chunk < @plan.chunks@;", "plan.chunks - 1"),
    "fusion: ends that fill no vector": (FUSION, f"if (kBackward) {STAY}", ""),
    "fusion: the row before": (FUSION, "p = memory.row[++row];", "++row;"),
    "fusion: rows beyond the last": (FUSION, "@left < plan.rows_per_block@ ? int(left)", "false"),
    "fusion: channels beyond the last": (FUSION, "if (channel >= plan.channels) return;", ""),
}  # fmt: skip

PASSES = "map_sweep.cuh"
TABLES = "norm_table.cuh"
MOMENTS = "batch_norm_statistics.cuh"
KEPT = "keep(sums);\n    @sync_block();@\n"
MERGED = "  sums_of_rows.merge(block, vectors.first);\n"
FIRST = "first_sums.merge(block, vectors.first);\n"
MEANS = "first_sums.total(row, 0) / acc(block.length);\n"
SLAB_MEANS = "first_sums.total(0, i) / acc(block.pixels);\n"
MUTATIONS |= {
    "sweep: no barrier after coefficients": (PASSES, f"@{BARRIER}@\n  COTNET_UNROLL\n", ""),
    "sweep: no barrier before rows": (PASSES, f"  @{BARRIER}@  {MERGED}", ""),
    "sweep: no barrier before teams merge": (PASSES, f"{MERGED}  @{BARRIER}@", ""),
    "sweep: no barrier after a slab's": (PASSES, f"@{BARRIER}@  acc coeff", ""),
    "sweep: no barrier before warps merge": (PASSES, KEPT, ""),
    "sweep: elements of nobody": (PASSES, "if (!slot.has(i)) continue;", ""),
    "sweep: pixels beyond the last": (PASSES, "if (!slots[b].has(e)) continue;", ""),
    "sweep: the row before": (PASSES, "enter(++row);", "enter(row), ++row;"),
    "sweep: another piece of a vector": (PASSES, "v == first ? piece : 0", "0"),
    "table: no barrier before warps add up": (TABLES, BARRIER, ""),
    "statistics: no barrier before rows": (MOMENTS, f"@{BARRIER}@  {FIRST}", ""),
    "statistics: no barrier before teams merge": (MOMENTS, f"{FIRST}@{BARRIER}@", ""),
    "statistics: no barrier after means": (MOMENTS, f"{MEANS}@{BARRIER}@", ""),
    "statistics: no barrier after a slab's": (MOMENTS, f"{SLAB_MEANS}@{BARRIER}@", ""),
    "statistics: pixels beyond the last": (MOMENTS, "@slots[b].has(e)@ ? widen(packs[b].at[e])",
                                           "true"),
}  # fmt: skip

POOL = "group_norm_aggregation_pool.cuh"
OF_POOL = POOL.removesuffix(".cuh")
MUTATIONS |= {
    "pool: shifts of the first plane": (TILE, "@of_plane@ + j * p.weight", "0", OF_POOL),
    "pool: a shift of all sharers": (DIRECT, "tail.of(@channel + j * p.weight_channels@)",
                                     "channel", OF_POOL),
    "pool: a shift of four channels": (IMAGE, "tail.of(@channel + i@)", "channel", OF_POOL),
    "pool: a shift of all channels": (ANY, "tail.of(@channel + c * p.weight_channels@)",
                                      "channel", OF_POOL),
    "pool: the first map alone": (POOL, "i < @kMaps@", "1"),
    "pool: sums for means": (POOL, "1 / double(p.out_plane())", "1.0"),
    "pool: nothing but the sum": ("tails.cuh", "return @silu(sum + shift)@;", "sum", OF_POOL),
    "pool: no barrier before a total": (IMAGE, f"@{BARRIER}@    for (int number", "", OF_POOL),
    "pool: all planes in one place": (TILE, "channel + @of_plane@, sum", "0", OF_POOL),
    "pool: all strips in one place": (TILE, "write(@at.first_row / tile.rows@", "0", OF_POOL),
    "pool: threads beyond the last": (DIRECT, "@busy && !second@ ?", "!second", OF_POOL),
    "pool: the next plane's sums": (DIRECT, "@busy && !second@ ?", "busy", OF_POOL),
    "pool: warps that a plane lacks": (DIRECT, "i < @direct.parts@; ++i", "0", OF_POOL),
}  # fmt: skip

MUTATIONS = {name: Mutation(*mutation) for name, mutation in MUTATIONS.items()}
NUMBERS = {name: number for number, name in enumerate(MUTATIONS)}
ORIGINALS = {f"nothing changed in {op}": op for op in CHECKS}

# What compiles once for all modules, as it is most of the work: the headers of other projects.
HEADERS = """
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <functional>
#include <map>
#include <sstream>
"""
EMULATOR = ROOT / "tests" / "cuda_emulator"
KERNELS = ROOT / "csrc" / "cuda"


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
    (folder / "headers.h").write_text(HEADERS + PRELUDE)
    compile_cpp("-x", "c++-header", folder / "headers.h", "-o", folder / "headers.h.gch")
    sources = [f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", EMULATOR / "module.cpp"]
    compile_cpp("-include", folder / "headers.h", "-c", *sources, "-o", folder / "module.o")
    return folder


def op_of(mutation: Mutation) -> str:
    """The op whose kernels a mutation of a file of csrc/cuda is tested with."""
    if mutation.op is not None:
        return mutation.op
    if mutation.file in (PASSES, TABLES):
        return "batch_norm_fusion"
    return next((op for op in CHECKS if mutation.file.startswith(op)), "local_aggregation")


def build(folder: Path, prepared: Path, op: str, mutations: dict[int, Mutation]) -> Path:
    """The module of one op alone, from a copy of the kernels with these mutations in it."""
    shutil.copytree(KERNELS, folder / "cuda")
    plant(mutations, folder / "cuda")
    sources = [f"-I{folder}", f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]
    sources += [EMULATOR / f"{op}.cpp", prepared / "module.o"]
    library = folder / f"{TARGET}{sysconfig.get_config_var('EXT_SUFFIX')}"
    compile_cpp("-include", prepared / "headers.h", "-shared", *sources, "-o", library)
    return folder


class Server:
    """A process of mutation_checks.py."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "mutation_checks.py"],
            env=environment(folder) | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def check(self, op: str, mutant: int, folder: Path) -> tuple[int, str]:
        """Exit status and output of the checks of an op with a mutant of the module in a folder."""
        self.process.stdin.write(f"{op} {mutant} {folder}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), (folder / f"log{mutant}").read_text(
            errors="replace"
        )


class Outcomes:
    """What becomes of each mutation that is asked for, worked out on all cores."""

    def __init__(self, asked: list[str], prepared: Path) -> None:
        workers = len(os.sched_getaffinity(0))
        self.servers = [Server(prepared) for _ in range(workers)]
        self.pool = ThreadPoolExecutor(workers)
        self.idle = queue.SimpleQueue()
        for server in self.servers:
            self.idle.put(server)
        # Modules before checks: a check that waits for its module must not keep it from a thread.
        self.modules: dict[str, list[Future]] = {op: [] for op in CHECKS}
        of_mutant: dict[int, Future] = {}
        for op in CHECKS:
            numbered = {NUMBERS[name]: MUTATIONS[name] for name in asked if name in MUTATIONS}
            of_op = {n: mutation for n, mutation in numbered.items() if op_of(mutation) == op}
            for i, group in enumerate(apart(of_op, KERNELS) or [{}]):
                folder = prepared / f"{op}{i}"
                module = self.pool.submit(build, folder, prepared, op, group)
                self.modules[op].append(module)
                of_mutant |= dict.fromkeys(group, module)
        self.found = {}
        for name in asked:
            mutant = NUMBERS.get(name, -1)
            op = ORIGINALS.get(name) or op_of(MUTATIONS[name])
            modules = self.modules[op] if mutant < 0 else [of_mutant[mutant]]
            self.found[name] = [self.pool.submit(self._check, op, mutant, m) for m in modules]

    def _check(self, op: str, mutant: int, module: Future) -> tuple[int, str]:
        folder = module.result()
        server = self.idle.get()
        try:
            return server.check(op, mutant, folder)
        finally:
            self.idle.put(server)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        for server in self.servers:
            server.process.communicate()


@pytest.fixture(scope="module")
def outcomes(request, prepared) -> Iterator[dict[str, list[Future]]]:
    """Exit status and output of the checks, with each module that has the mutation."""
    items = [i for i in request.session.items if i.originalname == "test_mutations_are_caught"]
    outcomes = Outcomes([item.callspec.params["mutation"] for item in items], prepared)
    yield outcomes.found
    outcomes.close()


@pytest.mark.parametrize("mutation", [*ORIGINALS, *MUTATIONS])
def test_mutations_are_caught(outcomes, mutation):
    for status, log in (outcome.result() for outcome in outcomes[mutation]):
        if mutation in ORIGINALS:
            assert status == 0, log[-3000:]
            continue
        reasons = ("AssertionError", "Error: ", "AddressSanitizer")
        assert status and any(reason in log for reason in reasons), (status, log[-3000:])
