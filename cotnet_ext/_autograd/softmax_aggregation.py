"""Derivatives of `softmax_aggregation`."""

from __future__ import annotations

from .. import _ops
from .function import NO_WINDOW, OpFunction, only, second_order
from .local_aggregation import composed_local_aggregation


def composed_softmax_aggregation(input, logits, *window):
    return composed_local_aggregation(input, logits.softmax(3), *window)


class SoftmaxAggregation(OpFunction):
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
        return *only(asked, grads), *NO_WINDOW


class SoftmaxAggregationBackward(OpFunction):
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

        grads = second_order(composed, grad, inputs, ctx.asked, cotangents)
        return *only(ctx.needs_input_grad[:3], grads), *NO_WINDOW, None
