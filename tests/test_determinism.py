"""The same bits on every run and for any number of threads; right values at every vector width."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import CASES, dtype_id, each
from layouts import FORMATS, LAYOUTS
from oracle import EACH_FUNCTION, evaluate, expected
from tolerances import DTYPES, assert_same_bits

import cotnet_ext
from cotnet_ext import functional

# Many slices, few large slices, one slice only, and reductions over batch and map.
SOME = tuple(
    CASES[name]
    for name in (
        "stage1_64x56x56",
        "stage4_512x7x7",
        "one_slice_40x33",
        "batch_33",
        "long_3x257_k5",
        "heads2_k5_stride2",
        "san_k7_32x14x14",
    )
)


def _results(function, case, dtype, layout, device) -> dict[str, torch.Tensor]:
    known = expected(function, case, dtype)
    tensors = {name: LAYOUTS[layout](t.to(device)) for name, t in known.tensors.items()}
    return evaluate(function, functional, tensors, LAYOUTS[layout](known.grad.to(device)), case)


def _assert_same(left, right, what: str) -> None:
    for name in left:
        assert_same_bits(left[name], right[name], f"{what} {name}")


@EACH_FUNCTION
@each(SOME)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_runs_repeat_bit_by_bit(function, case, dtype, layout, device):
    first = _results(function, case, dtype, layout, device)
    for attempt in range(3):
        # Other addresses and other leftovers in memory.
        filler = [torch.full((1 + 977 * attempt,), float(attempt)) for _ in range(5)]
        _assert_same(_results(function, case, dtype, layout, device), first, str(function))
        del filler


@EACH_FUNCTION
@each(SOME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@FORMATS
def test_the_number_of_threads_changes_no_bit(function, case, dtype, layout):
    device = torch.device("cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _results(function, case, dtype, layout, device)
        for threads in (2, 3, 4):
            torch.set_num_threads(threads)
            _assert_same(
                _results(function, case, dtype, layout, device),
                alone,
                f"{function} {threads} threads",
            )
    finally:
        torch.set_num_threads(before)


@EACH_FUNCTION
@FORMATS
def test_calls_from_several_python_threads(function, layout, device):
    """Calls at the same time share nothing that one could spoil for another."""
    cases = [CASES[name] for name in ("stage4_512x7x7", "odd_9x11", "heads2_k5_stride2", "k7")]

    def work(case):
        return [_results(function, case, torch.float32, layout, device) for _ in range(5)]

    alone = [work(case)[0] for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        for case, first, together in zip(cases, alone, pool.map(work, cases), strict=True):
            for result in together:
                _assert_same(result, first, f"{function} {case.name}")


@EACH_FUNCTION
@FORMATS
def test_deterministic_mode_is_satisfied(function, layout, device):
    """`use_deterministic_algorithms` finds nothing to forbid."""
    torch.use_deterministic_algorithms(True)
    try:
        _results(function, CASES["odd_9x11"], torch.float32, layout, device)
    finally:
        torch.use_deterministic_algorithms(False)


WIDTHS = ("default", "avx2", "avx512")
NAMES = dict(zip(WIDTHS, ("DEFAULT", "AVX2", "AVX512"), strict=True))


def _widest() -> str:
    """The capability of this processor, whatever the environment says."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    return _python(["-c", code], {}).stdout.strip()


def _python(args: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    package = str(Path(cotnet_ext.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, *args],
        env=inherited | {"PYTHONPATH": package} | environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_values_at_every_vector_width(width):
    """Values with ATEN_CPU_CAPABILITY lowered, which our kernels honour as PyTorch's do."""
    order = list(NAMES.values())
    if _widest() not in order or order.index(_widest()) < WIDTHS.index(width):
        pytest.skip(f"this processor has no {width}")
    environment = {"ATEN_CPU_CAPABILITY": width}
    code = "import cotnet_ext; print(cotnet_ext.build_info()['cpu_capability'])"
    assert _python(["-c", code], environment).stdout.strip() == NAMES[width]
    if NAMES[width] == cotnet_ext.build_info()["cpu_capability"]:
        return  # this is what all other tests run at
    done = _python(["value_sweep.py"], environment)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert "checks passed" in done.stdout
