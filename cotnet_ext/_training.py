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

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from . import _ops
from ._batch_norm import Norm, norm_of, update_running, uses_batch
from ._layer_parameters import PATHS, SELECTION, Parameters, parameters_of
from ._ops import below_autograd as _run
from ._products import Products


def fused_layer(layer: nn.Module, input: Tensor) -> Tensor:
    """`layer(input)` in training, for a layer and an input that `_fusable` lets pass."""
    dtype = input.dtype
    kind = input.device.type
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return _Layer.apply(layer, dtype, input, *parameters_of(layer))


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


class _Composed(nn.Module):
    """The layer with the composed forward, for derivatives of the backward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        return self.layer._compose(input)


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _is_small(x: Tensor) -> bool:
    """Whether products over the pixels of all images together pay for copies to channels_last."""
    return x.device.type == "cpu" and x.shape[2] * x.shape[3] < 128


class _Layer(Function):
    """Arguments: the layer, the dtype to compute in, its input and its parameters."""

    @staticmethod
    def forward(ctx, layer, dtype, input, *parameters):
        ctx.layer, ctx.dtype = layer, dtype
        ctx.modes = [norm.training for norm in _norms(layer)]
        outside = input.stride(1) == 1 and input.shape[1] > 1 and not input.is_contiguous()
        inside = outside or _is_small(input)
        ctx.outside, ctx.inside = outside, inside
        p = Parameters(*parameters)
        steps = _Forward(layer, p, dtype, inside)
        x = input.to(dtype, memory_format=_layout(outside))
        static0, key_norm = steps.key(x)
        x = x.contiguous(memory_format=_layout(inside))
        hidden0, hidden_norm, value0, value_norm = steps.hidden_and_value(x, static0, key_norm)
        weight = steps.weights(hidden0, hidden_norm)
        dynamic0, statistics = steps.aggregate(value0, value_norm, weight)
        norm = norm_of(layer.bn, dynamic0, p.weight, p.bias)
        contexts = dynamic0, static0, norm.table, key_norm.table
        pooled = _run(_ops.batch_norm_fusion_pool, *contexts)
        ctx.selection = _Selection(layer.se, pooled, parameters[SELECTION])
        result = _run(_ops.batch_norm_fusion, *contexts, ctx.selection.attention)
        ctx.norms = (key_norm, hidden_norm, value_norm, norm)
        ctx.save_for_backward(
            input, *parameters, static0, hidden0, value0, weight, dynamic0, *statistics
        )
        return result.contiguous(memory_format=_layout(outside))

    @staticmethod
    def backward(ctx, grad):
        if _ops.must_compose(grad):
            return _composed_gradients(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):
            return None, None, *_Backward(ctx, grad).gradients()


def _composed_gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as functions that can be differentiated again, or mapped over."""
    count = 1 + len(Parameters._fields)
    # Views, one for each place: a parameter that stands in two of them has a gradient in each.
    inputs = [None if t is None else t.view_as(t) for t in ctx.saved_tensors[:count]]
    state = {f"layer.{path}": t for path, t in zip(PATHS, inputs[1:], strict=True) if t is not None}
    composed = _Composed(ctx.layer)
    state |= {name: b.clone() for name, b in composed.named_buffers(remove_duplicate=False)}
    casts = ctx.dtype != inputs[0].dtype
    dtype = ctx.dtype if casts else None
    with (
        torch.enable_grad(),
        torch.autocast(inputs[0].device.type, dtype, casts),
        _modes(ctx.layer, ctx.modes),
    ):
        output = torch.func.functional_call(composed, state, (inputs[0],), tie_weights=False)
    needed = [i for i, need in enumerate(ctx.needs_input_grad[2:]) if need]
    grads = torch.autograd.grad(
        output, [inputs[i] for i in needed], grad, create_graph=True, allow_unused=True
    )
    results: list[Tensor | None] = [None] * count
    for i, g in zip(needed, grads, strict=True):
        results[i] = g
    return None, None, *results


def _norms(layer: nn.Module) -> list[nn.Module]:
    return [layer.key_embed[1], layer.embed[1], layer.conv1x1[1], layer.bn, layer.se[1]]


@contextmanager
def _modes(layer: nn.Module, modes: list[bool]) -> Iterator[None]:
    """Within it the norms of the layer are in these modes, training or evaluation."""
    norms = _norms(layer)
    before = [norm.training for norm in norms]
    try:
        for norm, training in zip(norms, modes, strict=True):
            norm.training = training
        yield
    finally:
        for norm, training in zip(norms, before, strict=True):
            norm.training = training


class _Forward:
    """The steps from the input to what the aggregation leaves."""

    def __init__(self, layer: nn.Module, p: Parameters, dtype: torch.dtype, inside: bool) -> None:
        self.layer, self.p, self.dtype = layer, p, dtype
        self.products = Products(layer._groups, inside)
        self.layout = _layout(inside)

    def key(self, x: Tensor) -> tuple[Tensor, Norm]:
        conv, norm, _ = self.layer.key_embed
        static0 = F.conv2d(
            x, self.p.key.to(self.dtype), None, 1, conv.padding, 1, conv.groups
        ).contiguous(memory_format=self.layout)
        return static0, norm_of(norm, static0, self.p.key_weight, self.p.key_bias)

    def hidden_and_value(self, x: Tensor, static0: Tensor, key_norm: Norm):
        p, layer = self.p, self.layer
        static = _run(_ops.batch_norm, static0, key_norm.table, True)
        columns = layer._split(p.join.flatten(1).to(self.dtype))
        hidden0 = self.products.forward([x, static], columns)
        del static
        hidden_norm = norm_of(layer.embed[1], hidden0, p.hidden_weight, p.hidden_bias)
        value0 = self.products.forward([x], [p.value.flatten(1).to(self.dtype)])
        value_norm = norm_of(layer.conv1x1[1], value0, p.value_weight, p.value_bias)
        return hidden0, hidden_norm, value0, value_norm

    def weights(self, hidden0: Tensor, hidden_norm: Norm) -> Tensor:
        p = self.p
        hidden = _run(_ops.batch_norm, hidden0, hidden_norm.table, True)
        bias = None if p.expand_bias is None else p.expand_bias.to(self.dtype)
        return self.products.forward([hidden], [p.expand.flatten(1).to(self.dtype)], bias)

    def aggregate(self, value0: Tensor, value_norm: Norm, weight: Tensor):
        layer = self.layer
        value = layer._to_shared(_run(_ops.batch_norm, value0, value_norm.table, False))
        affine = _cast(self.p.group_weight, self.dtype), _cast(self.p.group_bias, self.dtype)
        aggregated, *statistics = _run(
            _ops.group_norm_aggregation,
            value,
            layer._per_tap(weight),
            *affine,
            layer.embed[4].eps,
            *layer.local_conv.pairs,
        )
        return layer._from_shared(aggregated), statistics


def _cast(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)


class _Backward:
    """The steps back; what is not needed any more is let go at once."""

    def __init__(self, ctx, grad: Tensor) -> None:
        self.layer, self.dtype = ctx.layer, ctx.dtype
        self.inside, self.outside = ctx.inside, ctx.outside
        self.products = Products(ctx.layer._groups, ctx.inside)
        self.layout = _layout(ctx.inside)
        self.key_norm, self.hidden_norm, self.value_norm, self.norm = ctx.norms
        self.selection = ctx.selection
        count = len(Parameters._fields)
        input, *saved = ctx.saved_tensors
        self.input = input
        self.x = input.to(self.dtype, memory_format=self.layout)
        self.p = Parameters(*saved[:count])
        self.static0, self.hidden0, self.value0, self.weight, self.dynamic0, *self.statistics = (
            saved[count:]
        )
        self.grad = grad.contiguous(memory_format=self.layout)
        self.needs_input = ctx.needs_input_grad[2]
        self.needs = Parameters(*ctx.needs_input_grad[3:])
        self.found: dict[str, Tensor | None] = {}

    def gradients(self) -> tuple[Tensor | None, ...]:
        grad_dynamic, grad_static = self._fusion()
        grad_value, grad_weight = self._aggregation(grad_dynamic)
        del grad_dynamic
        grad_hidden0 = self._weights(grad_weight)
        del grad_weight
        grad_value0 = self._norm("value", self.value0, self.value_norm, grad_value, False)
        del grad_value
        grad_static, columns = self._hidden(grad_hidden0, grad_static)
        grad_static0 = self._norm("key", self.static0, self.key_norm, grad_static, True)
        del grad_static
        self._products_of_input(grad_hidden0, grad_value0, columns[1])
        grad_input = self._key(grad_static0)
        if self.needs_input:
            rows = [columns[0], self.p.value.flatten(1).to(self.dtype)]
            grads = [grad_hidden0, grad_value0]
            if self.inside == self.outside:
                self.products.grad_map(grads, rows, grad_input)
            else:
                grad_input += self.products.grad_map(grads, rows)
            grad_input = grad_input.to(self.input.dtype)
        return grad_input, *(self._typed(name) for name in Parameters._fields)

    def _typed(self, name: str) -> Tensor | None:
        grad, parameter = self.found.get(name), getattr(self.p, name)
        if grad is None or not getattr(self.needs, name):
            return None
        return grad.to(parameter.dtype).view(parameter.shape)

    def _fusion(self) -> tuple[Tensor, Tensor]:
        """Gradients of the dynamic context before its norm, and of the static one after it."""
        norm, attention = self.norm, self.selection.attention
        sums = _run(
            _ops.batch_norm_fusion_sums,
            self.grad,
            self.dynamic0,
            self.static0,
            norm.table,
            self.key_norm.table,
        )
        found = self.selection.backward(sums[:, :2], self.needs[SELECTION])
        self.found.update(zip(Parameters._fields[SELECTION], found[1:], strict=True))
        pooled = found[0] / (self.x.shape[2] * self.x.shape[3])
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
        value = layer._to_shared(_run(_ops.batch_norm, self.value0, self.value_norm.table, False))
        mask = (True, True, self.needs.group_weight, self.needs.group_bias)
        grad_value, grad_weight, *of_norm = _run(
            _ops.group_norm_aggregation_backward,
            layer._to_shared(grad_dynamic), value, layer._per_tap(self.weight), *self.statistics,
            _cast(p.group_weight, self.dtype), _cast(p.group_bias, self.dtype),
            *layer.local_conv.pairs, mask, layer.embed[4].eps,
        )  # fmt: skip
        del self.weight
        self.found["group_weight"], self.found["group_bias"] = of_norm
        return layer._from_shared(grad_value), grad_weight.flatten(1, 3)

    def _weights(self, grad_weight: Tensor) -> Tensor:
        """Through the second convolution of `embed` and the norm before it."""
        if self.needs.expand:
            hidden = _run(_ops.batch_norm, self.hidden0, self.hidden_norm.table, True)
            self.found["expand"] = self.products.grad_weight(grad_weight, hidden)
            del hidden
        if self.needs.expand_bias:
            self.found["expand_bias"] = grad_weight.sum((0, 2, 3))
        rows = [self.p.expand.flatten(1).to(self.dtype)]
        grad_hidden = self.products.grad_map([grad_weight], rows)
        return self._norm("hidden", self.hidden0, self.hidden_norm, grad_hidden, True)

    def _norm(self, name: str, x: Tensor, norm: Norm, grad: Tensor, relu: bool) -> Tensor:
        grad_x, weight, bias = _run(
            _ops.batch_norm_backward, grad, x, norm.table, norm.factor, relu, norm.batch
        )
        self.found[f"{name}_weight"], self.found[f"{name}_bias"] = weight, bias
        return grad_x

    def _hidden(self, grad_hidden0: Tensor, grad_static: Tensor):
        """The gradient of the static context through `join` is added to the one from the end."""
        columns = self.layer._split(self.p.join.flatten(1).to(self.dtype))
        self.products.grad_map([grad_hidden0], [columns[1]], grad_static)
        grad_columns = None
        if self.needs.join:
            static = _run(_ops.batch_norm, self.static0, self.key_norm.table, True)
            grad_columns = self.products.grad_weight(grad_hidden0, static)
        return grad_static, (columns[0], grad_columns)

    def _products_of_input(self, grad_hidden0, grad_value0, of_static) -> None:
        if self.needs.join:
            of_input = self.products.grad_weight(grad_hidden0, self.x)
            self.found["join"] = self.layer._merge(of_input, of_static)
        if self.needs.value:
            self.found["value"] = self.products.grad_weight(grad_value0, self.x)

    def _key(self, grad_static0: Tensor) -> Tensor | None:
        """The 3x3 convolution: in the layout of the input, as another one makes PyTorch reorder its
        weight and the gradient of it."""
        conv, layout = self.layer.key_embed[0], _layout(self.outside)
        needs = [self.needs_input, self.needs.key, False]
        if not any(needs):
            return None
        grad_input, self.found["key"], _ = torch.ops.aten.convolution_backward(
            grad_static0.contiguous(memory_format=layout),
            self.input.to(self.dtype, memory_format=layout),
            self.p.key.to(self.dtype), None,
            [1, 1], conv.padding, [1, 1], False, [0, 0], conv.groups, needs,
        )  # fmt: skip
        return None if grad_input is None else grad_input.contiguous(memory_format=layout)
