"""Values and gradients of `context_fusion`."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, MAPS, dtype_id, each, randn
from checks import check_empty_batch, check_values, compare
from layouts import FORMATS, LAYOUTS, MIXED
from oracle import FUSION, evaluate, expectation, expected
from tolerances import DTYPES

from cotnet_ext import functional

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
SOME = tuple(
    CASES[name]
    for name in (
        "stage1_64x56x56",
        "stage4_512x7x7",
        "odd_9x11",
        "map_1x1",
        "row_1x19",
        "narrow_10x3",
        "long_5x130",
        "one_channel",
        "batch_33",
    )
)


@each(case for case in MAPS if case.batch > 0)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_values_and_gradients(case, dtype, layout, device):
    check_values(FUSION, case, dtype, device, maps=layout, grad=layout)


@each(SOME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(("maps", "logits"), MIXED)
def test_layouts(case, dtype, maps, logits, device):
    check_values(FUSION, case, dtype, device, maps=maps, others=logits)


@each(SOME)
@pytest.mark.parametrize(("first", "second"), MIXED)
def test_maps_in_different_layouts(case, first, second, device):
    known = expected(FUSION, case, torch.float32)
    layouts = {"dynamic": first, "static": second, "logits": "contiguous"}
    tensors = {name: LAYOUTS[layouts[name]](t.to(device)) for name, t in known.tensors.items()}
    compare(evaluate(FUSION, functional, tensors, known.grad.to(device), case), known, FUSION)


@each(SOME)
@pytest.mark.parametrize("grad", LAYOUTS)
def test_layouts_of_the_incoming_gradient(case, grad, device):
    check_values(FUSION, case, torch.float32, device, grad=grad)


@each(SOME)
@FORMATS
def test_expanded_gradient(case, layout, device):
    """`y.sum().backward()` hands down a gradient of stride 0."""
    known = expected(FUSION, case, torch.float32)
    known = expectation(FUSION, case, known.tensors, torch.ones(case.input_shape))
    tensors = {name: LAYOUTS[layout](t.to(device)) for name, t in known.tensors.items()}
    grad = torch.ones((), device=device).expand(case.input_shape)
    compare(evaluate(FUSION, functional, tensors, grad, case), known, FUSION)


@each(SOME)
@HALVES
@FORMATS
def test_half_precision_sums_in_float32(case, dtype, layout, device):
    check_values(FUSION, case, dtype, device, maps=layout, strict=True)


@each(case for case in MAPS if case.batch == 0)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_empty_batch(case, dtype, layout, device):
    check_empty_batch(FUSION, case, dtype, device, layout)


@each(SOME)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", ["huge", "range", "equal", "masked"])
@FORMATS
def test_hostile_logits(case, dtype, kind, layout, device):
    """+-10000, the ends of the range, equal pairs, and one of the two at -inf."""
    signs = randn(case.batch, case.channels, 2, key="signs").sign()
    logits = {
        "huge": 1e4 * signs,
        "range": 0.49 * torch.finfo(dtype).max * signs,
        "equal": torch.full_like(signs, 6e4),
        "masked": torch.stack((signs[..., 0], torch.full_like(signs[..., 0], -torch.inf)), 2),
    }[kind]
    standard = expected(FUSION, case, dtype)
    tensors = {**standard.tensors, "logits": logits.to(dtype)}
    known = expectation(FUSION, case, tensors, standard.grad)
    tensors = {name: LAYOUTS[layout](t.to(device)) for name, t in tensors.items()}
    results = evaluate(FUSION, functional, tensors, LAYOUTS[layout](known.grad.to(device)), case)
    compare(results, known, FUSION)
    assert all(torch.isfinite(result).all() for result in results.values())


@each(SOME)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", ["dynamic", "static", "logits"])
@FORMATS
def test_nonfinite_values_stay_in_their_channel(case, poison, where, layout, device):
    known = expected(FUSION, case, torch.float32)
    tensors = {name: t.clone() for name, t in known.tensors.items()}
    if where == "logits":
        tensors[where][-1, -1, 1] = poison
    else:
        tensors[where][-1, -1, 0, -1] = poison
    known = expectation(FUSION, case, tensors, known.grad)
    tensors = {name: LAYOUTS[layout](t.to(device)) for name, t in tensors.items()}
    results = evaluate(FUSION, functional, tensors, known.grad.to(device), case)
    # An infinite map makes an infinite gradient of the logits: p0 * p1 * (infinity - finite). The
    # same, expanded as the reference has it, is infinity - infinity, so the kind is left open.
    finite = {name: torch.isfinite(truth) for name, truth in known.truth.items()}
    for name, result in results.items():
        assert torch.equal(torch.isfinite(result).cpu(), finite[name]), name
    compare(results, known, FUSION, where={"logits": finite["logits"]})


def test_logits_are_dynamic_first(device):
    """Of the two logits of a channel the first belongs to the dynamic context."""
    dynamic = torch.full((1, 2, 2, 2), 1.0, device=device)
    static = torch.full((1, 2, 2, 2), 2.0, device=device)
    logits = torch.tensor([[[40.0, -40.0], [-40.0, 40.0]]], device=device)
    y = functional.context_fusion(dynamic, static, logits)
    assert y.flatten().tolist() == [1.0] * 4 + [2.0] * 4


def test_arguments_are_not_changed(device):
    case = CASES["odd_9x11"]
    known = expected(FUSION, case, torch.float32)
    tensors = {name: t.to(device, copy=True) for name, t in known.tensors.items()}
    evaluate(FUSION, functional, tensors, known.grad.to(device), case)
    for name, t in tensors.items():
        assert torch.equal(t.cpu(), known.tensors[name]), name
