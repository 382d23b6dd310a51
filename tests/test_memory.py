"""Memory: what is saved for backward, what is never materialised, and that poisoning works."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import CASES, Case, dtype_id, each
from layouts import FORMATS, LAYOUTS
from operators import COMPUTING, SAMPLES, Sampler, operator, without_grad
from oracle import (
    EACH_FUNCTION,
    GATE,
    LOCAL,
    NORM,
    SOFTMAX,
    Function,
    evaluate,
    expected,
)
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from cotnet_ext import functional

SOME = tuple(CASES[name] for name in ("stage4_512x7x7", "odd_9x11", "heads2", "stride2", "reflect"))

# --- saved for backward --------------------------------------------------------------------------

# What each function may keep until backward; everything else is computed again.
MAY_SAVE = {
    "local_aggregation": {"input", "weight"},
    "softmax_aggregation": {"input", "logits"},
    "group_norm_aggregation": {"input", "weight", "norm_weight", "norm_bias"},
    "spatial_softmax_gate": {"logits", "value"},
    "context_fusion": {"dynamic", "static", "logits"},
}


def _extra_bytes(function: Function, case: Case, dtype: torch.dtype) -> int:
    """Bytes that may be saved beyond arguments: mean and rstd of each group of the norm."""
    if function.name != "group_norm_aggregation":
        return 0
    size = 8 if dtype == torch.float64 else 4
    return 2 * case.batch * case.heads * case.weight_channels * size


@EACH_FUNCTION
@each(SOME)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@FORMATS
def test_saved_for_backward(function, case, dtype, layout, device):
    """Arguments are saved as they are; no probability, normalised weight or copy of one is."""
    known = expected(function, case, dtype)
    leaves = {
        name: LAYOUTS[layout](t.to(device)).detach().requires_grad_()
        for name, t in known.tensors.items()
    }
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function.call(functional, leaves, case)
    storages = {t.untyped_storage().data_ptr(): name for name, t in leaves.items()}
    assert {storages[p] for p in saved if p in storages} <= MAY_SAVE[function.name]
    extra = sum(size for pointer, size in saved.items() if pointer not in storages)
    assert extra <= _extra_bytes(function, case, dtype)


@pytest.mark.parametrize("function", [LOCAL, SOFTMAX], ids=str)
@pytest.mark.parametrize("layout", ["sliced", "channels_last_sliced"])
def test_copies_of_strided_arguments_are_not_saved(function, layout, device):
    """The copy that a strided argument needs is scratch: the view itself is what is kept."""
    known = expected(function, CASES["odd_9x11"], torch.float32)
    leaves = {
        name: LAYOUTS[layout](t.to(device)).detach().requires_grad_()
        for name, t in known.tensors.items()
    }
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function.call(functional, leaves, CASES["odd_9x11"])
    storages = {t.untyped_storage().data_ptr() for t in leaves.values()}
    assert {t.untyped_storage().data_ptr() for t in saved} <= storages


# --- what operators allocate ---------------------------------------------------------------------


def _profile(call: Callable[[], object]):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return profiler.events()


def _ours(events) -> list:
    return [event for event in events if event.name.startswith("cotnet_ext::")]


@pytest.mark.parametrize("name", COMPUTING)
@FORMATS
def test_poisoning_covers_the_operators(name, layout):
    """All memory of an operator comes from aten::empty*, which `poisoned_memory` fills with NaN.

    Allocated any other way, it would be the operator's own in the profile, and an element that a
    kernel forgets would keep whatever value was there.
    """
    device = torch.device("cpu")
    args = without_grad(SAMPLES[name](Sampler(CASES["odd_9x11"], layout, torch.float32, device)))
    results = []
    (event,) = _ours(_profile(lambda: results.append(operator(name)(*args))))
    allocating = [child for child in _descendants(event) if child.self_cpu_memory_usage > 0]
    names = {child.name for child in allocating}
    assert names and all(child.startswith("aten::empty") for child in names), names
    # Its own is at most less than none: scratch that it was given and lets go.
    given = sum(child.self_cpu_memory_usage for child in allocating)
    assert given >= _bytes(*tree_leaves(results)) > 0
    assert event.self_cpu_memory_usage <= 0
    assert event.cpu_memory_usage == given + event.self_cpu_memory_usage


def _descendants(event) -> list:
    found = list(event.cpu_children)
    for child in event.cpu_children:
        found += _descendants(child)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_poisoned_memory_is_nan(poisoned_memory, dtype):
    """Each of the allocating functions, in each dtype, returns NaN under the fixture."""
    base = torch.ones(2, 3, 4, 5, dtype=dtype)
    assert torch.empty(7, dtype=dtype).isnan().all()
    assert torch.empty_like(base).isnan().all()
    assert base.new_empty(7).isnan().all()
    assert torch.empty(2, 3, 4, 5, dtype=dtype, memory_format=torch.channels_last).isnan().all()


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# 61 MiB of float32 weights beside 7 MiB of maps: whatever has the size of the weights stands out.
WIDE = Case("wide", 4, 8, 1, 8, 3, 1, 1, 1, "zeros", 236, 236)
# 32 MiB maps.
TALL = Case("tall", 2, 64, 1, 8, 3, 1, 1, 1, "zeros", 256, 256)
SLACK = 0.2  # of the forbidden tensor: threads, pages, code touched for the first time


def _peak_bytes(call: Callable[[], object], device: torch.device) -> tuple[object, int]:
    """Result of the call, and how far memory grew at its peak (scratch of any kind included)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    # Freed memory that the C library keeps would serve an allocation unseen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the resident set
    before = _high_water()
    result = call()
    return result, _high_water() - before


def _high_water() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM in /proc/self/status")


def _wide_arguments(function: Function, case: Case, layout: str, device: torch.device):
    tensors = {name: t.to(device, torch.float32) for name, t in function.make(case).items()}
    return {name: LAYOUTS[layout](t).detach().requires_grad_() for name, t in tensors.items()}


def _pay_for_first_calls(function: Function, layout: str, device: torch.device) -> None:
    """Threads start, and `torch.autograd.grad` imports 30 MB of modules, when first used."""
    case = CASES["odd_9x11"]
    tensors = _wide_arguments(function, case, layout, device)
    evaluate(
        function, functional, tensors, torch.ones(function.output_shape(case)).to(device), case
    )


@pytest.mark.parametrize("function", [LOCAL, SOFTMAX, NORM], ids=str)
@FORMATS
def test_weights_are_not_materialised_again(function, layout, device):
    """Forward and backward allocate their results, and nothing else of the weights' size."""
    _pay_for_first_calls(function, layout, device)
    leaves = _wide_arguments(function, WIDE, layout, device)
    weights = _bytes(list(leaves.values())[1])
    y, grew = _peak_bytes(lambda: function.call(functional, leaves, WIDE), device)
    assert grew <= _bytes(y) + SLACK * weights
    grad = torch.ones_like(y)
    grads, grew = _peak_bytes(lambda: torch.autograd.grad(y, list(leaves.values()), grad), device)
    assert grew <= _bytes(*grads) + SLACK * weights


@FORMATS
def test_the_gate_materialises_no_probabilities(layout, device):
    _pay_for_first_calls(GATE, layout, device)
    leaves = _wide_arguments(GATE, TALL, layout, device)
    y, grew = _peak_bytes(lambda: GATE.call(functional, leaves, TALL), device)
    assert grew <= (1 + SLACK) * _bytes(y)
    # The gradient of static is the incoming one.
    wanted = [leaves["logits"], leaves["value"]]
    grad = torch.ones_like(y)
    grads, grew = _peak_bytes(lambda: torch.autograd.grad(y, wanted, grad), device)
    assert grew <= _bytes(*grads) + SLACK * _bytes(y)


def test_this_would_be_noticed(device):
    """The measurement sees the probabilities of the unfused composition, forward and backward."""
    leaves = _wide_arguments(SOFTMAX, WIDE, "contiguous", device)
    weights = _bytes(leaves["logits"])

    def unfused():
        p = leaves["logits"].softmax(3)
        return functional.local_aggregation(leaves["input"], p, **WIDE.geometry)

    y, grew = _peak_bytes(unfused, device)
    assert grew > _bytes(y) + SLACK * weights


@pytest.mark.parametrize("name", COMPUTING)
@FORMATS
def test_operators_allocate_their_results_only(name, layout):
    """Counted by the profiler: arguments in a native layout need no scratch tensor."""
    device = torch.device("cpu")
    for case in SOME:
        args = without_grad(SAMPLES[name](Sampler(case, layout, torch.float32, device)))
        results = []
        (event,) = _ours(_profile(lambda args=args, to=results: to.append(operator(name)(*args))))
        made = [results[0]] if isinstance(results[0], torch.Tensor) else list(results[0])
        allocated = sum(max(0, e.self_cpu_memory_usage) for e in _descendants(event))
        # Sums of partial results per thread or image are small change; a tensor is not.
        largest = max(_bytes(t) for t in made)
        assert allocated <= _bytes(*made) + SLACK * largest + 4096 * len(made), case.name


@EACH_FUNCTION
def test_nothing_leaks(function, device):
    """A few hundred passes leave no memory behind (a leaked result would add up to 100 MB)."""
    case = CASES["stage4_512x7x7"]
    known = expected(function, case, torch.float32)
    tensors = {name: t.to(device) for name, t in known.tensors.items()}
    grad = known.grad.to(device)

    def passes(count: int):
        for _ in range(count):
            evaluate(function, functional, tensors, grad, case)

    passes(20)
    _, grew = _peak_bytes(lambda: passes(200), device)
    assert grew < 30e6
