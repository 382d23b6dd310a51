"""The benchmarks on tiny shapes: they run, they check what they time, and they report."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib
import json
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import cotnet_ext
from benchmarks import (
    accuracy,
    bench_layer_parts,
    byte_model,
    clocks,
    environment,
    figures,
    memory,
    official,
    one_thread,
    report,
)
from benchmarks.__main__ import main, names
from benchmarks.comparison import Comparison, Contender, Options, dtype_name
from benchmarks.harness import Pool, measure
from benchmarks.inputs import Maps, MapsAndLogits, Window
from benchmarks.shapes import QUICK, Shape

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Shape(batch=2, channels=16, size=5)
FAST = Options(quick=True, compiled=False, budget_s=0.0, rotate_bytes=1 << 16, min_rounds=3)
FIELDS = {
    "run", "time", "command", "commit", "device", "threads", "cold", "versions", "comparison",
    "op", "pass", "provider", "rounds", "ms", "error",
}  # fmt: skip

NO_OPERATORS = {"inference", "layer_parts", "modules", "networks", "overhead"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of `python -m benchmarks --quick`, in a file with the report beside it."""
    path = tmp_path_factory.mktemp("benchmarks") / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@pytest.fixture
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def contender(function, provider: str = "other", dtype=torch.float32) -> Contender:
    return Contender(provider, function, twice, Maps(SHAPE, dtype), bytes=1 << 20)


def measured(
    function, direction: str = "forward", dtype=torch.float32, leeway: float = 1.0
) -> tuple[dict, dict]:
    """The rows of a right subject and of `function` beside it."""
    other = dataclasses.replace(contender(function, "other", dtype), leeway=leeway)
    contenders = [contender(twice, "right", dtype), other]
    right, other = measure(Comparison("twice", direction, SHAPE, contenders), FAST)
    return right, other


# ---- a whole run -------------------------------------------------------------------------------


def test_every_benchmark_leaves_rows(quick):
    ops = {row["op"] for row in report.read_rows(quick)}
    modules = {"CoTAttention", "CotLayer", "CoXtLayer"}
    overhead = {"import", "one call"}
    optimised = {f"optimised {name}" for name in modules}
    parts = {case.name for case in bench_layer_parts.CASES}
    operators = set(names()) - NO_OPERATORS
    assert ops == operators | parts | modules | optimised | overhead | {"cotnet50"}


def test_rows_are_complete_and_were_checked(quick):
    for row in report.read_rows(quick):
        assert row.keys() >= FIELDS
        assert row["error"] is None, row
        assert row["rounds"] >= 3
        assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
        if row["provider"] != "copy" and row["op"] != "import":
            assert row["accuracy"]["error"] <= row["accuracy"]["allowed"] < 0.1
        if row.get("bytes"):
            assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"]["p50"] / 1e6)


def test_the_first_row_of_a_comparison_is_the_subject(quick):
    firsts = {row["comparison"]: row for row in reversed(report.read_rows(quick))}.values()
    assert {row["provider"] for row in firsts} == {"cotnet_ext"}
    assert all(row["ratio"] == 1 for row in firsts if row["op"] != "import")


def test_the_report_shows_every_op_and_figure(quick):
    page = quick.with_suffix(".md").read_text()
    for row in report.read_rows(quick):
        assert f"### {row['op']}\n" in page
    for figure in figures.figures():
        assert f"| {figure.comparison} | {figure.claim} |" in page
    assert figures.REACHED in page or figures.MISSED in page  # import and one call are real
    assert figures.ABSENT in page  # the shapes of the others were not run
    assert quick.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_op_fails_the_run_and_shows_in_the_report(monkeypatch, tmp_path, threads_restored):
    right = cotnet_ext.context_fusion
    monkeypatch.setattr(cotnet_ext, "context_fusion", lambda *inputs: right(*inputs) * 1.001)
    path = tmp_path / "rows.jsonl"
    assert main(["--quick", "--no-compile", "--only", "context_fusion", "--out", str(path)]) == 1
    ours = [row for row in report.read_rows(path) if row["provider"] == "cotnet_ext"]
    assert all(row["ms"] is None for row in ours if row["dtype"] == "float32")
    assert "## Errors: not timed" in path.with_suffix(".md").read_text()


# ---- checks ------------------------------------------------------------------------------------


def test_a_wrong_result_is_an_error_and_is_not_timed():
    right, wrong = measured(lambda x: twice(x) + 1e-4)
    assert wrong["error"].startswith("wrong result")
    assert wrong["ms"] is None and wrong["ratio"] is None and wrong["gb_per_s"] is None
    assert right["error"] is None and right["ms"]["p50"] > 0


def test_a_peer_with_leeway_may_round_more_but_not_compute_something_else():
    def off_by(part):
        return lambda x: twice(x) * (1 + part)

    assert measured(off_by(1e-6))[1]["error"].startswith("wrong result")
    rough = measured(off_by(1e-6), leeway=10)[1]
    assert rough["error"] is None and rough["ms"]["p50"] > 0
    assert rough["accuracy"]["error"] > rough["accuracy"]["allowed"]
    assert measured(off_by(1e-4), leeway=10)[1]["error"].startswith("wrong result")


def test_one_wrong_element_is_seen():
    def wrong(x):
        y = twice(x)
        y[-1, -1, -1, -1] *= 1.01
        return y

    assert measured(wrong)[1]["error"].startswith("wrong result")


def test_a_wrong_gradient_is_an_error():
    def wrong(x):
        return (2 * x).detach() + x - x.detach()

    assert measured(wrong)[1]["error"] is None
    assert measured(wrong, "forward+backward")[1]["error"].startswith("wrong result")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: twice(x).double(),
        lambda x: twice(x)[:1],
        lambda x: twice(x) * float("nan"),
        lambda x: twice(x, "too many"),
    ],
    ids=["dtype", "shape", "nan", "exception"],
)
def test_whatever_goes_wrong_is_an_error(wrong):
    right, row = measured(wrong)
    assert row["error"] and row["ms"] is None
    assert right["ms"]


def test_a_low_precision_result_may_lose_what_the_reference_loses():
    right, other = measured(lambda x: x + x, dtype=torch.bfloat16)
    assert right["error"] is None and other["error"] is None


def test_the_gradients_of_a_network_are_judged_as_one():
    tensors = torch.ones(2), torch.zeros(3), torch.full((2, 2), 2.0)
    first, rest = accuracy.as_one(tensors)
    assert first is tensors[0] and rest.tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert accuracy.as_one(tensors[:1]) == tensors[:1]


# ---- what is measured --------------------------------------------------------------------------


def test_inputs_rotate():
    options = Options(rotate_bytes=10 * SHAPE.batch * SHAPE.channels * SHAPE.positions * 4)
    pool = Pool(Maps(SHAPE), "forward", options)
    turns = [pool.take()[0].data_ptr() for _ in range(20)]
    assert len(set(turns)) == 10 and turns[:10] == turns[10:]


def test_warm_inputs_stay():
    pool = Pool(Maps(SHAPE), "forward", Options(warm=True))
    assert pool.take()[0] is pool.take()[0]


@pytest.mark.parametrize("maker", [Maps, MapsAndLogits, Window])
def test_inputs_are_the_same_values_in_every_layout_and_dtype(maker):
    plain = maker(SHAPE)()
    for other in (maker(SHAPE, layout="channels_last")(), maker(SHAPE, torch.float64)()):
        for left, right in zip(plain, other, strict=True):
            assert torch.equal(left, right.float())


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_all_input_sets_have_the_layout(direction):
    pool = Pool(Window(SHAPE, layout="channels_last"), direction, FAST)
    strides = {tuple(t.stride() for t in inputs) for inputs in pool.sets}
    assert len(pool.sets) > 1 and len(strides) == 1
    image, weights = strides.pop()[:2]
    assert image[1] == 1 and weights[3] == 1  # channels, and taps, lie side by side


MAKERS = {
    "local_aggregation": Window(SHAPE),
    "softmax_aggregation": Window(SHAPE),
    "group_norm_aggregation": Window(SHAPE),
    "spatial_softmax_gate": Maps(SHAPE, count=3),
    "context_fusion": Maps(SHAPE, count=2),
}


@pytest.mark.parametrize("op", MAKERS)
def test_the_byte_model_counts_every_tensor_once(op):
    inputs = MAKERS[op]()
    output = inputs[0]
    forward = sum(t.nbytes for t in inputs) + output.nbytes
    assert byte_model.pass_bytes(op, "forward", SHAPE, torch.float32) == forward
    read = inputs[:2]  # the third input of the gate has no part in its gradients
    backward = output.nbytes + 2 * sum(t.nbytes for t in read)
    both = byte_model.pass_bytes(op, "forward+backward", SHAPE, torch.float32)
    assert both == forward + backward
    assert 2 * byte_model.pass_bytes(op, "forward", SHAPE, torch.bfloat16) == forward


def test_every_op_has_a_byte_model():
    assert set(MAKERS) == set(byte_model.FORWARD) == set(byte_model.BACKWARD)
    assert set(MAKERS) == set(names()) - NO_OPERATORS


def test_peak_memory_is_the_highest_sum_of_what_is_alive():
    def call():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(2 << 20, dtype=torch.uint8)
        del first
        return second, torch.empty(1 << 19, dtype=torch.uint8)

    assert memory.peak_extra_bytes(call, "cpu") == 3 << 20


SECOND_USE = """
import resource, torch
from benchmarks.isolation import keep_what_is_freed

torch.set_num_threads(1)
keep_what_is_freed()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones(1_000_000) for _ in range(12)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_what_was_freed_is_used_again_without_page_faults():
    """48 MB are 11719 pages; without it glibc often takes all of them back."""
    assert int(environment.child_python(SECOND_USE)) < 2000


# ---- figures and report ------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", [False, True])
def test_every_figure_names_a_row_that_a_full_run_writes(gpu, monkeypatch):
    def describe(comparison: Comparison, options: Options) -> list[dict]:
        return [
            {
                "comparison": comparison.name,
                "provider": c.provider,
                "dtype": dtype_name(c.make.dtype),
                "layout": c.make.layout,
                "error": "not run",
            }
            for c in comparison.contenders
        ]

    monkeypatch.setattr("benchmarks.bench_overhead.child_python", lambda code: "0.1")
    rows = []
    for name in names():
        module = importlib.import_module(f"benchmarks.bench_{name}")
        monkeypatch.setattr(module, "measure", describe)
        rows += module.rows(Options(device="meta", gpu=gpu, official=Path("checkout")))
    missing = [f for f in figures.figures(gpu) if f.judge(rows)[1] == figures.ABSENT]
    assert not missing


def figure_row(figure: figures.Figure, **values) -> dict:
    return {
        "comparison": figure.comparison,
        "provider": figure.provider,
        "dtype": figure.dtype,
        "layout": figure.layout,
        "error": None,
        **values,
    }


@pytest.mark.parametrize("share, verdict", [(0.81, figures.REACHED), (0.79, figures.MISSED)])
def test_a_figure_that_should_be_large(share, verdict):
    figure = figures.figures()[0]
    assert figure.judge([figure_row(figure, share_of_copy=share)]) == (share, verdict)


@pytest.mark.parametrize("ratio, verdict", [(1 / 1.4, figures.REACHED), (0.5, figures.MISSED)])
def test_a_figure_that_should_be_small(ratio, verdict):
    figure = next(f for f in figures.figures() if f.comparison.startswith("softmax_aggregation"))
    assert figure.judge([figure_row(figure, ratio=ratio)]) == (pytest.approx(1 / ratio), verdict)


def test_a_figure_without_a_measurement():
    figure = figures.figures()[0]
    assert figure.judge([]) == (None, figures.ABSENT)
    broken = figure_row(figure, share_of_copy=None, error="wrong result")
    assert figure.judge([broken]) == (None, figures.FAILED)


def test_the_report_shows_the_last_run_of_each_comparison_in_one_setting(tmp_path):
    def row(run: str, comparison: str, threads: int = 2) -> dict:
        return {"run": run, "comparison": comparison, "threads": threads}

    kept = [row("2", "b"), row("2", "c"), row("3", "a"), row("3", "a")]
    rows = [row("0", "d", threads=4), row("1", "a"), row("1", "b"), *kept]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert report.newest(report.read_rows(path)) == kept


def test_quick_shapes_are_quick():
    assert sum(s.batch * s.channels * s.positions for s in QUICK) < 1 << 14


# ---- what is compared on a GPU, as far as it runs without one ------------------------------------

GPU = dataclasses.replace(FAST, gpu=True)


@pytest.mark.parametrize("name", sorted(set(names()) - NO_OPERATORS))
def test_comparisons_of_a_gpu(name):
    """Every contender but the CUDA kernels gives the right result, backward alone included."""
    rows = list(importlib.import_module(f"benchmarks.bench_{name}").rows(GPU))
    assert {row["pass"] for row in rows} == {"forward", "backward"}
    subjects = {row["dtype"] for row in rows if row["provider"] == "cotnet_ext"}
    assert subjects == {"float32", "float16", "bfloat16"}
    for row in rows:
        assert (row["error"] is None) == (row["provider"] != "one thread per result"), row


def test_backward_alone_is_checked():
    def wrong(x):
        return (2 * x).detach() + x - x.detach()

    right, other = measured(wrong, "backward")
    assert right["error"] is None and right["ms"]
    assert other["error"].startswith("wrong result")


def test_batches_on_a_gpu_are_large():
    assert [shape.batch for shape in Options(gpu=True).shapes()] == [128] * 4
    assert [shape.batch for shape in Options().shapes()] == [8] * 4


def test_dtypes_can_be_chosen():
    assert len(Options(gpu=True).dtypes) == 3
    assert Options(gpu=True, only_dtypes=("bfloat16",)).dtypes == (torch.bfloat16,)


WINDOW = {"kernel_size": SHAPE.kernel_size, "padding": SHAPE.padding}
# A C++ compiler takes the CUDA source with these, and runs one thread after the other.
ONE_BY_ONE = """
#include <cstring>
#define __global__
#define __device__ static
struct { int x; } blockIdx, blockDim, threadIdx;
static float __uint_as_float(unsigned bits) { float a; std::memcpy(&a, &bits, 4); return a; }
static unsigned __float_as_uint(float a) { unsigned bits; std::memcpy(&bits, &a, 4); return bits; }
%s
#define RUN(name)                                                                              \\
  extern "C" void run_##name(const scalar_t* a, const scalar_t* b, scalar_t* c, int count,     \\
                             int C, int Cw, int H, int W, int k) {                             \\
    blockDim.x = 64;                                                                           \\
    for (blockIdx.x = 0; blockIdx.x < (count + 63) / 64; ++blockIdx.x)                         \\
      for (threadIdx.x = 0; threadIdx.x < 64; ++threadIdx.x)                                   \\
        name(a, b, c, count, C, Cw, H, W, k);                                                  \\
  }
RUN(forward) RUN(grad_input) RUN(grad_weight)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_cuda_kernel_is_right(dtype, tmp_path, monkeypatch):
    (tmp_path / "plain.cpp").write_text(ONE_BY_ONE % one_thread.source(dtype))
    command = ["c++", "-O1", "-shared", "-fPIC", "plain.cpp", "-o", "plain.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    library = ctypes.CDLL(str(tmp_path / "plain.so"))

    def launch(name, first, second, result, sizes):
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (first, second, result)]
        getattr(library, f"run_{name}")(*pointers, result.numel(), *sizes)
        return result

    monkeypatch.setattr(one_thread, "launch", launch)
    truth = functools.partial(cotnet_ext.reference.local_aggregation, **WINDOW)
    plain = functools.partial(one_thread.local_aggregation, **WINDOW)
    contenders = [Contender("plain", plain, truth, Window(SHAPE, dtype))]
    for direction in ("forward", "forward+backward"):
        rows = measure(Comparison("local_aggregation", direction, SHAPE, contenders), FAST)
        assert [row["error"] for row in rows] == [None]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("dtype", one_thread.SCALARS, ids=dtype_name)
def test_the_plain_cuda_kernel_compiles(dtype, tmp_path):
    (tmp_path / "plain.cu").write_text(one_thread.source(dtype))
    subprocess.run(["nvcc", "-arch=sm_80", "-cubin", "plain.cu"], cwd=tmp_path, check=True)


def test_official_kernels_are_found_and_get_what_cupy_removed(monkeypatch, tmp_path):
    layers = tmp_path / "cupy_layers"
    layers.mkdir()
    code = "import cupy\ndef aggregation_zeropad(x, **window):\n"
    code += "    return cupy.cuda.compile_with_cache('code').get_function('f')(x, **window)\n"
    (layers / "aggregation_zeropad.py").write_text(code)

    def raw_module(code):
        assert code == "code"
        function = lambda x, **window: (x, window)  # noqa: E731
        return types.SimpleNamespace(get_function={"f": function}.get)

    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(), RawModule=raw_module)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert official.late(tmp_path)(5, padding=1) == (5, {"padding": 1})
    with pytest.raises(FileNotFoundError, match="no checkout"):
        official.local_aggregation(tmp_path / "elsewhere")
    for name in ("cupy_layers", official.MODULE):
        sys.modules.pop(name)


def test_the_clock_of_a_gpu_leaves_the_host_out(monkeypatch):
    """The GPU waits before each sample, and longer once launching has taken longer than that."""
    waits = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self): ...

        def synchronize(self): ...

        def elapsed_time(self, end) -> float:
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", waits.append)
    clock = clocks.CudaClock("cpu", cold=False)
    assert clock(lambda: time.sleep(0.002), 3) == (2.0, None)
    clock(lambda: None, 1)
    assert waits[0] == clocks.LEAST_MS * clocks.CYCLES
    assert 9 * clocks.CYCLES <= waits[1] <= clocks.MOST_MS * clocks.CYCLES
    assert clocks.clock("cpu") is clocks.clock("cuda", host=True) is clocks.host_clock
