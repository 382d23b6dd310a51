"""The CUDA kernels of `context_fusion`, emulated, against float64; and how they are chosen."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, each
from emulated_maps import (
    ALL,
    GPUS,
    H200,
    LAST,
    ROWS,
    SHORT,
    SLABS,
    TWO,
    array_of,
    emulated_kernels,
    name_of,
    poisoned,
    problem,
    shaped,
    tensor_of,
    thread_schedules,
)
from oracle import FUSION, Expected, Tensors, expectation, expected
from tolerances import check

kernels, schedules = emulated_kernels, thread_schedules
GRADIENTS = ("dynamic", "static", "logits")
SOME = tuple(
    case
    for case in SHORT + SLABS + ROWS
    if case.name in ("odd_9x11", "row_1x19", "batch_33", "slab_40x24x25", "rows_2x96x97")
)


def run(
    kernels,
    known: Expected,
    case: Case,
    last: bool,
    *,
    gpu: tuple = H200,
    mask: tuple[bool, bool, bool] = (True, True, True),
    offset: int = 0,
) -> Tensors:
    """Output and gradients asked for, of the emulated kernels, on arrays `offset` elements past an
    aligned address."""
    shape, dtype, p = case.input_shape, known.grad.dtype, problem(case, last)
    shapes = {"output": shape, "dynamic": shape, "static": shape, "logits": (*shape[:2], 2)}
    tensors = {**known.tensors, "grad": known.grad}
    arrays = {name: array_of(t, last, offset) for name, t in tensors.items()}
    results = {name: poisoned(shapes[name], dtype, offset) for name in shapes}
    asked = [results[name] if m else None for name, m in zip(GRADIENTS, mask, strict=True)]
    inputs = [arrays[name] for name in GRADIENTS]
    kernels.context_fusion_forward(p, name_of(dtype), gpu, *inputs, results["output"])
    kernels.context_fusion_backward(p, name_of(dtype), gpu, arrays["grad"], *inputs, *asked)
    return {name: tensor_of(a, shapes[name], dtype, last) for name, a in results.items()}


def compare(results: Tensors, known: Expected, where: Tensors | None = None) -> None:
    for name, result in results.items():
        check(
            result,
            known.truth[name],
            name=f"context_fusion {name}",
            magnitude=known.magnitude[name],
            reference=known.same[name],
            where=None if where is None else where.get(name),
        )


@each(SHORT + SLABS + ROWS)
@ALL
@LAST
def test_values_and_gradients(kernels, case, dtype, last):
    known = expected(FUSION, case, dtype)
    compare(run(kernels, known, case, last), known)


@each(SLABS + ROWS)
@TWO
@LAST
def test_a_small_gpu(kernels, case, dtype, last):
    known = expected(FUSION, case, dtype)
    compare(run(kernels, known, case, last, gpu=GPUS["small"]), known)


@each(SOME)
@TWO
@LAST
def test_schedules_give_the_same_bits(kernels, schedules, case, dtype, last):
    known = expected(FUSION, case, dtype)
    runs = [run(kernels, known, case, last) for _ in schedules()]
    for other in runs[1:]:
        for name, result in runs[0].items():
            assert torch.equal(other[name], result), f"{name} depends on the schedule"


@each(SOME)
@ALL
@LAST
def test_misaligned_arrays(kernels, case, dtype, last):
    known = expected(FUSION, case, dtype)
    aligned = run(kernels, known, case, last)
    results = run(kernels, known, case, last, offset=1)
    for name, result in results.items():
        assert torch.equal(result, aligned[name]), name


@each(SOME)
@TWO
@LAST
def test_only_the_gradients_asked_for(kernels, case, dtype, last):
    known = expected(FUSION, case, dtype)
    every = run(kernels, known, case, last)
    for bits in range(7):
        mask = tuple(bool(bits >> i & 1) for i in range(3))
        results = run(kernels, known, case, last, mask=mask)
        for name, asked in zip(GRADIENTS, mask, strict=True):
            if asked:
                assert torch.equal(results[name], every[name]), (name, mask)
            else:
                assert torch.isnan(results[name]).all(), f"{name} was written"


@LAST
@pytest.mark.parametrize("shape", [(0, 8, 7, 7), (2, 0, 7, 7)], ids=str)
def test_empty_maps_launch_nothing(kernels, last, shape):
    p = (shape[0], shape[1], shape[2] * shape[3], last)
    for name in ("forward", "backward"):
        assert 0 in kernels.choose_context_fusion(name, p, 4, True, H200)["grid"]
    empty = poisoned((0,), torch.float32)
    kernels.context_fusion_forward(p, "float32", H200, *[empty] * 4)
    kernels.context_fusion_backward(p, "float32", H200, *[empty] * 7)


@LAST
def test_a_map_without_pixels_has_gradients_of_zero(kernels, last):
    """The sum over no pixels: the gradient of the logits is there, and zero."""
    p, empty = (2, 8, 0, last), poisoned((0,), torch.float32)
    logits = array_of(torch.ones(2, 8, 2))
    grad_logits = poisoned((2, 8, 2), torch.float32)
    kernels.context_fusion_backward(
        p, "float32", H200, empty, empty, empty, logits, empty, empty, grad_logits
    )
    assert torch.equal(tensor_of(grad_logits, (2, 8, 2), torch.float32), torch.zeros(2, 8, 2))


@each(SOME)
@ALL
@pytest.mark.parametrize("kind", ["huge", "range", "equal", "masked"])
@LAST
def test_hostile_logits(kernels, case, dtype, kind, last):
    signs = torch.arange(case.batch * case.channels * 2).cos().sign().double()
    signs = signs.view(case.batch, case.channels, 2)
    logits = {
        "huge": 1e4 * signs,
        "range": 0.49 * torch.finfo(dtype).max * signs,
        "equal": torch.full_like(signs, 6e4),
        "masked": torch.stack((signs[..., 0], torch.full_like(signs[..., 0], -torch.inf)), 2),
    }[kind]
    standard = expected(FUSION, case, dtype)
    tensors = {**standard.tensors, "logits": logits.to(dtype)}
    known = expectation(FUSION, case, tensors, standard.grad)
    results = run(kernels, known, case, last)
    compare(results, known)
    assert all(torch.isfinite(result).all() for result in results.values())


@each(SOME)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", ["dynamic", "static", "logits"])
@LAST
def test_nonfinite_values_stay_in_their_channel(kernels, case, poison, where, last):
    standard = expected(FUSION, case, torch.float32)
    tensors = {name: t.clone() for name, t in standard.tensors.items()}
    tensors[where][(-1, -1, 1) if where == "logits" else (-1, -1, 0, -1)] = poison
    known = expectation(FUSION, case, tensors, standard.grad)
    results = run(kernels, known, case, last)
    finite = {name: torch.isfinite(truth) for name, truth in known.truth.items()}
    for name, result in results.items():
        assert torch.equal(torch.isfinite(result), finite[name]), name
    # An infinite map leaves open which infinity, or NaN, the gradient of the logits is.
    compare(results, known, where={"logits": finite["logits"]})


# ---- choices -------------------------------------------------------------------------------------

MANY = (
    *(shaped(f"{c}x{s}x{s}", 128, c, s, s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))),
    shaped("wide", 8, 64, 224, 224),
    shaped("one_row", 1, 1, 1000, 1000),
    shaped("past_32_bits", 1, 1, 65536, 65538),
    shaped("many_pixels", 1 << 31, 2, 1, 2),
    shaped("odd", 3, 7, 57, 61),
    CASES["map_1x1"],
)


@each(MANY)
@LAST
@pytest.mark.parametrize("gpu", sorted(GPUS))
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_choices_fit_and_cover(kernels, case, last, gpu, size, direction):
    n, c, plane, _ = p = problem(case, last)
    plan = kernels.choose_context_fusion(direction, p, size, True, GPUS[gpu])
    x, y, z = plan["grid"]
    assert 0 < x < 1 << 31 and 0 < y <= 65535 and 0 < z <= 65535
    assert plan["threads"] % 32 == 0 and plan["threads"] <= 256
    assert plan["shared_bytes"] <= 48 << 10
    assert plan["chunks"] == x
    assert (plan["chunks"] - 1) * plan["chunk"] < plane <= plan["chunks"] * plan["chunk"]
    vector = 16 // size
    if last:
        assert plan["slabs"] * plan["lanes"] * vector >= c
        assert y * z >= plan["units"] == n * plan["slabs"]
        return
    rows, items = plan["rows_per_block"], 4 if direction == "forward" else 2
    assert rows == 1 or plan["chunks"] == 1
    assert y * z * rows >= n * c and rows <= plan["threads"]
    assert rows * plan["chunk"] + vector - 1 <= items * plan["threads"] * vector
    assert rows * plan["teams_per_row"] * plan["team"] <= plan["threads"]


def test_small_planes_begin_at_vectors(kernels):
    for size, step in ((2, 8), (4, 4), (8, 2)):
        plan = kernels.choose_context_fusion("forward", (128, 512, 49, False), size, True, H200)
        assert plan["rows_per_block"] % step == 0
