"""Values and gradients of `group_norm_aggregation`, with and without affine, on hard statistics."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, EMPTY, FILLED, REPRESENTATIVE, dtype_id, each, randn
from checks import check_empty_batch, check_values, compare
from layouts import FORMATS, LAYOUTS, MIXED
from oracle import NORM, Expected, evaluate, expectation, expected
from tolerances import DTYPES, check

from cotnet_ext import functional, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@each(FILLED)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_values_and_gradients(case, dtype, layout, device):
    check_values(NORM, case, dtype, device, maps=layout, grad=layout)


@each(REPRESENTATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(("maps", "weights"), MIXED)
def test_layouts(case, dtype, maps, weights, device):
    check_values(NORM, case, dtype, device, maps=maps, others=weights)


@each(CASES[name] for name in ("odd_9x11", "heads3", "reflect"))
@pytest.mark.parametrize("grad", LAYOUTS)
def test_layouts_of_the_incoming_gradient(case, grad, device):
    check_values(NORM, case, torch.float32, device, grad=grad)


@each(REPRESENTATIVE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
@FORMATS
def test_half_precision_sums_in_float32(case, dtype, layout, device):
    """The normalised weights are not rounded to half precision on the way."""
    check_values(NORM, case, dtype, device, maps=layout, strict=True)


@each(EMPTY)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_empty_batch(case, dtype, layout, device):
    check_empty_batch(NORM, case, dtype, device, layout)


@each(REPRESENTATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize(
    "given", [(), ("norm_weight",), ("norm_bias",)], ids=["plain", "weight_only", "bias_only"]
)
@FORMATS
def test_affine_parameters_are_optional(case, dtype, given, layout, device):
    """None stands for ones and zeros, and nothing else changes."""
    known = expected(NORM, case, dtype)
    neutral = {
        "norm_weight": torch.ones(case.norm_size, dtype=dtype),
        "norm_bias": torch.zeros(case.norm_size, dtype=dtype),
    }
    kept = {name: known.tensors[name] for name in given}
    known = expectation(NORM, case, {**known.tensors, **neutral, **kept}, known.grad)
    leaves = {
        name: LAYOUTS[layout](known.tensors[name].to(device)).requires_grad_()
        for name in ("input", "weight", *given)
    }
    affine = {name: leaves.get(name) for name in neutral}
    y = functional.group_norm_aggregation(
        leaves["input"], leaves["weight"], **affine, **case.geometry
    )
    grads = torch.autograd.grad(y, list(leaves.values()), known.grad.to(device))
    compare({"output": y, **dict(zip(leaves, grads, strict=True))}, known, NORM)


def _check_weight(case, weight: torch.Tensor, layout: str, device, factor_of=NORM) -> None:
    """Evaluate the case on these raw weights (in their dtype) against the truth."""
    standard = expected(NORM, case, weight.dtype)
    tensors = {**standard.tensors, "weight": weight}
    known = expectation(NORM, case, tensors, standard.grad)
    results = _evaluate(known, case, layout, device)
    compare(results, known, NORM)


def _evaluate(known: Expected, case, layout: str, device):
    tensors = {name: LAYOUTS[layout](t.to(device)) for name, t in known.tensors.items()}
    return evaluate(NORM, functional, tensors, LAYOUTS[layout](known.grad.to(device)), case)


@each(REPRESENTATIVE)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@FORMATS
def test_mean_far_from_zero(case, dtype, layout, device):
    """A mean a thousand times the spread: E[w*w] - E[w]**2 would leave no digit in float32."""
    scale = 1000 if dtype in (torch.float64, torch.float32) else 30
    weight = scale + expected(NORM, case, torch.float64).tensors["weight"]
    _check_weight(case, weight.to(dtype), layout, device)


@each(REPRESENTATIVE)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("level", [0.0, 3.0], ids=str)
@FORMATS
def test_constant_weights(case, dtype, level, layout, device):
    """Without variance eps alone keeps the norm finite; the output is the bias aggregated."""
    _check_weight(case, torch.full(case.weight_shape, level, dtype=dtype), layout, device)


@each(REPRESENTATIVE)
@FORMATS
def test_squares_beyond_float16(case, layout, device):
    """Weights up to 60000 in float16, whose squares need float32."""
    weight = randn(*case.weight_shape, key="large").clamp(-3, 3) * 2e4
    _check_weight(case, weight.to(torch.float16), layout, device)


@each(CASES[name] for name in ("odd_9x11", "k1", "map_1x1"))
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1, 1.0])
def test_eps(case, eps, device):
    known = expected(NORM, case, torch.float64)
    tensors = {name: t.to(device) for name, t in known.tensors.items()}
    values = list(tensors.values())
    truth = reference.group_norm_aggregation(*known.tensors.values(), eps, **case.geometry)
    magnitude = NORM.magnitudes(known.tensors, known.grad, case, eps)["output"]
    by_position = functional.group_norm_aggregation(*values, eps, **case.geometry)
    by_name = functional.group_norm_aggregation(*values, eps=eps, **case.geometry)
    check(by_position, truth, name=f"eps {eps}", magnitude=magnitude)
    assert torch.equal(by_position, by_name)


def test_groups_are_the_taps_of_one_weight_channel(device):
    """Scaling one weight channel of one sample, before the norm, changes nothing anywhere."""
    case = CASES["heads3"]
    known = expected(NORM, case, torch.float64)
    tensors = {name: t.to(device, copy=True) for name, t in known.tensors.items()}
    before = NORM.call(functional, tensors, case)
    tensors["weight"][0, 1, 2] *= 1e3
    tensors["weight"][0, 1, 2] += 7
    after = NORM.call(functional, tensors, case)
    # eps shifts the variance of that group by parts in a hundred thousand.
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4)
    tensors["weight"][0, 1, 2, 0] *= 2
    assert not torch.allclose(before, NORM.call(functional, tensors, case), rtol=1e-2, atol=1e-2)


@each(REPRESENTATIVE)
@pytest.mark.parametrize("where", ["input", "weight"])
@FORMATS
def test_nan_stays_in_its_window_and_group(case, where, layout, device):
    """A NaN in the input reaches its windows, one in the weights the group that shares its norm."""
    standard = expected(NORM, case, torch.float32)
    tensors = {name: t.clone() for name, t in standard.tensors.items()}
    tensors[where].select(1, -1)[-1].flatten()[-1:] = torch.nan
    known = expectation(NORM, case, tensors, standard.grad)
    compare(_evaluate(known, case, layout, device), known, NORM)


@each(REPRESENTATIVE)
def test_equals_group_norm_then_aggregation(case, device):
    """The contract's definition, with PyTorch's GroupNorm and our own unfused function."""
    known = expected(NORM, case, torch.float64)
    names = list(known.tensors)
    leaves = [known.tensors[name].to(device).requires_grad_() for name in names]
    x, weight, norm_weight, norm_bias = leaves
    flat = weight.flatten(1, 3)
    groups = case.heads * case.weight_channels
    w_hat = torch.nn.functional.group_norm(flat, groups, norm_weight, norm_bias)
    unfused = functional.local_aggregation(x, w_hat.view_as(weight), **case.geometry)
    fused = functional.group_norm_aggregation(*leaves, **case.geometry)
    grads = [torch.autograd.grad(y, leaves, known.grad.to(device)) for y in (unfused, fused)]
    for separate, together, name in zip(
        (unfused, *grads[0]), (fused, *grads[1]), ("output", *names), strict=True
    ):
        check(
            together,
            separate.detach().cpu(),
            name=f"fused against unfused {name}",
            magnitude=known.magnitude[name],
        )
