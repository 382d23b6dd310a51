"""The one rule by which every numerical test decides.

An element passes when

    |actual - truth| <= FACTOR * (largest error of the plain PyTorch reference in the same dtype)
                        + eps(dtype) * |truth|
                        + ROUNDINGS * eps(accumulation dtype) * magnitude

`truth` is the reference in float64 on the same (already rounded) inputs. The first term says
"not worse than PyTorch itself", the second is the rounding of the stored result, and the third is
the rounding of sums in the accumulation dtype: `magnitude` is the same sum with every term replaced
by its absolute value, so cancellation is judged fairly and a wrong term is never forgiven.

NaN and infinities are sticky: where the truth is finite the result must be finite, where it is NaN
it must be NaN, where it is infinite it must be the same infinity. A comparison with NaN is never
allowed to look like a small error.
"""

from __future__ import annotations

import torch

# How many times PyTorch's own error in the same dtype a result may be off. Two independent
# roundings of one number differ by up to twice the error of each.
FACTOR = 2.0

# Roundings of the accumulation dtype granted per unit of magnitude. Sums here have at most a few
# thousand terms of random sign, whose accumulated rounding stays below one; the rest covers exp,
# rsqrt and the rounding of intermediate factors.
ROUNDINGS = 4.0

# The truth itself is float64, so a float64 result is compared with something equally inexact.
ROUNDINGS_FLOAT64 = 16.0

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of this dtype are taken: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bound(
    truth: torch.Tensor,
    dtype: torch.dtype,
    *,
    magnitude: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
    factor: float = FACTOR,
) -> torch.Tensor:
    """The largest admissible error of each element, as a float64 tensor of truth's shape.

    Args:
        truth: float64 values.
        dtype: dtype of the result under test.
        magnitude: the sum of absolute terms behind each element (default: `|truth|`).
        reference: the plain PyTorch result in `dtype`; without it only rounding is admitted.
        factor: multiple of the reference's largest error that is admitted.
    """
    magnitude = truth.abs() if magnitude is None else magnitude.abs()
    roundings = ROUNDINGS_FLOAT64 if dtype == torch.float64 else ROUNDINGS
    # The smallest subnormal: a result below it may be flushed either way.
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    limit = torch.finfo(dtype).eps * truth.abs()
    limit = limit + roundings * torch.finfo(accumulation_dtype(dtype)).eps * magnitude + tiny
    if reference is not None:
        error = (reference.to(torch.float64) - truth).abs()
        error = error[torch.isfinite(error)]
        if error.numel():
            limit = limit + factor * error.max()
    return limit


def check(
    actual: torch.Tensor,
    truth: torch.Tensor,
    *,
    name: str,
    dtype: torch.dtype | None = None,
    magnitude: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
    factor: float = FACTOR,
    where: torch.Tensor | None = None,
) -> None:
    """Assert that `actual` is `truth` within the rule of this file.

    Args:
        actual: result under test, any device and layout.
        truth: the float64 reference.
        name: what is compared, for the message ("softmax_aggregation grad logits").
        dtype: the dtype `actual` must have (default: the reference's, else the one it has).
        magnitude, reference, factor: see `bound`.
        where: boolean mask of the elements to compare (default: all).
    """
    if dtype is None:
        dtype = actual.dtype if reference is None else reference.dtype
    assert isinstance(actual, torch.Tensor), f"{name}: expected a tensor, got {type(actual)}"
    assert actual.dtype == dtype, f"{name}: expected {dtype}, got {actual.dtype}"
    assert actual.shape == truth.shape, (
        f"{name}: expected shape {list(truth.shape)}, got {list(actual.shape)}"
    )
    assert truth.dtype == torch.float64, f"{name}: the truth must be float64, got {truth.dtype}"
    got = actual.detach().to("cpu", torch.float64)
    truth = truth.detach()
    limit = bound(truth, dtype, magnitude=magnitude, reference=reference, factor=factor)
    overflow = torch.finfo(dtype).max
    error = (got - truth).abs()
    ok = error <= limit  # False for any NaN
    ok |= torch.isnan(truth) & torch.isnan(got)
    # Infinity is right where the truth is infinite, or too large for the dtype.
    infinite = torch.isinf(truth) | (truth.abs() + limit > overflow)
    ok |= infinite & torch.isinf(got) & (got.sign() == truth.sign())
    if where is not None:
        ok |= ~where
    if bool(ok.all()):
        return
    raise AssertionError(_message(name, got, truth, reference, error, limit, ok))


def _message(name, got, truth, reference, error, limit, ok) -> str:
    """Say how many elements are off, and show the worst one with everything known about it."""
    ratio = torch.where(ok, torch.zeros_like(error), error / limit)
    ratio = torch.where(~ok & ~torch.isfinite(ratio), torch.full_like(ratio, torch.inf), ratio)
    worst = int(ratio.flatten().argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape)]
    lines = [
        f"{name}: {int((~ok).sum())} of {ok.numel()} elements are off, the worst at {index}",
        f"  got {got.flatten()[worst]:.9g}, expected {truth.flatten()[worst]:.9g}"
        + (
            ""
            if reference is None
            else f", PyTorch in this dtype {reference.flatten()[worst].double():.9g}"
        ),
        f"  error {error.flatten()[worst]:.3g}, allowed {limit.flatten()[worst]:.3g}"
        f" ({ratio.flatten()[worst]:.3g} times)",
        f"  not finite: got {int((~torch.isfinite(got)).sum())},"
        f" expected {int((~torch.isfinite(truth)).sum())}",
    ]
    return "\n".join(lines)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Assert that two tensors agree bit by bit (NaN included)."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = [t.detach().contiguous().view(integer[t.element_size()]) for t in (actual, expected)]
    different = int((bits[0] != bits[1]).sum())
    assert different == 0, f"{name}: {different} of {actual.numel()} elements differ in bits"


def exact(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the rounding of float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
