"""The CUDA kernels of `spatial_softmax_gate`, emulated, against float64; how they are chosen."""

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
    SINGLE,
    SLABS,
    SMALL,
    TWO,
    WIDE,
    array_of,
    emulated_kernels,
    name_of,
    poisoned,
    problem,
    shaped,
    tensor_of,
    thread_schedules,
)
from oracle import GATE, Expected, Tensors, expectation, expected
from tolerances import check

kernels, schedules = emulated_kernels, thread_schedules
GRADIENTS = ("logits", "value")
# One for each way of cutting work that short rows and slabs have, and long rows.
SOME = tuple(
    case
    for case in SHORT + SLABS + ROWS
    if case.name in ("odd_9x11", "row_1x19", "batch_33", "slab_40x24x25", "rows_1x7x1301")
)


def run(
    kernels,
    known: Expected,
    case: Case,
    last: bool,
    *,
    gpu: tuple = H200,
    mask: tuple[bool, bool] = (True, True),
    offset: int = 0,
) -> Tensors:
    """Output and gradients asked for, of the emulated kernels, on arrays `offset` elements past an
    aligned address."""
    shape, dtype, p = case.input_shape, known.grad.dtype, problem(case, last)
    tensors = {**known.tensors, "grad": known.grad}
    arrays = {name: array_of(t, last, offset) for name, t in tensors.items()}
    results = {name: poisoned(shape, dtype, offset) for name in ("output", *GRADIENTS)}
    asked = [results[name] if m else None for name, m in zip(GRADIENTS, mask, strict=True)]
    logits, value, static = (arrays[name] for name in ("logits", "value", "static"))
    kernels.spatial_softmax_gate_forward(
        p, name_of(dtype), gpu, logits, value, static, results["output"]
    )
    kernels.spatial_softmax_gate_backward(
        p, name_of(dtype), gpu, arrays["grad"], logits, value, *asked
    )
    return {name: tensor_of(a, shape, dtype, last) for name, a in results.items()}


def compare(results: Tensors, known: Expected) -> None:
    for name, result in results.items():
        check(
            result,
            known.truth[name],
            name=f"spatial_softmax_gate {name}",
            magnitude=known.magnitude[name],
            reference=known.same[name],
        )


def with_logits(case: Case, logits: torch.Tensor) -> Expected:
    standard = expected(GATE, case, logits.dtype)
    return expectation(GATE, case, {**standard.tensors, "logits": logits}, standard.grad)


@each(SHORT + SLABS + ROWS)
@ALL
@LAST
def test_values_and_gradients(kernels, case, dtype, last):
    known = expected(GATE, case, dtype)
    compare(run(kernels, known, case, last), known)


@each(SHORT[:4] + SLABS + ROWS)
@TWO
@LAST
@pytest.mark.parametrize("gpu", ["single", "small", "wide"])
def test_other_gpus(kernels, case, dtype, last, gpu):
    """One multiprocessor, so that a block has a whole row; little shared memory, so that it keeps a
    part; and many multiprocessors, so that several blocks share a row."""
    known = expected(GATE, case, dtype)
    compare(run(kernels, known, case, last, gpu=GPUS[gpu]), known)


def test_cases_take_every_path(kernels):
    """What the tests above run, by path and part of the map kept."""
    seen = set()
    for case in SHORT + SLABS + ROWS:
        for last in (False, True):
            for gpu in (H200, SINGLE, SMALL, WIDE):
                for name in ("forward", "backward"):
                    for size in (2, 4):
                        plan = kernels.choose_spatial_softmax_gate(
                            name, problem(case, last), size, True, gpu
                        )
                        steps = plan["chunk"] * plan["lanes"] * (1 if last else size / 16)
                        kept = plan["kept"] * plan["threads"]
                        part = "all" if kept >= steps else "some" if kept else "none"
                        seen.add((plan["path"], last, part if plan["path"] == "whole" else ""))
                        if plan["path"] == "tile":
                            seen.add(("team", plan["team"], plan["teams_per_row"] > 1))
    for last in (False, True):
        assert ("split", last, "") in seen
        assert {("whole", last, part) for part in ("all", "some")} <= seen, sorted(map(str, seen))
    assert ("tile", False, "") in seen
    assert {("team", team, False) for team in (1, 2, 4, 8, 16, 32)} <= seen
    assert ("team", 32, True) in seen


@each(SOME)
@TWO
@LAST
def test_schedules_give_the_same_bits(kernels, schedules, case, dtype, last):
    known = expected(GATE, case, dtype)
    for gpu in (H200, SINGLE, SMALL, WIDE):
        runs = [run(kernels, known, case, last, gpu=gpu) for _ in schedules()]
        for other in runs[1:]:
            for name, result in runs[0].items():
                assert torch.equal(other[name], result), f"{name} depends on the schedule"


@each(SOME)
@ALL
@LAST
def test_misaligned_arrays(kernels, case, dtype, last):
    known = expected(GATE, case, dtype)
    aligned = run(kernels, known, case, last)
    for offset in (1, 16 // torch.finfo(dtype).bits * 4 or 1):
        results = run(kernels, known, case, last, offset=offset)
        for name, result in results.items():
            assert torch.equal(result, aligned[name]), name


@each(SOME)
@TWO
@LAST
def test_only_the_gradients_asked_for(kernels, case, dtype, last):
    known = expected(GATE, case, dtype)
    both = run(kernels, known, case, last)
    for mask in ((True, False), (False, True), (False, False)):
        results = run(kernels, known, case, last, mask=mask)
        for name, asked in zip(GRADIENTS, mask, strict=True):
            result = results.pop(name)
            if not asked:
                assert torch.isnan(result).all(), f"{name} was written"
            elif name == "logits":
                assert torch.equal(result, both[name])
            else:
                compare({name: result}, known)


@LAST
@pytest.mark.parametrize("shape", [(0, 8, 7, 7), (2, 0, 7, 7), (2, 8, 0, 7)], ids=str)
def test_empty_maps_launch_nothing(kernels, last, shape):
    p = (shape[0], shape[1], shape[2] * shape[3], last)
    for name in ("forward", "backward"):
        plan = kernels.choose_spatial_softmax_gate(name, p, 4, True, H200)
        assert 0 in plan["grid"]
    empty = poisoned((0,), torch.float32)
    kernels.spatial_softmax_gate_forward(p, "float32", H200, empty, empty, empty, empty)
    kernels.spatial_softmax_gate_backward(p, "float32", H200, *[empty] * 5)


@each(SOME)
@ALL
@LAST
def test_huge_logits(kernels, case, dtype, last):
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, case.input_shape, generator=generator).double() * 2 - 1
    for size in (1e4, 0.49 * torch.finfo(dtype).max):
        known = with_logits(case, (size * signs).to(dtype))
        results = run(kernels, known, case, last)
        compare(results, known)
        assert all(torch.isfinite(result).all() for result in results.values())


@each(SOME)
@pytest.mark.parametrize("rising", [True, False], ids=["rising", "falling"])
@LAST
def test_the_maximum_comes_last_or_first(kernels, case, rising, last):
    steps = torch.arange(case.height * case.width, dtype=torch.float32) * 0.37
    logits = (steps if rising else steps.flip(0)).view(case.height, case.width)
    known = with_logits(case, logits.expand(case.input_shape).contiguous())
    for gpu in (H200, WIDE):
        compare(run(kernels, known, case, last, gpu=gpu), known)


@each(SOME)
@ALL
@LAST
def test_minus_infinity_masks_a_pixel(kernels, case, dtype, last):
    """Also when whole chunks of a map hold nothing else."""
    logits = expected(GATE, case, dtype).tensors["logits"].clone()
    pixels = logits.flatten(2)
    pixels[:, :, : pixels.shape[2] * 3 // 4] = -torch.inf
    known = with_logits(case, pixels.view_as(logits))
    for gpu in (H200, WIDE):
        results = run(kernels, known, case, last, gpu=gpu)
        compare(results, known)
        assert all(torch.isfinite(result).all() for result in results.values())


@each(SOME)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@LAST
def test_a_map_without_a_softmax_stays_alone(kernels, case, poison, last):
    logits = expected(GATE, case, torch.float32).tensors["logits"].clone()
    if poison == -torch.inf:
        logits[-1, -1] = poison
    else:
        logits[-1, -1, -1, -1] = poison
    known = with_logits(case, logits)
    for gpu in (H200, WIDE):
        results = run(kernels, known, case, last, gpu=gpu)
        compare(results, known)
        assert torch.isnan(results["output"]).sum() == case.height * case.width


# ---- choices -------------------------------------------------------------------------------------

MANY = (
    *(shaped(f"{c}x{s}x{s}", 128, c, s, s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))),
    shaped("detection", 2, 256, 100, 136),
    shaped("wide", 8, 64, 224, 224),
    shaped("one_row", 1, 1, 1000, 1000),
    shaped("long_rows", 16, 64, 1000, 1000),
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
    plan = kernels.choose_spatial_softmax_gate(direction, p, size, True, GPUS[gpu])
    x, y, z = plan["grid"]
    assert 0 < x < 1 << 31 and 0 < y <= 65535 and 0 < z <= 65535
    assert plan["threads"] % 32 == 0 and plan["shared_bytes"] <= GPUS[gpu][2]
    vector = 16 // size
    if plan["path"] == "tile":
        rows = plan["rows_per_block"]
        assert y * z * rows >= n * c and 1 <= rows <= plan["threads"] <= 448
        # Rows may begin at the last element of a vector.
        assert rows * plane + vector - 1 <= 2 * plan["threads"] * vector
        teams = plan["threads"] // plan["team"]
        assert rows * plan["teams_per_row"] <= teams
        return
    assert plan["threads"] <= (640 if last else 768)
    assert y * z >= plan["units"]
    assert plan["units"] == n * (plan["slabs"] if last else c)
    assert plan["slabs"] * plan["lanes"] * vector >= c or not last
    assert (plan["chunks"] - 1) * plan["chunk"] < plane <= plan["chunks"] * plan["chunk"]
    assert plan["chunks"] == x and plan["chunk"] < 1 << 30
    if plan["path"] == "split":
        assert plan["partial_sums"] > 0 and plan["kept"] == 0


def test_choices_for_an_h200(kernels):
    """What the reasons in spatial_softmax_gate_launch.h promise."""

    def choose(direction, size, last, *shape):
        p = problem(shaped("", *shape), last)
        return kernels.choose_spatial_softmax_gate(direction, p, size, True, H200)

    def kept_all(plan, elements, size):
        return plan["path"] == "whole" and plan["kept"] * plan["threads"] * 16 >= elements * size

    # The maps of the network move every byte once, in both layouts: but for 56x56 in NHWC backward.
    for direction in ("forward", "backward"):
        for c, s in ((64, 56), (128, 28), (256, 14), (512, 7)):
            for size in (2, 4):
                assert choose(direction, size, False, 128, c, s, s)["path"] == "tile"
                plan = choose(direction, size, True, 128, c, s, s)
                elements = s * s * plan["lanes"] * 16 // size
                assert kept_all(plan, elements, size) or (direction, s) == ("backward", 56)
                assert plan["lanes"] >= 2
    # Planes of 49 pixels go in eights, so that blocks begin at a vector.
    assert choose("forward", 2, False, 128, 512, 7, 7)["rows_per_block"] % 8 == 0
    # Rows that one multiprocessor holds; longer ones in several blocks when they are few.
    assert kept_all(choose("forward", 2, False, 8, 64, 224, 224), 224 * 224, 2)
    assert kept_all(choose("forward", 4, False, 8, 64, 224, 224), 224 * 224, 4)
    few = choose("forward", 2, False, 1, 1, 1000, 1000)
    assert few["path"] == "split" and few["chunks"] >= 2 * H200[0] // 4
    many = choose("forward", 2, False, 33, 128, 1000, 1000)
    assert many["path"] == "whole"


def test_misaligned_pointers_are_seen(kernels):
    p = (2, 24, 49, False)
    plan = kernels.choose_spatial_softmax_gate("forward", p, 2, False, H200)
    assert not plan["aligned"]
    odd_channels = kernels.choose_spatial_softmax_gate("forward", (2, 9, 49, True), 2, True, H200)
    assert not odd_channels["aligned"]
