"""BatchNorm, and ReLU behind it, as one differentiable function of a map.

Modules one by one read the map three times and write it twice; this reads it twice and writes it
once, forward and, with the gradient, backward. Only the map before the norm is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn import functional as F

from . import _ops
from ._batch_norm import Norm, norm_of, uses_batch
from ._ops import below_autograd as _run
from ._plain import is_plain


def can_normalise(module: nn.Module, x: Tensor) -> bool:
    """Whether `norm_relu` is what `module(x)` does, and its gradient is recorded."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and is_plain(module, nn.BatchNorm2d)
        and type(x) is Tensor
        and x.dim() == 4
        and x.device.type in ("cpu", "cuda")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and _fits(module, x)
    )


def _fits(module: nn.BatchNorm2d, x: Tensor) -> bool:
    return (
        x.shape[1] == module.num_features
        and x.numel() // max(x.shape[1], 1) > (1 if uses_batch(module) else 0)
        and suits(module, x)
        and any(t is not None and t.requires_grad for t in (x, module.weight, module.bias))
    )


def suits(module: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether what the module holds is where `x` is, and of its dtype or float32."""
    given = (module.weight, module.bias, module.running_mean)
    return all(
        t is None or t.dtype in (x.dtype, torch.float32) and t.device == x.device for t in given
    )


def norm_relu(module: nn.BatchNorm2d, x: Tensor, relu: bool) -> Tensor:
    """`module(x)`, or with `relu` its positive part; running statistics move as by `module(x)`."""
    return _NormRelu.apply(module, relu, x, module.weight, module.bias)


class _NormRelu(Function):
    @staticmethod
    def forward(ctx, module, relu, x, weight, bias):
        norm = norm_of(module, x, weight, bias)
        ctx.relu, ctx.norm, ctx.eps = relu, norm, module.eps
        ctx.save_for_backward(x, weight, bias)
        return _run(_ops.batch_norm, x, norm.table, relu)

    @staticmethod
    @_ops.gradient_by_gradient
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        if _ops.must_compose():

            def composed(*places):
                y = composed_norm(ctx.norm, ctx.eps, *places)
                return y.relu() if ctx.relu else y

            needs = ctx.needs_input_grad[2:]
            grads = composed_gradients(composed, (x, weight, bias), needs, (grad,))
        else:
            norm = ctx.norm
            grads = _run(
                _ops.batch_norm_backward, grad, x, norm.table, norm.factor, ctx.relu, norm.batch
            )
        needed = zip(ctx.needs_input_grad[2:], grads, (x, weight, bias), strict=True)
        return None, None, *(g.to(t.dtype) if need else None for need, g, t in needed)


def composed_gradients(
    function: Callable,
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of a function as functions that can be differentiated again, or mapped over.

    `grads` are those of its results, None where nobody asks for one; None comes back where a
    tensor has no part in the others.
    """
    with torch.enable_grad():
        places = [None if t is None else t.view_as(t) for t in tensors]
        results = function(*places)
    results = [results] if isinstance(results, Tensor) else results
    asked = [(y, grad) for y, grad in zip(results, grads, strict=True) if grad is not None]
    wanted = [t for t, need in zip(places, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in asked], wanted, [grad for _, grad in asked],
            create_graph=True, allow_unused=True,
        )
    )  # fmt: skip
    return tuple(next(found) if need else None for need in needs)


def composed_norm(
    norm: Norm, eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """What the module did to `x`, of functions that can be differentiated."""
    if norm.batch:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    mean, _, _ = norm.table
    factor = norm.factor if weight is None else norm.factor * weight
    shift = 0 if bias is None else bias[:, None, None]
    return ((x - mean[:, None, None]) * factor[:, None, None] + shift).to(x.dtype)
