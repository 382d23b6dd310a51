"""Values and gradients of `local_aggregation`, over shapes, dtypes, layouts and hostile numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import CASES, EMPTY, FILLED, REPRESENTATIVE, Case, dtype_id, each, pair, randn
from checks import check_empty_batch, check_values, compare
from layouts import FORMATS, LAYOUTS, MIXED
from oracle import LOCAL, evaluate, expectation, expected
from tolerances import DTYPES, check

from cotnet_ext import functional, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@each(FILLED)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_values_and_gradients(case, dtype, layout, device):
    check_values(LOCAL, case, dtype, device, maps=layout, grad=layout)


@each(FILLED, lambda case: case.weight_numel < 2000)
def test_the_formula_itself(case, device):
    """Against the contract's formula, written as loops: the reference is not judge of itself."""
    (kh, kw), (sh, sw) = pair(case.kernel_size), pair(case.stride)
    (ph, pw), (dh, dw) = pair(case.padding), pair(case.dilation)
    height, width = case.output_size
    known = expected(LOCAL, case, torch.float64)
    x, w = known.tensors["input"], known.tensors["weight"]
    y = torch.zeros(case.output_shape, dtype=torch.float64)
    for g, c, i, j in itertools.product(
        range(case.heads), range(case.channels), range(height), range(width)
    ):
        for u, v in itertools.product(range(kh), range(kw)):
            row, column = i * sh - ph + u * dh, j * sw - pw + v * dw
            if case.padding_mode == "reflect":
                row = case.height - 1 - abs(case.height - 1 - abs(row))
                column = case.width - 1 - abs(case.width - 1 - abs(column))
            if 0 <= row < case.height and 0 <= column < case.width:
                tap = w[:, g, c % case.weight_channels, u * kw + v, i, j]
                y[:, g * case.channels + c, i, j] += tap * x[:, c, row, column]
    tensors = {name: t.to(device) for name, t in known.tensors.items()}
    result = LOCAL.call(functional, tensors, case)
    check(result, y, name="formula", magnitude=known.magnitude["output"])


@each(REPRESENTATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(("maps", "weights"), MIXED)
def test_layouts(case, dtype, maps, weights, device):
    check_values(LOCAL, case, dtype, device, maps=maps, others=weights)


@each(CASES[name] for name in ("odd_9x11", "k2_grows", "heads3", "reflect"))
@pytest.mark.parametrize("grad", LAYOUTS)
@FORMATS
def test_layouts_of_the_incoming_gradient(case, grad, layout, device):
    check_values(LOCAL, case, torch.float32, device, maps=layout, grad=grad)


@each(REPRESENTATIVE)
@FORMATS
def test_expanded_gradient(case, layout, device):
    """`y.sum().backward()` hands down a gradient of stride 0."""
    known = expected(LOCAL, case, torch.float32)
    grad = torch.ones((), device=device).expand(case.output_shape)
    known = expectation(LOCAL, case, known.tensors, torch.ones(case.output_shape))
    tensors = {name: LAYOUTS[layout](t.to(device)) for name, t in known.tensors.items()}
    compare(evaluate(LOCAL, functional, tensors, grad, case), known, LOCAL)


@each(REPRESENTATIVE)
def test_expanded_arguments(case, device):
    """One image for the whole batch and one kernel for the whole map, as views of stride 0."""
    x = randn(1, case.channels, 1, case.width, dtype=torch.float32, key="expanded")
    w = randn(
        1, 1, case.weight_channels, case.taps, 1, 1, dtype=torch.float32, key="expanded weight"
    )
    tensors = {"input": x.expand(case.input_shape), "weight": w.expand(case.weight_shape)}
    grad = randn(*case.output_shape, dtype=torch.float32)
    known = expectation(LOCAL, case, tensors, grad)
    tensors = {
        "input": x.to(device).expand(case.input_shape),
        "weight": w.to(device).expand(case.weight_shape),
    }
    compare(evaluate(LOCAL, functional, tensors, grad.to(device), case), known, LOCAL)


@each(REPRESENTATIVE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
@FORMATS
def test_half_precision_sums_in_float32(case, dtype, layout, device):
    """Nothing but the last rounding is in half precision, so rounding alone bounds the error."""
    check_values(LOCAL, case, dtype, device, maps=layout, strict=True)


@FORMATS
def test_float16_partial_sums_may_leave_its_range(layout, device):
    """25 taps of +60000 and 24 of -60000: float16 ends at 65504, the result is 60000."""
    case = CASES["k7"]
    x = torch.full(case.input_shape, 6e4, dtype=torch.float16, device=device)
    w = torch.ones(case.weight_shape, dtype=torch.float16, device=device)
    w[:, :, :, 25:] = -1
    tensors = {"input": LAYOUTS[layout](x), "weight": LAYOUTS[layout](w)}
    result = LOCAL.call(functional, tensors, case)
    assert torch.equal(result[:, :, 3:-3, 3:-3], x[:, :, 3:-3, 3:-3])


@each(EMPTY)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_empty_batch(case, dtype, layout, device):
    check_empty_batch(LOCAL, case, dtype, device, layout)


def _hostile_positions(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Corners, ends of rows and a middle: where a vector reads past a row, a plane, or a tensor."""
    height, width = shape[-2:]
    return [(0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1), (height // 2, 0)]


def _taps_inside(case: Case) -> torch.Tensor:
    """True where the tap of a weight lies on the map (under reflection: everywhere)."""
    leaves = {
        "input": torch.ones(case.input_shape, dtype=torch.float64),
        "weight": torch.ones(case.weight_shape, dtype=torch.float64),
    }
    grad = torch.ones(case.output_shape, dtype=torch.float64)
    return evaluate(LOCAL, reference, leaves, grad, case)["weight"] > 0


@each(REPRESENTATIVE)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["input", "weight", "grad"])
@FORMATS
def test_nonfinite_values_reach_only_their_window(case, poison, where, layout, device):
    """NaN and infinity spread by the formula, never through a neighbour's vector or a border tap.

    The product of an infinity with the zero outside the map is left open: taps outside the map get
    no infinite weight here, and their own gradient is not compared.
    """
    known = expected(LOCAL, case, torch.float32)
    tensors = {name: t.clone() for name, t in known.tensors.items()}
    grad = known.grad.clone()
    inside = _taps_inside(case)
    victim = grad if where == "grad" else tensors[where]
    for number, (i, j) in enumerate(_hostile_positions(victim.shape)):
        if where == "weight":
            taps = inside[-1, -1, -1, :, i, j].nonzero().flatten()
            victim[-1, -1, -1, taps[number % len(taps)] if len(taps) else [], i, j] = poison
        else:
            victim[-1, number % victim.shape[1], i, j] = poison
    known = expectation(LOCAL, case, tensors, grad)
    tensors = {name: LAYOUTS[layout](t.to(device)) for name, t in tensors.items()}
    results = evaluate(LOCAL, functional, tensors, LAYOUTS[layout](grad.to(device)), case)
    compare(results, known, LOCAL, where={"weight": inside})


@FORMATS
def test_negative_views(layout, device):
    """The imaginary part of a conjugate is a lazily negated view; its sign must not be lost."""
    case = CASES["odd_9x11"]
    known = expected(LOCAL, case, torch.float32)
    x = known.tensors["input"].to(device)
    lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazy.is_neg()
    w = LAYOUTS[layout](known.tensors["weight"].to(device))
    compare({"output": LOCAL.call(functional, {"input": lazy, "weight": w}, case)}, known, LOCAL)


def test_defaults_and_pairs(device):
    """Defaults are a 3x3 window of stride 1 without padding; an int means a pair of equal ints."""
    x = randn(1, 4, 6, 7, dtype=torch.float32).to(device)
    w = randn(1, 1, 2, 9, 4, 5, dtype=torch.float32).to(device)
    plain = functional.local_aggregation(x, w)
    spelled = functional.local_aggregation(
        x,
        w,
        kernel_size=[3, 3],
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
        padding_mode="zeros",
    )
    assert plain.shape == (1, 4, 4, 5)
    assert torch.equal(plain, spelled)
    assert torch.equal(plain, functional.local_aggregation(x, w, (3, 3), 1, 0, 1))


def test_arguments_are_not_changed(device):
    case = CASES["odd_9x11"]
    known = expected(LOCAL, case, torch.float32)
    tensors = {name: t.to(device, copy=True) for name, t in known.tensors.items()}
    evaluate(LOCAL, functional, tensors, known.grad.to(device), case)
    for name, t in tensors.items():
        assert torch.equal(t.cpu(), known.tensors[name]), name
