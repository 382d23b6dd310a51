"""Derivatives of `local_aggregation`.

It is bilinear, and so are its two gradients; every derivative of the three is one of the three, so
three kernels give derivatives of any order:

    A(x, w)    local_aggregation               d/dx = X(g, w)    d/dw = W(g, x)
    X(g, w)    local_aggregation_grad_input    d/dg = A(a, w)    d/dw = W(g, a)
    W(g, x)    local_aggregation_grad_weight   d/dg = A(x, b)    d/dx = X(g, b)

A derivative that is absent stays None instead of becoming zeros, so that no kernel runs for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ops
from .function import NO_WINDOW, OpFunction


def _sum(*terms: Tensor | None) -> Tensor | None:
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0]) if given else None


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


class LocalAggregation(OpFunction):
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
            return None, None, *NO_WINDOW
        input, weight = ctx.saved_tensors
        return *_both(grad, input, weight, ctx.needs_input_grad, ctx.window), *NO_WINDOW

    @staticmethod
    def jvp(ctx, input_t, weight_t, *_):
        input, weight = ctx.saved_tensors
        return _sum(_a(input_t, weight, ctx.window), _a(input, weight_t, ctx.window))


class LocalAggregationGradInput(OpFunction):
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
            *NO_WINDOW,
        )

    @staticmethod
    def jvp(ctx, grad_t, weight_t, *_):
        grad, weight = ctx.saved_tensors
        size, window = ctx.input_size, ctx.window
        return _sum(_x(grad_t, weight, size, window), _x(grad, weight_t, size, window))


class LocalAggregationGradWeight(OpFunction):
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
            *NO_WINDOW,
        )

    @staticmethod
    def jvp(ctx, grad_t, input_t, *_):
        grad, input = ctx.saved_tensors
        channels, window = ctx.weight_channels, ctx.window
        return _sum(_w(grad_t, input, channels, window), _w(grad, input_t, channels, window))


class LocalAggregationBackward(OpFunction):
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
            *NO_WINDOW,
        )

    @staticmethod
    def jvp(ctx, grad_t, input_t, weight_t, *_):
        grad, input, weight = ctx.saved_tensors
        size, channels, window = tuple(input.shape[2:]), weight.shape[2], ctx.window
        return (
            _sum(_x(grad_t, weight, size, window), _x(grad, weight_t, size, window)),
            _sum(_w(grad_t, input, channels, window), _w(grad, input_t, channels, window)),
        )


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
