"""Derivatives of `context_fusion`."""

from __future__ import annotations

from .. import _ops
from .function import OpFunction, only, second_order


def composed_context_fusion(dynamic, static, logits):
    chances = logits.softmax(2)[:, :, None, None]
    return chances[..., 0] * dynamic + chances[..., 1] * static


class ContextFusion(OpFunction):
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
        return only(asked, ContextFusionBackward.apply(grad, *ctx.saved_tensors, asked))


class ContextFusionBackward(OpFunction):
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
        grads = second_order(composed_context_fusion, grad, inputs, ctx.asked, cotangents)
        return *only(ctx.needs_input_grad[:4], grads), None
