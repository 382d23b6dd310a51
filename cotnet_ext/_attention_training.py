"""A training step of `CoTAttention` as one differentiable function.

With the maps of `_layer_steps`, it is

    y = k + softmax(mean(expand) * h) v

where the softmax runs over the map and the mean over the k*k outputs of `expand` for a channel.
The bias of `expand` is a constant there, and the softmax is the same without it: it is never added,
and its gradient is zero. Besides the maps before their norms, the logits are saved for the
backward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import Function

from . import _layer_steps as steps
from . import _ops
from ._layer_parameters import Attention
from ._ops import below_autograd as _run


def fused_attention(layer: nn.Module, input: Tensor) -> Tensor:
    """`layer(input)` in training, for a layer and an input that `_fusable` lets pass."""
    return steps.apply(_Attention, layer, input)


class _Attention(Function):
    """Arguments: the layer, the dtype to compute in, its input and its parameters."""

    @staticmethod
    def forward(ctx, layer, dtype, input, *parameters):
        p = Attention(*parameters)
        forward = steps.Forward(ctx, layer, dtype, input, p)
        static0, hidden0, value0, static = forward.maps(input)
        mean = p.expand.view(layer.dim, -1, p.expand.shape[1]).mean(1).to(dtype)
        logits = forward.expand(hidden0, mean, None)
        value = _run(_ops.batch_norm, value0, forward.value_norm.table, False)
        result = _run(_ops.spatial_softmax_gate, logits, value, static)
        ctx.norms = forward.norms
        ctx.save_for_backward(input, *parameters, static0, hidden0, value0, logits, mean)
        return result.contiguous(memory_format=steps.layout(forward.outside))

    @staticmethod
    @_ops.gradient_by_gradient
    def backward(ctx, grad):
        if _ops.must_compose():
            return steps.composed_gradients(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):
            return None, None, *_Backward(ctx, grad).gradients()


class _Backward(steps.Backward):
    def __init__(self, ctx, grad: Tensor) -> None:
        super().__init__(ctx, grad)
        self.logits, self.mean = self.saved
        del self.saved
        self.owns_grad = self.grad.data_ptr() != grad.data_ptr()

    def _ends(self) -> tuple[Tensor, Tensor, Tensor]:
        grad_logits, grad_value = _run(
            _ops.spatial_softmax_gate_backward,
            self.grad, self.logits, self._again("value"), (True, True),
        )  # fmt: skip
        if self.needs.expand_bias:
            self.found["expand_bias"] = torch.zeros_like(self.p.expand_bias)
        grad_static = self.grad
        del self.grad, self.logits
        return grad_static, grad_value, grad_logits

    def _hidden(self, grad_hidden0: Tensor, grad_static: Tensor):
        if not self.owns_grad:  # what is added to it must not be seen outside
            grad_static = grad_static.clone(memory_format=self.layout)
        return super()._hidden(grad_hidden0, grad_static)

    def _expand_weight(self) -> Tensor:
        return self.mean

    def _found_expand(self, grad_weight: Tensor) -> None:
        """Each of the k*k outputs of a channel has the same share in the mean."""
        taps = self.p.expand.shape[0] // self.layer.dim
        share = (grad_weight / taps).unsqueeze(1)
        self.found["expand"] = share.expand(-1, taps, -1).contiguous()
