"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and memory lost per call.

The library is compiled with both sanitizers (and with every warning an error), then the tests of
the functions run again in a Python process that has the sanitizers loaded.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpp_build import ROOT, cmake_build, run

import cotnet_ext

# Every kernel in every dtype and layout, on odd and empty maps and strided arguments; and direct
# calls with arguments that make no sense.
FILES = (
    "test_local_aggregation.py",
    "test_softmax_aggregation.py",
    "test_group_norm_aggregation.py",
    "test_spatial_softmax_gate.py",
    "test_context_fusion.py",
    "test_batch_norm.py",
    "test_errors.py",
)
SELECTION = (
    "values_and_gradients or incoming or expanded or empty or raw_operators_refuse_what or defined"
)
# Far fewer than there are: a run that lost most of them must not pass.
AT_LEAST = 1000


@pytest.fixture(scope="module")
def sanitized() -> Path:
    return cmake_build("sanitize", COTNET_EXT_SANITIZE="address,undefined")


def environment(folder: Path) -> dict[str, str]:
    """Loads the sanitizers into Python, which was built without them, and our library with it."""
    # libstdc++ too: AddressSanitizer looks for its functions before torch brings it.
    compiler = os.environ.get("CXX", "c++")
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    libraries = [run(compiler, f"-print-file-name={name}").strip() for name in names]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        # Python and torch keep memory until the process ends: that is not what is looked for.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": str(folder / "python"),
    }


def run_sanitized(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # Not in the repository's folder, where Python would find the installed library first.
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=environment(folder), capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_unit_tests_in_cpp(sanitized):
    output = run("ctest", "--test-dir", sanitized, "--output-on-failure", "--no-tests=error")
    assert "100% tests passed" in output


def test_kernels(sanitized):
    where = run_sanitized(sanitized, "-c", "import cotnet_ext; print(cotnet_ext._C.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(sanitized), where.stderr

    files = [ROOT / "tests" / name for name in FILES]
    # Capture in Python only: what a sanitizer says before it ends the process must get out.
    options = ["-q", "-x", "-k", SELECTION, "--capture=sys", "-p", "no:cacheprovider"]
    options += ["-c", ROOT / "pyproject.toml"]
    done = run_sanitized(sanitized, "-m", "pytest", *options, *files)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[:8000]}"
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= AT_LEAST


@pytest.mark.parametrize(
    ("mistake", "report"),
    [
        ("broken.read_past_end(ctypes.c_void_p(x.data_ptr()), x.numel())", "heap-buffer-overflow"),
        ("broken.read_after_delete()", "heap-use-after-free"),
        ("broken.overflow_index(2)", "signed integer overflow"),
    ],
)
def test_mistakes_are_seen(sanitized, mistake, report):
    library = next((sanitized / "tests" / "cpp").glob("*broken.so"))
    code = f"""
import ctypes, torch
x = torch.ones(33)
broken = ctypes.CDLL({str(library)!r})
{mistake}
print("alive")"""
    done = run_sanitized(sanitized, "-c", code)
    assert done.returncode != 0 and "alive" not in done.stdout
    assert report in done.stderr


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_calls_leave_no_memory_behind():
    """Each call converts its arguments; what that allocates must be freed."""
    x, w = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1, 1)
    calls = 50_000

    def call_many():
        for _ in range(calls):
            cotnet_ext.local_aggregation(x, w, 1)

    with torch.no_grad():
        call_many()
        before = resident_bytes()
        call_many()
    # The smallest block that malloc hands out is 32 bytes.
    assert resident_bytes() - before < 16 * calls
