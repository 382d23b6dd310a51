"""Derivatives of `group_norm_aggregation`."""

from __future__ import annotations

import torch

from .. import _ops
from .function import NO_WINDOW, OpFunction, only, second_order
from .local_aggregation import composed_local_aggregation


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


class GroupNormAggregation(OpFunction):
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
        return *only(asked, grads), None, *NO_WINDOW


class GroupNormAggregationBackward(OpFunction):
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

        grads = second_order(
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
        grad_grad, grad_input, grad_weight, grad_gamma, grad_beta = only(asked, tuple(full))
        return (
            grad_grad,
            grad_input,
            grad_weight,
            None,
            None,
            grad_gamma,
            grad_beta,
            *NO_WINDOW,
            None,
            None,
        )
