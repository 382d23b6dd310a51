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
WAIT = "  cp_async_wait<0>();\n"
BARRIER = "  sync_block();\n"
MUTATIONS = {
    "nothing changed": (TILE, "", ""),
    "no barrier after the copies": (TILE, WAIT + BARRIER, WAIT),
    "no wait for the copies": (TILE, WAIT, ""),
    "no barrier before y replaces x": (TILE, f"{BARRIER}\n  // y takes", "\n  // y takes"),
    "no barrier before y leaves": (TILE, f"  }}\n{BARRIER}  for (int j", "  }\n  for (int j"),
    "a column before the map": (TILE, "first_column ? acc(0) : widen(from[-1])", "widen(from[-1])"),
    "a row outside of the map": (TILE, "if (source < 0 || source >= height) continue;", ""),
    "a weight from outside of the map": (TILE, "last_column ? acc(0) : w[t]", "w[t]"),
    "a run too long": (TILE, "body(0, 9 * planes *", "body(0, 9 * tile.planes *"),
    "channels overwritten too early": (GRADIENT, "if (chunk > 0) sync_block();", ""),
    "no barrier before grad_w leaves": (GRADIENT, f"{BARRIER}  at.store", "  at.store"),
}  # fmt: skip

# Two planes in the last block where others have more, strips, and channels in two turns.
CHECK = """
import sys
import torch
from emulated_aggregations import check_schedules
from emulated_maps import GPUS, load_kernels
from oracle import LOCAL
from test_cuda_aggregations import TILES

def schedules():
    for name in ("forward", "backward", "random"):
        load_kernels().set_schedule(name)
        yield name

for case in TILES:
    if case.name in ("tile_7x7", "tile_31x41", "tile_14x14"):
        for gpu in ("H200", "small"):
            check_schedules(
                load_kernels(), schedules, LOCAL, case, torch.float32, False, gpu=GPUS[gpu]
            )
print("passed")
"""


def build(folder: Path, name: str, old: str, new: str) -> None:
    """The module of local_aggregation alone, from a copy of the kernels with one change."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc" / "cuda", folder / "cuda")
    text = (folder / "cuda" / name).read_text()
    assert not old or old in text, f"{name} has changed: the mutation finds nothing"
    (folder / "cuda" / name).write_text(text.replace(old, new, 1) if old else text)
    emulator = ROOT / "tests" / "cuda_emulator"
    includes = run(sys.executable, "-m", "pybind11", "--includes").split()
    run(
        os.environ.get("CXX", "c++"), "-std=c++17", "-Og", "-g1", "-shared", "-fPIC",
        "-fvisibility=hidden", "-fsanitize=address", "-fno-omit-frame-pointer",
        "-DCOTNET_EMULATED", "-DCOTNET_FLOAT32_ONLY", f"-I{folder}", f"-I{emulator}",
        f"-I{ROOT / 'csrc'}", *includes, emulator / "module.cpp",
        emulator / "local_aggregation.cpp",
        "-o", folder / f"{TARGET}{sysconfig.get_config_var('EXT_SUFFIX')}",
    )  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(tmp_path, mutation):
    build(tmp_path / "mutant", *MUTATIONS[mutation])
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
