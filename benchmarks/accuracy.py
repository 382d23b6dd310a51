"""Is the result that is about to be timed right?

The truth is the pure-PyTorch reference in float64. What may be lost on the way is measured, not
chosen: a few times what the reference itself loses in the dtype of the contender.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OWN_LOSS, ROUNDINGS = 4, 2  # allowed: 4 times the loss of the reference, plus 2 roundings
SMALL = 1e-3  # of the largest tensor of a result: a smaller one is measured as if it were this


@dataclass(frozen=True)
class Accuracy:
    """The worst tensor of a result: its relative error and what was allowed."""

    error: float
    allowed: float

    def within(self, leeway: float = 1.0) -> bool:
        """Whether no more than `leeway` times what is allowed was lost."""
        return self.error <= leeway * self.allowed  # False for nan

    def __str__(self) -> str:
        return f"relative error {self.error:.2e}, allowed {self.allowed:.2e}"


@torch.no_grad()
def compare(
    results: Sequence[Tensor], truths: Sequence[Tensor], yardsticks: Sequence[Tensor]
) -> Accuracy:
    """`results` beside float64 `truths`; `yardsticks` are the reference's in the results' dtype.

    Errors are Euclidean, relative to the truth. A gradient that is zero up to rounding (a bias that
    a softmax cancels, a weight before a BatchNorm) is the noise of sums of larger terms and has no
    scale of its own, so none is taken for smaller than `SMALL`.
    Raises `ValueError` when number, shape or dtype of the results is not the reference's.
    """
    expected, found = ([(t.shape, t.dtype) for t in ts] for ts in (yardsticks, results))
    if expected != found:
        raise ValueError(f"result is {found}, the reference gives {expected}")
    sizes = [_norm(truth) for truth in truths]
    graded = []
    for result, truth, yardstick, size in zip(results, truths, yardsticks, sizes, strict=True):
        scale = max(size, SMALL * max(sizes)) or 1.0
        own_loss = _norm(yardstick - truth) / scale
        allowed = OWN_LOSS * own_loss + ROUNDINGS * torch.finfo(result.dtype).eps
        graded.append(Accuracy(_norm(result - truth) / scale, allowed))
    return max(graded, key=lambda a: math.inf if math.isnan(a.error) else a.error / a.allowed)


def as_one(results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The first tensor, and all others as one vector.

    For gradients of whole networks: of hundreds of tensors, some are off by more than the
    reference's by chance.
    """
    first, *others = results
    return (first, torch.cat([t.flatten() for t in others])) if others else (first,)


def _norm(tensor: Tensor) -> float:
    """Euclidean, in float64; nan and inf stay visible."""
    return torch.linalg.vector_norm(tensor.double()).item()
