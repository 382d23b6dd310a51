"""Derivatives: one ``torch.autograd.Function`` per operator.

``local_aggregation`` is bilinear, and so are its two gradients; every derivative of the three is
one of the three, so three kernels give derivatives of any order:

    A(x, w)    local_aggregation               d/dx = X(g, w)    d/dw = W(g, x)
    X(g, w)    local_aggregation_grad_input    d/dg = A(a, w)    d/dw = W(g, a)
    W(g, x)    local_aggregation_grad_weight   d/dg = A(x, b)    d/dx = X(g, b)

The other operators have one fused backward each. What is differentiated beyond that, a backward
again or anything in forward mode, is the same function composed from the family and PyTorch's own
operators (``composed_*``).

Each class's ``backward`` and ``setup_context`` are registered for the raw operator as well, so that
a direct ``torch.ops.cotnet_ext.*`` call and a compiled graph are differentiated by the same lines.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function

from . import _ops


class _Leaf(tuple):
    """A tuple that PyTorch's pytrees take for one leaf: a ``Function`` under ``vmap`` cannot be
    given nested ones."""

    __slots__ = ()


class _Function(Function):
    """A ``Function`` whose ``apply`` does not bind its arguments to a signature first, which every
    call with ``setup_context`` otherwise pays for with some 10 microseconds. All arguments are
    positional and have no defaults."""

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *args):
        args = tuple([_Leaf(arg) if type(arg) is tuple else arg for arg in args])
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(Function, cls).apply(*unwrap_dead_wrappers(args))


_NO_WINDOW = (None,) * 5  # gradients of kernel_size, stride, padding, dilation, padding_mode


def _sum(*terms: Tensor | None) -> Tensor | None:
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0]) if given else None


# ---- the bilinear family -------------------------------------------------------------------------
# A derivative that is absent stays None instead of becoming zeros, so that no kernel runs for it.


def _a(x: Tensor | None, w: Tensor | None, window: tuple) -> Tensor | None:
    return None if x is None or w is None else LocalAggregation.apply(x, w, *window)


def _x(g: Tensor | None, w: Tensor | None, size: tuple, window: tuple) -> Tensor | None:
    return None if g is None or w is None else LocalAggregationGradInput.apply(g, w, size, *window)


def _w(g: Tensor | None, x: Tensor | None, channels: int, window: tuple) -> Tensor | None:
    return (
        None
        if g is None or x is None
        else LocalAggregationGradWeight.apply(g, x, channels, *window)
    )


def _both(
    g: Tensor, x: Tensor, w: Tensor, needs: tuple, window: tuple
) -> tuple[Tensor | None, Tensor | None]:
    """X(g, w) and W(g, x), whichever are needed: one sweep over the three tensors when both are."""
    if needs[0] and needs[1]:
        return LocalAggregationBackward.apply(g, x, w, *window)
    return (
        _x(g, w, tuple(x.shape[2:]), window) if needs[0] else None,
        _w(g, x, w.shape[2], window) if needs[1] else None,
    )


class LocalAggregation(_Function):
    @staticmethod
    def forward(input, weight, *window):
        return _ops.below_autograd(_ops.local_aggregation, input, weight, *window)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, *ctx.window = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight)
        ctx.save_for_forward(input, weight)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, *_NO_WINDOW
        input, weight = ctx.saved_tensors
        return *_both(grad, input, weight, ctx.needs_input_grad, ctx.window), *_NO_WINDOW

    @staticmethod
    def jvp(ctx, input_t, weight_t, *_):
        input, weight = ctx.saved_tensors
        return _sum(_a(input_t, weight, ctx.window), _a(input, weight_t, ctx.window))


class LocalAggregationGradInput(_Function):
    @staticmethod
    def forward(grad, weight, input_size, *window):
        return _ops.below_autograd(
            _ops.local_aggregation_grad_input, grad, weight, input_size, *window
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, weight, ctx.input_size, *ctx.window = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, weight)
        ctx.save_for_forward(grad, weight)

    @staticmethod
    def backward(ctx, cotangent):
        grad, weight = ctx.saved_tensors
        return (
            _a(cotangent, weight, ctx.window) if ctx.needs_input_grad[0] else None,
            _w(grad, cotangent, weight.shape[2], ctx.window) if ctx.needs_input_grad[1] else None,
            None,
            *_NO_WINDOW,
        )

    @staticmethod
    def jvp(ctx, grad_t, weight_t, *_):
        grad, weight = ctx.saved_tensors
        size, window = ctx.input_size, ctx.window
        return _sum(_x(grad_t, weight, size, window), _x(grad, weight_t, size, window))


class LocalAggregationGradWeight(_Function):
    @staticmethod
    def forward(grad, input, weight_channels, *window):
        return _ops.below_autograd(
            _ops.local_aggregation_grad_weight, grad, input, weight_channels, *window
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, input, ctx.weight_channels, *ctx.window = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, input)
        ctx.save_for_forward(grad, input)

    @staticmethod
    def backward(ctx, cotangent):
        grad, input = ctx.saved_tensors
        return (
            _a(input, cotangent, ctx.window) if ctx.needs_input_grad[0] else None,
            _x(grad, cotangent, tuple(input.shape[2:]), ctx.window)
            if ctx.needs_input_grad[1]
            else None,
            None,
            *_NO_WINDOW,
        )

    @staticmethod
    def jvp(ctx, grad_t, input_t, *_):
        grad, input = ctx.saved_tensors
        channels, window = ctx.weight_channels, ctx.window
        return _sum(_w(grad_t, input, channels, window), _w(grad, input_t, channels, window))


class LocalAggregationBackward(_Function):
    """(X(g, w), W(g, x)) in one sweep."""

    @staticmethod
    def forward(grad, input, weight, *window):
        return _ops.below_autograd(_ops.local_aggregation_backward, grad, input, weight, *window)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, input, weight, *ctx.window = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, input, weight)
        ctx.save_for_forward(grad, input, weight)

    @staticmethod
    def backward(ctx, a, b):
        grad, input, weight = ctx.saved_tensors
        needs, window = ctx.needs_input_grad, ctx.window
        return (
            _sum(_a(a, weight, window), _a(input, b, window)) if needs[0] else None,
            _x(grad, b, tuple(input.shape[2:]), window) if needs[1] else None,
            _w(grad, a, weight.shape[2], window) if needs[2] else None,
            *_NO_WINDOW,
        )

    @staticmethod
    def jvp(ctx, grad_t, input_t, weight_t, *_):
        grad, input, weight = ctx.saved_tensors
        size, channels, window = tuple(input.shape[2:]), weight.shape[2], ctx.window
        return (
            _sum(_x(grad_t, weight, size, window), _x(grad, weight_t, size, window)),
            _sum(_w(grad_t, input, channels, window), _w(grad, input_t, channels, window)),
        )


# ---- operators, composed -------------------------------------------------------------------------


def composed_local_aggregation(input, weight, *window):
    if not torch.compiler.is_compiling():
        return LocalAggregation.apply(input, weight, *window)
    # A compiler can trace neither a Function's jvp nor forward mode through a registered operator:
    # one shifted map per tap, in PyTorch's own operators.
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), mode = window
    _, _, cw, _, ho, wo = weight.shape
    padded = F.pad(input, (pw, pw, ph, ph), mode="constant" if mode == "zeros" else mode)
    total = 0
    for u in range(kh):
        for v in range(kw):
            rows = slice(u * dh, u * dh + (ho - 1) * sh + 1, sh)
            columns = slice(v * dw, v * dw + (wo - 1) * sw + 1, sw)
            shifted = padded[:, :, rows, columns].unflatten(1, (-1, cw))
            total = total + weight[:, :, None, :, u * kw + v] * shifted[:, None]
    return total.flatten(1, 3)


def composed_softmax_aggregation(input, logits, *window):
    return composed_local_aggregation(input, logits.softmax(3), *window)


def composed_group_norm_aggregation(input, weight, norm_weight, norm_bias, eps, *window):
    # Mean and variance by hand: torch.group_norm of a channels_last tensor has no second
    # derivative, and its statistics lose all digits when the mean is large.
    _, g, cw, k, _, _ = weight.shape
    wide = weight if weight.dtype == torch.float64 else weight.float()
    centred = wide - wide.mean((3, 4, 5), keepdim=True)
    normed = centred * (centred.square().mean((3, 4, 5), keepdim=True) + eps).rsqrt()
    if norm_weight is not None:
        normed = normed * norm_weight.view(g, cw, k, 1, 1)
    if norm_bias is not None:
        normed = normed + norm_bias.view(g, cw, k, 1, 1)
    return composed_local_aggregation(input, normed.to(weight.dtype), *window)


def composed_spatial_softmax_gate(logits, value, static):
    return static + logits.flatten(2).softmax(2).view(logits.shape) * value


def composed_context_fusion(dynamic, static, logits):
    chances = logits.softmax(2)[:, :, None, None]
    return chances[..., 0] * dynamic + chances[..., 1] * static


def _second_order(
    composed: Callable[..., Tensor],
    grad: Tensor,
    inputs: tuple[Tensor, ...],
    asked: tuple[bool, ...],
    cotangents: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Gradients for (grad, *inputs) of the backward of ``composed``, of which the outputs in
    ``asked`` were computed."""

    def backward(grad, *inputs):
        grads = torch.func.vjp(composed, *inputs)[1](grad)
        return tuple(g for g, wanted in zip(grads, asked, strict=True) if wanted)

    _, pull_back = torch.func.vjp(backward, grad, *inputs)
    return pull_back(tuple(c for c, wanted in zip(cotangents, asked, strict=True) if wanted))


def _only(asked: tuple[bool, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return tuple(grad if wanted else None for grad, wanted in zip(grads, asked, strict=True))


# ---- fused operators -----------------------------------------------------------------------------


class SoftmaxAggregation(_Function):
    """Saves input and logits; the probabilities are computed again where the backward needs
    them."""

    @staticmethod
    def forward(input, logits, *window):
        return _ops.below_autograd(_ops.softmax_aggregation, input, logits, *window)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, logits, *ctx.window = inputs
        ctx.save_for_backward(input, logits)

    @staticmethod
    def backward(ctx, grad):
        asked = tuple(ctx.needs_input_grad[:2])
        grads = SoftmaxAggregationBackward.apply(grad, *ctx.saved_tensors, *ctx.window, asked)
        return *_only(asked, grads), *_NO_WINDOW


class SoftmaxAggregationBackward(_Function):
    @staticmethod
    def forward(grad, input, logits, *window_and_mask):
        return _ops.below_autograd(
            _ops.softmax_aggregation_backward, grad, input, logits, *window_and_mask
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, input, logits, *ctx.window, ctx.asked = inputs
        ctx.save_for_backward(grad, input, logits)

    @staticmethod
    def backward(ctx, *cotangents):
        grad, *inputs = ctx.saved_tensors

        def composed(input, logits):
            return composed_softmax_aggregation(input, logits, *ctx.window)

        grads = _second_order(composed, grad, inputs, ctx.asked, cotangents)
        return *_only(ctx.needs_input_grad[:3], grads), *_NO_WINDOW, None


class GroupNormAggregation(_Function):
    """Saves input, weight and the statistics, [N, G*Cw] each. The statistics are no outputs to
    differentiate."""

    @staticmethod
    def forward(input, weight, norm_weight, norm_bias, eps, *window):
        return _ops.below_autograd(
            _ops.group_norm_aggregation, input, weight, norm_weight, norm_bias, eps, *window
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, norm_weight, norm_bias, ctx.eps, *ctx.window = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(input, weight, mean, rstd, norm_weight, norm_bias)

    @staticmethod
    def backward(ctx, grad, *_):
        asked = tuple(ctx.needs_input_grad[:4])
        grads = GroupNormAggregationBackward.apply(
            grad, *ctx.saved_tensors, *ctx.window, asked, ctx.eps
        )
        return *_only(asked, grads), None, *_NO_WINDOW


class GroupNormAggregationBackward(_Function):
    @staticmethod
    def forward(grad, input, weight, mean, rstd, norm_weight, norm_bias, *window_mask_eps):
        return _ops.below_autograd(
            _ops.group_norm_aggregation_backward,
            grad,
            input,
            weight,
            mean,
            rstd,
            norm_weight,
            norm_bias,
            *window_mask_eps,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, input, weight, _, _, norm_weight, norm_bias, *ctx.window, ctx.asked, ctx.eps = inputs
        ctx.save_for_backward(grad, input, weight, norm_weight, norm_bias)

    @staticmethod
    def backward(ctx, *cotangents):
        grad, *inputs = ctx.saved_tensors
        given = [i for i, tensor in enumerate(inputs) if tensor is not None]

        def composed(*tensors):
            full = [None] * 4
            for i, tensor in zip(given, tensors, strict=True):
                full[i] = tensor
            return composed_group_norm_aggregation(*full, ctx.eps, *ctx.window)

        grads = _second_order(
            composed,
            grad,
            tuple(inputs[i] for i in given),
            tuple(ctx.asked[i] for i in given),
            tuple(cotangents[i] for i in given),
        )
        full = [grads[0], *(None,) * 4]
        for i, g in zip(given, grads[1:], strict=True):
            full[1 + i] = g
        needs = ctx.needs_input_grad
        asked = (*needs[:3], *needs[5:7])
        grad_grad, grad_input, grad_weight, grad_gamma, grad_beta = _only(asked, tuple(full))
        return (
            grad_grad,
            grad_input,
            grad_weight,
            None,
            None,
            grad_gamma,
            grad_beta,
            *_NO_WINDOW,
            None,
            None,
        )


class SpatialSoftmaxGate(_Function):
    """Saves logits and value; the gradient of ``static`` is the incoming one."""

    @staticmethod
    def forward(logits, value, static):
        return _ops.below_autograd(_ops.spatial_softmax_gate, logits, value, static)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, value, _ = inputs
        ctx.save_for_backward(logits, value)

    @staticmethod
    def backward(ctx, grad):
        *asked, static = ctx.needs_input_grad
        grads = (None, None)
        if any(asked):
            grads = _only(
                asked, SpatialSoftmaxGateBackward.apply(grad, *ctx.saved_tensors, tuple(asked))
            )
        return *grads, grad if static else None


class SpatialSoftmaxGateBackward(_Function):
    @staticmethod
    def forward(grad, logits, value, mask):
        return _ops.below_autograd(_ops.spatial_softmax_gate_backward, grad, logits, value, mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, logits, value, ctx.asked = inputs
        ctx.save_for_backward(grad, logits, value)

    @staticmethod
    def backward(ctx, *cotangents):
        grad, *inputs = ctx.saved_tensors

        def composed(logits, value):
            return logits.flatten(2).softmax(2).view(logits.shape) * value

        grads = _second_order(composed, grad, inputs, ctx.asked, cotangents)
        return *_only(ctx.needs_input_grad[:3], grads), None


class ContextFusion(_Function):
    """Saves its three arguments; logits are tiny."""

    @staticmethod
    def forward(dynamic, static, logits):
        return _ops.below_autograd(_ops.context_fusion, dynamic, static, logits)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        asked = tuple(ctx.needs_input_grad)
        return _only(asked, ContextFusionBackward.apply(grad, *ctx.saved_tensors, asked))


class ContextFusionBackward(_Function):
    @staticmethod
    def forward(grad, dynamic, static, logits, mask):
        return _ops.below_autograd(
            _ops.context_fusion_backward, grad, dynamic, static, logits, mask
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, dynamic, static, logits, ctx.asked = inputs
        ctx.save_for_backward(grad, dynamic, static, logits)

    @staticmethod
    def backward(ctx, *cotangents):
        grad, *inputs = ctx.saved_tensors
        grads = _second_order(composed_context_fusion, grad, inputs, ctx.asked, cotangents)
        return *_only(ctx.needs_input_grad[:4], grads), None


for _name, _function in {
    "local_aggregation": LocalAggregation,
    "local_aggregation_grad_input": LocalAggregationGradInput,
    "local_aggregation_grad_weight": LocalAggregationGradWeight,
    "local_aggregation_backward": LocalAggregationBackward,
    "softmax_aggregation": SoftmaxAggregation,
    "softmax_aggregation_backward": SoftmaxAggregationBackward,
    "group_norm_aggregation": GroupNormAggregation,
    "group_norm_aggregation_backward": GroupNormAggregationBackward,
    "spatial_softmax_gate": SpatialSoftmaxGate,
    "spatial_softmax_gate_backward": SpatialSoftmaxGateBackward,
    "context_fusion": ContextFusion,
    "context_fusion_backward": ContextFusionBackward,
}.items():
    torch.library.register_autograd(
        f"cotnet_ext::{_name}", _function.backward, setup_context=_function.setup_context
    )
