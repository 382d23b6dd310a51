"""Derivatives of `spatial_softmax_gate`."""

from __future__ import annotations

from .. import _ops
from .function import OpFunction, only, second_order


def composed_spatial_softmax_gate(logits, value, static):
    return static + logits.flatten(2).softmax(2).view(logits.shape) * value


class SpatialSoftmaxGate(OpFunction):
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
            grads = only(
                asked, SpatialSoftmaxGateBackward.apply(grad, *ctx.saved_tensors, tuple(asked))
            )
        return *grads, grad if static else None


class SpatialSoftmaxGateBackward(OpFunction):
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

        grads = second_order(composed, grad, inputs, ctx.asked, cotangents)
        return *only(ctx.needs_input_grad[:3], grads), None
