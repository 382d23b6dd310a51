"""Values and gradients of `softmax_aggregation`, with logits at the ends of every range."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, EMPTY, FILLED, REPRESENTATIVE, Case, dtype_id, each, generator, randn
from checks import check_empty_batch, check_values, compare
from layouts import FORMATS, LAYOUTS, MIXED
from oracle import SOFTMAX, Tensors, evaluate, expectation, expected
from tolerances import DTYPES, check

from cotnet_ext import functional

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@each(FILLED)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_values_and_gradients(case, dtype, layout, device):
    check_values(SOFTMAX, case, dtype, device, maps=layout, grad=layout)


@each(REPRESENTATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(("maps", "logits"), MIXED)
def test_layouts(case, dtype, maps, logits, device):
    check_values(SOFTMAX, case, dtype, device, maps=maps, others=logits)


@each(CASES[name] for name in ("odd_9x11", "heads3", "reflect"))
@pytest.mark.parametrize("grad", LAYOUTS)
def test_layouts_of_the_incoming_gradient(case, grad, device):
    check_values(SOFTMAX, case, torch.float32, device, grad=grad)


@each(REPRESENTATIVE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
@FORMATS
def test_half_precision_sums_in_float32(case, dtype, layout, device):
    """Probabilities are not rounded to half precision on the way, as two separate kernels would."""
    check_values(SOFTMAX, case, dtype, device, maps=layout, strict=True)


@each(EMPTY)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_empty_batch(case, dtype, layout, device):
    check_empty_batch(SOFTMAX, case, dtype, device, layout)


def _check_logits(
    case: Case,
    logits: torch.Tensor,
    layout: str,
    device: torch.device,
    where: Tensors | None = None,
) -> Tensors:
    """Evaluate the case on these logits (in their dtype) against the truth; returns the results."""
    dtype = logits.dtype
    x = expected(SOFTMAX, case, dtype).tensors["input"]
    grad = expected(SOFTMAX, case, dtype).grad
    known = expectation(SOFTMAX, case, {"input": x, "logits": logits}, grad)
    tensors = {name: LAYOUTS[layout](t.to(device)) for name, t in known.tensors.items()}
    results = evaluate(SOFTMAX, functional, tensors, LAYOUTS[layout](grad.to(device)), case)
    compare(results, known, SOFTMAX, where=where)
    return results


def _signs(shape: tuple[int, ...]) -> torch.Tensor:
    """Random +1 and -1."""
    draws = torch.randint(0, 2, shape, generator=generator("signs", shape))
    return (2 * draws - 1).to(torch.float64)


@each(REPRESENTATIVE)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_huge_logits(case, dtype, layout, device):
    """+-10000, and the largest numbers of the dtype: exp of them overflows, their softmax not."""
    signs = _signs(case.weight_shape)
    noise = randn(*case.weight_shape, key="noise")
    _check_logits(case, (1e4 * signs + noise).to(dtype), layout, device)
    # 0.49: the difference of two of them must not overflow in PyTorch's own float32 either.
    ends = (0.49 * torch.finfo(dtype).max * signs).to(dtype)
    results = _check_logits(case, ends, layout, device)
    assert all(torch.isfinite(result).all() for result in results.values())


@each(REPRESENTATIVE)
@FORMATS
def test_the_whole_range_of_float16(case, layout, device):
    """-65504 beside +65504: the difference exists in float32 only."""
    ends = (65504 * _signs(case.weight_shape)).to(torch.float16)
    results = _check_logits(case, ends, layout, device)
    assert all(torch.isfinite(result).all() for result in results.values())


@each(REPRESENTATIVE)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_equal_logits_give_the_mean(case, dtype, layout, device):
    for level in (0.0, -1e4, 6e4):
        _check_logits(case, torch.full(case.weight_shape, level, dtype=dtype), layout, device)


@each(REPRESENTATIVE)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_minus_infinity_masks_a_tap(case, dtype, layout, device):
    """-inf is weight zero: finite results, and no gradient to the masked logits."""
    masked = torch.rand(case.weight_shape, generator=generator(case.name)) < 0.4
    # One tap of each position stays, a different one from position to position.
    kept = torch.randint(0, case.taps, case.weight_shape[:3] + (1,) + case.weight_shape[4:])
    masked.scatter_(3, kept, False)
    logits = expected(SOFTMAX, case, dtype).tensors["logits"]
    results = _check_logits(case, logits.masked_fill(masked, -torch.inf), layout, device)
    assert all(torch.isfinite(result).all() for result in results.values())
    assert (results["logits"].cpu()[masked] == 0).all()


@each(REPRESENTATIVE)
@pytest.mark.parametrize("all_of_them", [-torch.inf, torch.inf, torch.nan], ids=str)
@FORMATS
def test_a_position_without_a_softmax_stays_alone(case, all_of_them, layout, device):
    """All logits -inf (or +inf, or NaN) have no softmax: NaN there, and nowhere else."""
    logits = expected(SOFTMAX, case, torch.float32).tensors["logits"].clone()
    logits[0, 0, 0, :, 0, 0] = all_of_them
    logits[-1, -1, -1, :, -1, -1] = all_of_them
    results = _check_logits(case, logits, layout, device)
    sharing = case.channels // case.weight_channels
    assert torch.isnan(results["output"]).sum() == sharing * len(
        {(0, 0, 0, 0, 0), tuple(size - 1 for size in logits[:, :, :, 0].shape)}
    )


@each(REPRESENTATIVE)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", ["input", "logits"])
@FORMATS
def test_nonfinite_values_reach_only_their_window(case, poison, where, layout, device):
    known = expected(SOFTMAX, case, torch.float32)
    tensors = {name: t.clone() for name, t in known.tensors.items()}
    victim = tensors[where]
    if where == "input":
        victim[-1, -1, 0, -1] = victim[0, 0, -1, 0] = poison
    else:
        victim[-1, -1, -1, 0, 0, -1] = victim[0, 0, 0, -1, -1, 0] = poison
    known = expectation(SOFTMAX, case, tensors, known.grad)
    tensors = {name: LAYOUTS[layout](t.to(device)) for name, t in tensors.items()}
    results = evaluate(SOFTMAX, functional, tensors, known.grad.to(device), case)
    compare(results, known, SOFTMAX)


@each(REPRESENTATIVE)
def test_equals_softmax_then_aggregation(case, device):
    """The contract's definition with our own unfused function, gradients included."""
    known = expected(SOFTMAX, case, torch.float64)
    x, logits = (known.tensors[name].to(device).requires_grad_() for name in ("input", "logits"))
    unfused = functional.local_aggregation(x, logits.softmax(dim=3), **case.geometry)
    fused = functional.softmax_aggregation(x, logits, **case.geometry)
    grads = [torch.autograd.grad(y, (x, logits), known.grad.to(device)) for y in (unfused, fused)]
    pairs = zip(
        (unfused, *grads[0]), (fused, *grads[1]), ("output", "input", "logits"), strict=True
    )
    for separate, together, name in pairs:
        check(
            together,
            separate.detach().cpu(),
            name=f"fused against unfused {name}",
            magnitude=known.magnitude[name],
        )


def test_huge_logits_of_one_tap(device):
    """With one tap the probability is one, whatever the logit, and the logit gets no gradient."""
    case = CASES["k1"]
    known = expected(SOFTMAX, case, torch.float32)
    x = known.tensors["input"].to(device)
    logits = (1e30 * _signs(case.weight_shape)).to(device, torch.float32).requires_grad_()
    y = functional.softmax_aggregation(x, logits, **case.geometry)
    y.backward(known.grad.to(device))
    assert torch.equal(y, x)
    assert torch.equal(logits.grad, torch.zeros_like(logits))
