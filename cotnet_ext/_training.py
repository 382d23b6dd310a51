"""A training step of a contextual layer (`CotLayer`, `CoXtLayer`) as one differentiable function.

With `B` for BatchNorm and `A` for the aggregation with GroupNorm, the layer is

    k = relu(B(key * x))             h = relu(B(join * (x, k)))       w = expand * h
    y0 = A(B(value * x), w)          s = silu(B(y0))
    y = p0*s + p1*k,    (p0, p1) = softmax(se(mean(s + k)))

Saved for the backward are x, w and what the convolutions left before their norms: the norms, ReLUs
and SiLU of it are computed again where they are needed, most of them in registers. A layer of C
channels so keeps 5.6 maps of C channels, where the modules one by one keep 14.

`p0` and `p1` are constant over a map, and so is what comes back through the pooling. One pass over
the gradient therefore gives all sums that the selection and the norm before SiLU need
(`batch_norm_fusion_sums`), and a second one both gradients.

What this cannot honour takes the composed layer: see `_fusable`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from . import _layer_steps as steps
from . import _ops
from ._batch_norm import norm_of, update_running, uses_batch
from ._layer_parameters import SELECTION, Contextual
from ._ops import below_autograd as _run


def fused_layer(layer: nn.Module, input: Tensor) -> Tensor:
    """`layer(input)` in training, for a layer and an input that `_fusable` lets pass."""
    return steps.apply(_Layer, layer, input)


# ---- selection -----------------------------------------------------------------------------------


def _detached(t: Tensor) -> Tensor:
    # A result that a node saves of its own would keep that node, and itself, for good.
    return t.detach()


def _as_it_is(t: Tensor) -> Tensor:
    return t


class _Selection:
    """`softmax(se(pooled))` on `[N, C]` with a backward of its own: PyTorch records it, on tensors
    that nobody else sees.

    What it saves is small and not for hooks that others have set: checkpointing would compute a
    block again for it, in every backward within the backward.
    """

    def __init__(self, se: nn.Sequential, pooled: Tensor, parameters: tuple) -> None:
        wide = pooled.dtype
        hooks = torch.autograd.graph.saved_tensors_hooks(_detached, _as_it_is)
        with torch.enable_grad(), hooks:
            self._inputs = [
                None if t is None else t.detach().to(wide).requires_grad_()
                for t in (pooled, *parameters)
            ]
            x, squeeze, squeeze_bias, weight, bias, excite, excite_bias = self._inputs
            hidden = F.linear(x, squeeze.flatten(1), squeeze_bias)
            hidden = self._norm(se[1], hidden, weight, bias).relu()
            logits = F.linear(hidden, excite.flatten(1), excite_bias)
            self._attention = logits.unflatten(1, (-1, 2)).softmax(2).transpose(1, 2)
        self.attention = self._attention.detach().contiguous()  # [N, 2, C]

    @staticmethod
    def _norm(module: nn.BatchNorm2d, x: Tensor, weight, bias) -> Tensor:
        if not uses_batch(module):
            mean, variance = module.running_mean.to(x.dtype), module.running_var.to(x.dtype)
            return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, module.eps)
        with torch.no_grad():
            variance, mean = torch.var_mean(x, 0, correction=0)
            update_running(module, mean, variance, x.shape[0])
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, module.eps)

    def backward(self, grad_attention: Tensor, needed: tuple[bool, ...]) -> list[Tensor | None]:
        """Gradients of pooled, and of the parameters where they are needed."""
        wanted = [
            i for i, t in enumerate(self._inputs) if t is not None and (i == 0 or needed[i - 1])
        ]
        grads = torch.autograd.grad(
            self._attention,
            [self._inputs[i] for i in wanted],
            grad_attention,
            retain_graph=True,
        )
        results: list[Tensor | None] = [None] * len(self._inputs)
        for i, grad in zip(wanted, grads, strict=True):
            results[i] = grad
        return results


# ---- the layer -----------------------------------------------------------------------------------


class _Layer(Function):
    """Arguments: the layer, the dtype to compute in, its input and its parameters."""

    @staticmethod
    def forward(ctx, layer, dtype, input, *parameters):
        p = Contextual(*parameters)
        forward = _Forward(ctx, layer, dtype, input, p)
        static0, hidden0, value0, static = forward.maps(input)
        del static
        bias = steps.cast(p.expand_bias, dtype)
        weight = forward.expand(hidden0, p.expand.flatten(1).to(dtype), bias)
        dynamic0, statistics = forward.aggregate(value0, weight)
        norm = norm_of(layer.bn, dynamic0, p.weight, p.bias)
        contexts = dynamic0, static0, norm.table, forward.key_norm.table
        pooled = _run(_ops.batch_norm_fusion_pool, *contexts)
        ctx.selection = _Selection(layer.se, pooled, parameters[SELECTION])
        result = _run(_ops.batch_norm_fusion, *contexts, ctx.selection.attention)
        ctx.norms, ctx.norm = forward.norms, norm
        ctx.save_for_backward(
            input, *parameters, static0, hidden0, value0, weight, dynamic0, *statistics
        )
        return result.contiguous(memory_format=steps.layout(forward.outside))

    @staticmethod
    @_ops.gradient_by_gradient
    def backward(ctx, grad):
        if _ops.must_compose():
            return steps.composed_gradients(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):
            return None, None, *_Backward(ctx, grad).gradients()


class _Forward(steps.Forward):
    def aggregate(self, value0: Tensor, weight: Tensor) -> tuple[Tensor, list[Tensor]]:
        layer, p = self.layer, self.p
        value = layer._to_shared(_run(_ops.batch_norm, value0, self.value_norm.table, False))
        aggregated, *statistics = _run(
            _ops.group_norm_aggregation,
            value, layer._per_tap(weight),
            steps.cast(p.group_weight, self.dtype), steps.cast(p.group_bias, self.dtype),
            layer.embed[4].eps, *layer.local_conv.pairs,
        )  # fmt: skip
        return layer._from_shared(aggregated), statistics


class _Backward(steps.Backward):
    def __init__(self, ctx, grad: Tensor) -> None:
        super().__init__(ctx, grad)
        self.norm, self.selection = ctx.norm, ctx.selection
        self.weight, self.dynamic0, *self.statistics = self.saved
        del self.saved

    def _ends(self) -> tuple[Tensor, Tensor, Tensor]:
        grad_dynamic, grad_static = self._fusion()
        grad_value, grad_weight = self._aggregation(grad_dynamic)
        if self.needs.expand_bias:
            self.found["expand_bias"] = grad_weight.sum((0, 2, 3))
        return grad_static, grad_value, grad_weight

    def _fusion(self) -> tuple[Tensor, Tensor]:
        """Gradients of the dynamic context before its norm, and of the static one after it."""
        norm, attention = self.norm, self.selection.attention
        sums = _run(
            _ops.batch_norm_fusion_sums,
            self.grad,
            self.dynamic0,
            self.maps["key"],
            norm.table,
            self.norms["key"].table,
        )
        found = self.selection.backward(sums[:, :2], self.needs[SELECTION])
        self.found.update(zip(Contextual._fields[SELECTION], found[1:], strict=True))
        pooled = found[0] / (self.grad.shape[2] * self.grad.shape[3])
        *grads, self.found["weight"], self.found["bias"] = _run(
            _ops.batch_norm_fusion_backward,
            self.grad,
            self.dynamic0,
            norm.table,
            norm.factor,
            attention,
            pooled,
            sums,
            norm.batch,
        )
        del self.grad, self.dynamic0
        return grads

    def _aggregation(self, grad_dynamic: Tensor) -> tuple[Tensor, Tensor]:
        layer, p = self.layer, self.p
        value = layer._to_shared(self._again("value"))
        mask = (True, True, self.needs.group_weight, self.needs.group_bias)
        grad_value, grad_weight, *of_norm = _run(
            _ops.group_norm_aggregation_backward,
            layer._to_shared(grad_dynamic), value, layer._per_tap(self.weight), *self.statistics,
            steps.cast(p.group_weight, self.dtype), steps.cast(p.group_bias, self.dtype),
            *layer.local_conv.pairs, mask, layer.embed[4].eps,
        )  # fmt: skip
        del self.weight
        self.found["group_weight"], self.found["group_bias"] = of_norm
        return layer._from_shared(grad_value), grad_weight.flatten(1, 3)
