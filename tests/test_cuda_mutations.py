"""Real kernels with classic mistakes: each must fail the tests, or the tests do not look at it.

A mutation is a change of text in a copy of csrc/cuda, compiled for float32 only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from cpp_build import ROOT, run
from emulated_maps import MODULE_FOLDER, TARGET
from test_sanitizers import environment

TILE = "aggregation_tile.cuh"
GRADIENT = "aggregation_tile_grad_weight.cuh"
COPIES = "aggregation_tile_copies.cuh"
DIRECT = "aggregation_direct.cuh"
LARGE = "aggregation_tile_large.cuh"
PLACE = "aggregation_tile_place.cuh"
IMAGE = "aggregation_image.cuh"
BOTH = "aggregation_image_backward.cuh"
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
    "no barrier before a row leaves": (BOTH, f"{BARRIER}        COTNET_U", "        COTNET_U"),
}  # fmt: skip

# Two planes in the last block where others have more, strips, channels in two turns, bulk copies of
# these, maps without tiles, and channels_last ones.
CHECK = """
import sys
import torch
from emulated_aggregations import check_schedules
from emulated_maps import GPUS, load_kernels
from oracle import LOCAL
from test_cuda_aggregation_large import WINDOWS
from test_cuda_aggregations import TILES, tiled

def schedules():
    for name in ("forward", "backward", "random"):
        load_kernels().set_schedule(name)
        yield name

names = ("tile_7x7", "tile_31x41", "tile_14x14", "large_9x11_k5", "direct_30x40", "image_19x37")
direct, image = tiled("direct_30x40", 1, 2, 8, 30, 40), tiled("image_19x37", 1, 12, 2, 19, 37)
for case in (*TILES, *WINDOWS, direct, image):
    if case.name in names:
        for gpu in ("H200", "small"):
            for asked in LOCAL.arguments:
                check_schedules(
                    load_kernels(), schedules, LOCAL, case, torch.float32, case is image,
                    gpu=GPUS[gpu], asked={asked}.__contains__,
                )
print("passed")
"""


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
        "-fsanitize=address", "-fno-omit-frame-pointer", "-DCOTNET_EMULATED",
        "-DCOTNET_FLOAT32_ONLY", *includes, *arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "headers.h").write_text(HEADERS)
    compile_cpp("-x", "c++-header", folder / "headers.h", "-o", folder / "headers.h.gch")
    sources = [f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", EMULATOR / "module.cpp"]
    compile_cpp("-include", folder / "headers.h", "-c", *sources, "-o", folder / "module.o")
    return folder


def build(folder: Path, prepared: Path, name: str, old: str, new: str) -> None:
    """The module of local_aggregation alone, from a copy of the kernels with one change."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc" / "cuda", folder / "cuda")
    text = (folder / "cuda" / name).read_text()
    assert not old or old in text, f"{name} has changed: the mutation finds nothing"
    (folder / "cuda" / name).write_text(text.replace(old, new, 1) if old else text)
    sources = [f"-I{folder}", f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]
    sources += [EMULATOR / "local_aggregation.cpp", prepared / "module.o"]
    library = folder / f"{TARGET}{sysconfig.get_config_var('EXT_SUFFIX')}"
    compile_cpp("-include", prepared / "headers.h", "-shared", *sources, "-o", library)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(tmp_path, prepared, mutation):
    build(tmp_path / "mutant", prepared, *MUTATIONS[mutation])
    env = environment(tmp_path) | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        MODULE_FOLDER: str(tmp_path / "mutant"),
    }
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        cwd=ROOT / "tests", env=env, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    passed = done.returncode == 0 and "passed" in done.stdout
    reasons = ("AssertionError", "Error: ", "AddressSanitizer")
    assert passed or any(reason in done.stderr for reason in reasons), done.stderr[-3000:]
    assert passed == (mutation == "nothing changed"), done.stdout[-2000:] + done.stderr[-3000:]
