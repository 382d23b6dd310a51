"""What each function must compute: inputs, float64 truth, PyTorch's own error, magnitudes of sums.

The truth is `cotnet_ext.reference` in float64 on the CPU. Results are cached for the session, so
tests of values, layouts, devices and thread counts share one evaluation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import Case, randn

from cotnet_ext import reference

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Function:
    """One public function as the tests see it.

    Attributes:
        name: its name in `functional` and `reference`.
        arguments: names of its tensor arguments, in order; the first one is the map whose memory
            format the result keeps.
        make: case -> float64 values of the arguments.
        magnitudes: (arguments, gradient of the output, case), all float64 -> for "output" and each
            argument, the sum of absolute values of the terms behind the output or the gradient.
        windowed: whether it takes the geometry of a window.
    """

    name: str
    arguments: tuple[str, ...]
    make: Callable[[Case], Tensors]
    magnitudes: Callable[[Tensors, torch.Tensor, Case], Tensors]
    windowed: bool

    def call(self, module: Any, tensors: Tensors, case: Case) -> torch.Tensor:
        """Evaluate the function of this name in `module` on these arguments."""
        function = getattr(module, self.name)
        geometry = case.geometry if self.windowed else {}
        return function(*(tensors[name] for name in self.arguments), **geometry)

    def output_shape(self, case: Case) -> tuple[int, ...]:
        return case.output_shape if self.windowed else case.input_shape

    def __str__(self) -> str:
        return self.name


# --- arguments -----------------------------------------------------------------------------------


def _local_arguments(case: Case) -> Tensors:
    return {
        "input": randn(*case.input_shape, key=(case.name, "input")),
        "weight": randn(*case.weight_shape, key=(case.name, "weight")),
    }


def _softmax_arguments(case: Case) -> Tensors:
    # Spread enough that some probabilities are near one and some near zero.
    logits = 3 * randn(*case.weight_shape, key=(case.name, "logits"))
    return {"input": randn(*case.input_shape, key=(case.name, "input")), "logits": logits}


def _norm_arguments(case: Case) -> Tensors:
    # Groups differ in mean and spread, as the output of a convolution does.
    shape = (case.batch, case.heads, case.weight_channels, 1, 1, 1)
    spread = randn(*shape, key=(case.name, "spread")).exp()
    weight = randn(*case.weight_shape, key=(case.name, "weight")) * spread
    return {
        "input": randn(*case.input_shape, key=(case.name, "input")),
        "weight": weight + randn(*shape, key=(case.name, "mean")),
        "norm_weight": 1 + randn(case.norm_size, key=(case.name, "norm_weight")) / 2,
        "norm_bias": randn(case.norm_size, key=(case.name, "norm_bias")) / 2,
    }


def _gate_arguments(case: Case) -> Tensors:
    names = ("logits", "value", "static")
    maps = {name: randn(*case.input_shape, key=(case.name, name)) for name in names}
    maps["logits"] = 3 * maps["logits"]
    return maps


def _fusion_arguments(case: Case) -> Tensors:
    return {
        "dynamic": randn(*case.input_shape, key=(case.name, "dynamic")),
        "static": randn(*case.input_shape, key=(case.name, "static")),
        "logits": 2 * randn(case.batch, case.channels, 2, key=(case.name, "logits")),
    }


# --- magnitudes ----------------------------------------------------------------------------------


def _aggregate_absolutes(x, weight, grad, case: Case) -> tuple[torch.Tensor, ...]:
    """|weight| * |x| summed over taps, and the same for the two gradients."""
    x, weight = (t.detach().abs().requires_grad_() for t in (x, weight))
    output = reference.local_aggregation(x, weight, **case.geometry)
    return output.detach(), *torch.autograd.grad(output, (x, weight), grad.abs())


def _inexact_softmax(logits: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
    """Probabilities scaled by the roundings they suffer.

    exp(d) is off by |d| roundings. The denominator is a sum of n positive terms, which taken one
    after the other is off by sqrt(n)/6 roundings in the root of the mean square.
    """
    top = logits.amax(dim, keepdim=True)
    distance = torch.nan_to_num(top - logits, nan=0.0).clamp(max=100.0)
    p = (logits - top).exp()
    terms = logits.numel() / max(1, top.numel())
    return torch.nan_to_num(p / p.sum(dim, keepdim=True)) * (1 + distance + terms**0.5 / 6)


def _local_magnitudes(t: Tensors, grad: torch.Tensor, case: Case) -> Tensors:
    output, grad_input, grad_weight = _aggregate_absolutes(t["input"], t["weight"], grad, case)
    return {"output": output, "input": grad_input, "weight": grad_weight}


def _softmax_magnitudes(t: Tensors, grad: torch.Tensor, case: Case) -> Tensors:
    p = _inexact_softmax(t["logits"], 3)
    output, grad_input, grad_p = _aggregate_absolutes(t["input"], p, grad, case)
    grad_logits = p * (grad_p + (p * grad_p).sum(3, keepdim=True))
    return {"output": output, "input": grad_input, "logits": grad_logits}


def _norm_magnitudes(t: Tensors, grad: torch.Tensor, case: Case, eps: float = 1e-5) -> Tensors:
    weight = t["weight"]
    group = (3, 4, 5)
    affine = (1, case.heads, case.weight_channels, case.taps, 1, 1)
    mean = weight.mean(group, keepdim=True)
    rstd = (weight.var(group, unbiased=False, keepdim=True) + eps).rsqrt()
    # (weight - mean) * rstd with the subtraction replaced by a sum.
    normal = (weight.abs() + mean.abs()) * rstd
    gamma = t["norm_weight"].abs().view(affine)
    w_hat = normal * gamma + t["norm_bias"].abs().view(affine)
    output, grad_input, grad_hat = _aggregate_absolutes(t["input"], w_hat, grad, case)
    inner = grad_hat * gamma
    outer = inner.mean(group, keepdim=True)
    outer = outer + normal * (inner * normal).mean(group, keepdim=True)
    return {
        "output": output,
        "input": grad_input,
        "weight": rstd * (inner + outer),
        "norm_weight": (grad_hat * normal).sum((0, 4, 5)).flatten(),
        "norm_bias": grad_hat.sum((0, 4, 5)).flatten(),
    }


def _gate_magnitudes(t: Tensors, grad: torch.Tensor, case: Case) -> Tensors:
    p = _inexact_softmax(t["logits"], (2, 3))
    grad, value = grad.abs(), t["value"].abs()
    pull = grad * value
    return {
        "output": t["static"].abs() + p * value,
        "logits": p * (pull + (p * pull).sum((2, 3), keepdim=True)),
        "value": p * grad,
        "static": grad,
    }


def _fusion_magnitudes(t: Tensors, grad: torch.Tensor, case: Case) -> Tensors:
    p = _inexact_softmax(t["logits"], 2)
    maps = torch.stack((t["dynamic"].abs(), t["static"].abs()), 2)
    spread = p[..., None, None]
    pull = (grad.abs()[:, :, None] * maps).sum((3, 4))
    grads = grad.abs()[:, :, None] * spread
    return {
        "output": (spread * maps).sum(2),
        "dynamic": grads[:, :, 0],
        "static": grads[:, :, 1],
        "logits": p * (pull + (p * pull).sum(2, keepdim=True)),
    }


LOCAL = Function(
    "local_aggregation", ("input", "weight"), _local_arguments, _local_magnitudes, True
)
SOFTMAX = Function(
    "softmax_aggregation", ("input", "logits"), _softmax_arguments, _softmax_magnitudes, True
)
NORM = Function(
    "group_norm_aggregation",
    ("input", "weight", "norm_weight", "norm_bias"),
    _norm_arguments,
    _norm_magnitudes,
    True,
)
GATE = Function(
    "spatial_softmax_gate",
    ("logits", "value", "static"),
    _gate_arguments,
    _gate_magnitudes,
    False,
)
FUSION = Function(
    "context_fusion",
    ("dynamic", "static", "logits"),
    _fusion_arguments,
    _fusion_magnitudes,
    False,
)
FUNCTIONS = (LOCAL, SOFTMAX, NORM, GATE, FUSION)
EACH_FUNCTION = pytest.mark.parametrize("function", FUNCTIONS, ids=str)


# --- truth ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """Everything known about one function on one case in one dtype.

    Attributes:
        tensors: the arguments in the dtype, `grad` the gradient of the output in the dtype.
        truth: float64 output (key "output") and gradients (keys as in `tensors`).
        same: what plain PyTorch gives for them in the dtype.
        magnitude: see `Function.magnitudes`.
    """

    tensors: Tensors
    grad: torch.Tensor
    truth: Tensors
    same: Tensors
    magnitude: Tensors


def evaluate(
    function: Function, module: Any, tensors: Tensors, grad: torch.Tensor, case: Case
) -> Tensors:
    """Output and all gradients of one function, as {"output": ..., argument: gradient, ...}.

    Tensors are detached first; strides stay as they are.
    """
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    output = function.call(module, leaves, case)
    grads = torch.autograd.grad(output, list(leaves.values()), grad)
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def to_float64(tensors: Tensors) -> Tensors:
    return {name: t.to(torch.float64) for name, t in tensors.items()}


def expectation(function: Function, case: Case, tensors: Tensors, grad: torch.Tensor) -> Expected:
    """Truth, PyTorch's result in the same dtype, and magnitudes, for the given arguments."""
    exact = to_float64(tensors)
    exact_grad = grad.to(torch.float64)
    return Expected(
        tensors=tensors,
        grad=grad,
        truth=evaluate(function, reference, exact, exact_grad, case),
        same=evaluate(function, reference, tensors, grad, case),
        magnitude=function.magnitudes(exact, exact_grad, case),
    )


@functools.lru_cache(maxsize=512)
def expected(function: Function, case: Case, dtype: torch.dtype) -> Expected:
    """The cached expectation on the standard random arguments. Treat it as read-only."""
    tensors = {name: t.to(dtype) for name, t in function.make(case).items()}
    grad = randn(*function.output_shape(case), dtype=dtype, key=(case.name, function.name, "grad"))
    return expectation(function, case, tensors, grad)
