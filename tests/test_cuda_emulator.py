"""The emulator that the CUDA kernels are tested with must catch the mistakes that it is there for,
and the kernels must pass with AddressSanitizer and UndefinedBehaviorSanitizer watching."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cpp_build import ROOT, cmake_build
from emulated_maps import MODULE_FOLDER, TARGET, emulated_kernels
from test_sanitizers import environment

kernels = emulated_kernels
SCHEDULES = ("forward", "backward", "random")
SIZE = 96 * 3  # three blocks

# What each fault of tests/cuda_emulator/faults.cpp ends in: words of the error, or WRONG numbers.
WRONG = "wrong"
FAULTS = {
    ("async tile", 1): (WRONG, "a part of the tile is never copied"),
    ("async tile", 3): ("never waited for", "no wait for the copies"),
    ("tile", 5): ("sync_block", "threads end before a barrier"),
    ("tile", 6): (WRONG, "no barrier before others read the tile"),
    ("tile", 7): ("threads of one block wait", "threads wait at different barriers"),
    ("tile", 8): (WRONG, "the tile is overwritten while others read it"),
    ("async tile", 6): (WRONG, "a wait, but no barrier"),
    ("sum", 10): (WRONG, "no barrier before the sums of other warps are read"),
    ("sum", 11): ("different masks", "lanes of a warp with different masks"),
    ("sum", 12): ("which has ended", "a mask that names a lane that ended"),
    ("sum", 13): ("not in its own mask", "a lane outside of its mask"),
    ("sum", 14): (WRONG, "a shuffle from a lane that takes no part"),
    ("bulk", 20): ("before mbarrier_init", "no mbarrier_init"),
    ("bulk", 21): ("deadlock", "an arrival is missing"),
    ("bulk", 22): ("off by 16 bytes", "more bytes expected than copied"),
    ("bulk", 23): ("not a multiple", "an address that is not aligned"),
    ("bulk", 24): (WRONG, "no wait for the bulk load"),
    ("bulk", 25): ("fence_proxy_async", "no fence before the bulk store"),
    ("bulk", 26): ("fence_proxy_async", "no barrier before the bulk store"),
    ("bulk", 27): ("ends before its bulk stores", "no wait for the bulk store"),
}
# What only a sanitizer sees.
OUT_OF_BOUNDS = {
    ("async tile", 2): "copies from beyond the map",
    ("tile", 4): "writes past the end of shared memory",
    ("tile", 9): "writes past the end of the map",
    ("sum", 15): "reads past the end of a shared array",
}


def run_kernel(kernels, kernel: str, fault: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(7).standard_normal(SIZE).astype(np.float32)
    exact = x.astype(np.float64)
    padded = np.pad(exact, 1)
    truth = {
        "sum": exact.reshape(-1, 96).sum(1),
        "bulk": 2 * exact,
    }.get(kernel, padded[:-2] + padded[1:-1] + padded[2:])
    y = np.full(truth.shape, np.nan, np.float32)
    kernels.run_faulty(kernel, x, y, SIZE, fault)
    return y, truth


@pytest.mark.parametrize("kernel", ["tile", "async tile", "sum", "bulk"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_kernels_without_a_fault_are_right(kernels, kernel, schedule):
    kernels.set_schedule(schedule)
    y, truth = run_kernel(kernels, kernel, 0)
    assert np.allclose(y, truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "fault"), FAULTS, ids=[f"{k[0]}: {v[1]}" for k, v in FAULTS.items()]
)
def test_faults_are_caught(kernels, kernel, fault):
    expected, _ = FAULTS[kernel, fault]
    caught = []
    for schedule in SCHEDULES:
        kernels.set_schedule(schedule)
        try:
            y, truth = run_kernel(kernels, kernel, fault)
            caught.append(not np.allclose(y, truth, rtol=0, atol=1e-4) and expected == WRONG)
        except kernels.Error as error:
            caught.append(re.search(expected, str(error)) is not None)
    # A race may go well in one order of threads; everything else is caught in all.
    assert any(caught) if expected == WRONG else all(caught)
    kernels.set_schedule("forward")
    test_kernels_without_a_fault_are_right(kernels, kernel, "forward")  # nothing is left behind


def test_launches_that_no_gpu_allows_are_errors(kernels):
    x = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="wrong size"):
        kernels.run_faulty("tile", x.astype(np.float64), x, 96, 0)


@pytest.fixture(scope="module")
def sanitized() -> Path:
    return cmake_build("sanitize", TARGET, COTNET_EXT_SANITIZE="address,undefined")


def run_sanitized(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # The package itself is the installed one: only the emulated kernels are watched.
    env = environment(folder)
    env |= {"PYTHONPATH": str(ROOT), MODULE_FOLDER: str(folder / "python")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT / "tests", env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "fault"), OUT_OF_BOUNDS, ids=[f"{k[0]}: {v}" for k, v in OUT_OF_BOUNDS.items()]
)
def test_accesses_out_of_bounds_are_caught(sanitized, kernel, fault):
    code = f"""
from emulated_maps import load_kernels
from test_cuda_emulator import run_kernel
run_kernel(load_kernels(), {kernel!r}, {fault})
print("alive")"""
    done = run_sanitized(sanitized, "-c", code)
    assert done.returncode != 0 and "alive" not in done.stdout
    assert re.search("heap-buffer-overflow|out of bounds", done.stderr), done.stderr[-2000:]


# Every kernel on maps whose rows and planes are no multiple of anything, several of them under all
# orders of threads, and at odd addresses: a cross-section, as all of it takes many minutes.
SELECTION = (
    "odd_ or tile_7x7 or tile_31x41 or large_5x4 or direct_30x40 or narrow or empty"
    " or both_7x7 or both_31x41 or (schedules_give or misaligned) and batch_norm"
)
FILES = (
    "aggregations",
    "aggregation_backward",
    "aggregation_direct",
    "aggregation_large",
    "spatial_softmax_gate",
    "context_fusion",
    "group_norm_aggregation_pool",
    "batch_norm",
)
AT_LEAST = 150


def test_kernels_under_sanitizers(sanitized):
    files = [ROOT / "tests" / f"test_cuda_{name}.py" for name in FILES]
    options = ["-q", "-x", "-k", SELECTION, "--capture=sys", "-p", "no:cacheprovider"]
    options += ["-c", ROOT / "pyproject.toml"]
    done = run_sanitized(sanitized, "-m", "pytest", *options, *files)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[:8000]}"
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= AT_LEAST
