"""The kernel of both gradients with classic mistakes: each must fail the checks below.

All mistakes are compiled into one module, beside what they replace; a variable of the environment
says which of them is made.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from cpp_build import ROOT, run
from emulated_aggregations import AGGREGATIONS, check_schedules
from emulated_maps import GPUS, MODULE_FOLDER, TARGET, load_kernels
from test_cuda_aggregation_backward import NAMES
from test_cuda_aggregation_backward import test_nonfinite_values_reach_only_their_window as hostile
from test_cuda_aggregation_large import SHARED, large

BOTH = "aggregation_tile_backward.cuh"
LARGE = "aggregation_tile_grad_weight_large.cuh"
CHOICE = "COTNET_MISTAKE"
Schedules = Callable[[], Iterator[str]]
BARRIER = "sync_block();"
SIDES = "first_row, last_row, first_column, last_column"
# By the file: a statement that is left out, with what stands before and behind it.
MISSING = {BOTH: {
    "no barrier after the place of the block": ("= 0;\n  ", BARRIER, "\n  TileCopies"),
    "no zeros": ("", "if (thread < 12) reinterpret_cast<uint32_t*>(memory)[4 + thread] = 0;", ""),
    "grad_x replaces x too early": ("", BARRIER, "  // nobody reads x any more"),
    "the next channels replace grad_x": ("", "sync_warp();", ""),
    "no barrier after the normalisers": ("prepare(view);\n      ", BARRIER, ""),
    "no barrier before grad_x leaves": ("", "maps.ready_to_store();", ""),
    "sums of what is outside": ("", f"drop_outside({SIDES}, d);", ""),
    "no wait for the stores": ("", "maps.finish();", "\n  if constexpr"),
    "sums replace grad_x": ("", BARRIER, "  // grad_x has left"),
    "grad_w replaces the weights too early": ("", BARRIER, "  // nobody reads the weights"),
    "no barrier before grad_w leaves": ("", "weights.ready_to_store();", ""),
    "no wait for the last stores": ("", "weights.finish();", ""),
    "no barrier before the sums": ("items);\n    ", BARRIER, "\n    const int64_t unit"),
    "no barrier before the means": ("(kWholeMaps) {\n      ", BARRIER, ""),
    "no barrier after the means": ("at[1];\n      }\n      ", BARRIER, ""),
}, LARGE: {
    "taps of a row outside of the map": ("", "if (!row_inside) return;", ""),
    "no barrier before sums of a row": ("items);\n      }\n      ", BARRIER, ""),
    "a column summed twice": ("", "if (i < stale) continue;", "\n      sum += d"),
    "nothing seen of the window": ("", "rows.look(w, d);", ""),
    "no barrier before a large grad_w leaves": ("", "copies.ready_to_store();", ""),
    "no wait for stores of a large grad_w": ("", "copies.finish();", ""),
}}  # fmt: skip
# An expression, and what takes its place.
WRONG = {BOTH: {
    "a column before the map": ("first_column ? acc_t<scalar_t>(0) : values[0]", "values[0]"),
    "a column behind the map": (
        "last_column ? acc_t<scalar_t>(0) : values[kTileColumns + 1]", "values[kTileColumns + 1]",
    ),
    "a weight from outside": ("outside || beside ? acc(0) : taps[v][i]", "taps[v][i]"),
    "a row below the map": ("last_row ? zeros : own + width", "own + width"),
    "a column counted twice": ("i < stale ? acc(0) : d[t][i]", "d[t][i]"),
}, LARGE: {
    "a tap beside the map": ("from >= 0 && from < width ? d[v][i] : acc(0)", "d[v][i]"),
    "a column stored twice": ("i >= stale", "true"),
}}  # fmt: skip
MISTAKES = ("none", *(name for file in MISSING for name in (*MISSING[file], *WRONG[file])))
START = "    const bool aligned = alignment_of(raw)"
INCLUDE = '#include "mistake.h"\n'
ONE = "#pragma once\n#include <cstdlib>\nnamespace cotnet { inline int mistake = 0; }\n"


def with_all(file: str, text: str) -> str:
    """The kernel with all mistakes in it."""
    for name, (before, old, behind) in MISSING[file].items():
        assert before + old + behind in text, f"{file} has changed: nothing to leave out, {name}"
        choice = f"{before}if (mistake != {MISTAKES.index(name)}) {{ {old} }}{behind}"
        text = text.replace(before + old + behind, choice, 1)
    for name, (old, new) in WRONG[file].items():
        assert old in text, f"{file} has changed: nothing to replace, {name}"
        text = text.replace(old, f"(mistake == {MISTAKES.index(name)} ? ({new}) : ({old}))", 1)
    text = text.replace("namespace cotnet {\n", f"{INCLUDE}namespace cotnet {{\n", 1)
    return text.replace(START, f'    mistake = std::atoi(std::getenv("{CHOICE}"));\n{START}', 1)


def check_both(kernels: ModuleType, schedules: Schedules) -> None:
    """Strips of odd width, several planes, channels by turns in bulk copies, hostile values."""
    for name in ("7x7", "14x14", "31x41"):
        for gpu in (GPUS["H200"], GPUS["small"]):
            for function in AGGREGATIONS:
                case = NAMES[name]
                check_schedules(kernels, schedules, function, case, torch.float32, False, gpu=gpu)
    for where in ("weight", "grad"):
        hostile(kernels, NAMES["31x41"], GPUS["small"], torch.inf, where)


def check_large(kernels: ModuleType, schedules: Schedules) -> None:
    """Several planes in bulk copies, and strips, both of a width that four does not divide."""
    planes = large("planes_8x6_k5", 5, 1, 4, 2, 8, 6)
    for case, gpu in ((planes, GPUS["H200"]), (SHARED[2], GPUS["small"])):
        for function in AGGREGATIONS:
            check_schedules(kernels, schedules, function, case, torch.float32, False, gpu=gpu)


CHECKS = {BOTH: check_both, LARGE: check_large}


def report(kernels: ModuleType) -> dict[str, bool]:
    """Whether the checks fail, for each mistake."""

    def schedules() -> Iterator[str]:
        for name in ("forward", "backward", "random"):
            kernels.set_schedule(name)
            yield name

    seen = {}
    for number, mistake in enumerate(MISTAKES):
        os.environ[CHOICE] = str(number)
        try:
            for file, check in CHECKS.items():
                if mistake in ("none", *MISSING[file], *WRONG[file]):
                    check(kernels, schedules)
            seen[mistake] = False
        except (AssertionError, kernels.Error):
            seen[mistake] = True
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, bool]:
    """The report of a process of its own, as a process has only one module of this name."""
    folder = tmp_path_factory.mktemp("mistaken")
    shutil.copytree(ROOT / "csrc" / "cuda", folder / "cuda")
    (folder / "cuda" / "mistake.h").write_text(ONE)
    for file in MISSING:
        path = folder / "cuda" / file
        path.write_text(with_all(file, path.read_text()))
    emulator = ROOT / "tests" / "cuda_emulator"
    run(
        os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-shared", "-fPIC",
        "-fvisibility=hidden", "-DCOTNET_EMULATED", "-DCOTNET_FLOAT32_ONLY",
        f"-I{folder}", f"-I{emulator}", f"-I{ROOT / 'csrc'}",
        *run(sys.executable, "-m", "pybind11", "--includes").split(),
        emulator / "module.cpp", *(emulator / f"{function}.cpp" for function in AGGREGATIONS),
        "-o", folder / f"{TARGET}{sysconfig.get_config_var('EXT_SUFFIX')}",
    )  # fmt: skip
    paths = os.pathsep.join(filter(None, sys.path))
    done = run(sys.executable, __file__, env={MODULE_FOLDER: str(folder), "PYTHONPATH": paths})
    return json.loads(done.splitlines()[-1])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(seen, mistake):
    assert seen[mistake] == (mistake != "none")


if __name__ == "__main__":
    print(json.dumps(report(load_kernels())))
