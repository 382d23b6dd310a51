"""Values and gradients of `spatial_softmax_gate`, with logits at the ends of every range."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, MAPS, Case, dtype_id, each, generator, randn
from checks import check_empty_batch, check_values, compare
from layouts import FORMATS, LAYOUTS, MIXED
from oracle import GATE, Tensors, evaluate, expectation, expected
from tolerances import DTYPES

from cotnet_ext import functional

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
FILLED_MAPS = tuple(case for case in MAPS if case.batch > 0)
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


@each(FILLED_MAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_values_and_gradients(case, dtype, layout, device):
    check_values(GATE, case, dtype, device, maps=layout, grad=layout)


@each(SOME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(case, dtype, layout, device):
    check_values(GATE, case, dtype, device, maps=layout)


@each(SOME)
@pytest.mark.parametrize(("first", "second"), MIXED)
def test_arguments_in_different_layouts(case, first, second, device):
    known = expected(GATE, case, torch.float32)
    layouts = {"logits": first, "value": second, "static": "contiguous"}
    tensors = {name: LAYOUTS[layouts[name]](t.to(device)) for name, t in known.tensors.items()}
    compare(evaluate(GATE, functional, tensors, known.grad.to(device), case), known, GATE)


@each(SOME)
@pytest.mark.parametrize("grad", LAYOUTS)
def test_layouts_of_the_incoming_gradient(case, grad, device):
    check_values(GATE, case, torch.float32, device, grad=grad)


@each(SOME)
@FORMATS
def test_expanded_gradient(case, layout, device):
    """`y.sum().backward()` hands down a gradient of stride 0."""
    known = expected(GATE, case, torch.float32)
    known = expectation(GATE, case, known.tensors, torch.ones(case.input_shape))
    tensors = {name: LAYOUTS[layout](t.to(device)) for name, t in known.tensors.items()}
    grad = torch.ones((), device=device).expand(case.input_shape)
    compare(evaluate(GATE, functional, tensors, grad, case), known, GATE)


@each(SOME)
@HALVES
@FORMATS
def test_half_precision_sums_in_float32(case, dtype, layout, device):
    check_values(GATE, case, dtype, device, maps=layout, strict=True)


@each(case for case in MAPS if case.batch == 0)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_empty_batch(case, dtype, layout, device):
    check_empty_batch(GATE, case, dtype, device, layout)


def _check_logits(case: Case, logits: torch.Tensor, layout: str, device: torch.device) -> Tensors:
    """Evaluate the case on these logits (in their dtype) against the truth; returns the results."""
    standard = expected(GATE, case, logits.dtype)
    known = expectation(GATE, case, {**standard.tensors, "logits": logits}, standard.grad)
    tensors = {name: LAYOUTS[layout](t.to(device)) for name, t in known.tensors.items()}
    results = evaluate(GATE, functional, tensors, LAYOUTS[layout](known.grad.to(device)), case)
    compare(results, known, GATE)
    return results


@each(SOME)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_huge_logits(case, dtype, layout, device):
    """+-10000, and nearly the dtype's largest numbers: their exp overflows, the softmax not."""
    draws = torch.randint(0, 2, case.input_shape, generator=generator("signs", case.name))
    signs = (2 * draws - 1).to(torch.float64)
    noise = randn(*case.input_shape, key="noise")
    for size in (1e4, 0.49 * torch.finfo(dtype).max):
        results = _check_logits(case, (size * signs + noise).to(dtype), layout, device)
        assert all(torch.isfinite(result).all() for result in results.values())


@each(SOME)
@pytest.mark.parametrize("rising", [True, False], ids=["rising", "falling"])
@FORMATS
def test_the_maximum_comes_last_or_first(case, rising, layout, device):
    """An online softmax rescales its sums at every pixel here, or never."""
    steps = torch.arange(case.height * case.width, dtype=torch.float32) * 0.37
    logits = (steps if rising else steps.flip(0)).view(case.height, case.width)
    _check_logits(case, logits.expand(case.input_shape).contiguous(), layout, device)


@each(SOME)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_equal_logits_give_the_mean(case, dtype, layout, device):
    for level in (0.0, -1e4, 6e4):
        _check_logits(case, torch.full(case.input_shape, level, dtype=dtype), layout, device)


@each(SOME)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_minus_infinity_masks_a_pixel(case, dtype, layout, device):
    """-inf is weight zero, also when whole rows of a map begin with it."""
    logits = expected(GATE, case, dtype).tensors["logits"].clone()
    pixels = logits.flatten(2)
    pixels[:, :, : pixels.shape[2] * 3 // 4] = -torch.inf
    results = _check_logits(case, pixels.view_as(logits), layout, device)
    assert all(torch.isfinite(result).all() for result in results.values())


@each(SOME)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@FORMATS
def test_a_map_without_a_softmax_stays_alone(case, poison, layout, device):
    """NaN or +inf in one pixel, or -inf in all: that map has no softmax, the others have theirs."""
    logits = expected(GATE, case, torch.float32).tensors["logits"].clone()
    if poison == -torch.inf:
        logits[-1, -1] = poison
    else:
        logits[-1, -1, -1, -1] = poison
    results = _check_logits(case, logits, layout, device)
    assert torch.isnan(results["output"]).sum() == case.height * case.width


@each(SOME)
@pytest.mark.parametrize("where", ["value", "static"])
@FORMATS
def test_nonfinite_values_stay_at_their_pixel(case, where, layout, device):
    known = expected(GATE, case, torch.float32)
    tensors = {name: t.clone() for name, t in known.tensors.items()}
    tensors[where][-1, -1, 0, -1] = torch.nan
    tensors[where][0, 0, -1, 0] = torch.inf
    known = expectation(GATE, case, tensors, known.grad)
    tensors = {name: LAYOUTS[layout](t.to(device)) for name, t in tensors.items()}
    compare(evaluate(GATE, functional, tensors, known.grad.to(device), case), known, GATE)


def test_arguments_are_not_changed(device):
    case = CASES["odd_9x11"]
    known = expected(GATE, case, torch.float32)
    tensors = {name: t.to(device, copy=True) for name, t in known.tensors.items()}
    evaluate(GATE, functional, tensors, known.grad.to(device), case)
    for name, t in tensors.items():
        assert torch.equal(t.cpu(), known.tensors[name]), name
