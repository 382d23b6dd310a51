"""What training steps of all layers have in common, as functions of a whole layer.

Every layer makes from its input a static context, hidden maps and a value,

    k = relu(B(key * x))             h = relu(B(join * (x, k)))             v = B(value * x)

with B for BatchNorm, and from `expand * h`, v and k its result. Saved for the backward are x and
what the convolutions left before their norms; norms and ReLUs of it are computed again.

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
from ._batch_norm import Norm, norm_of
from ._layer_parameters import Parameters
from ._ops import below_autograd as _run
from ._products import Products


def apply(function: type[Function], layer: nn.Module, input: Tensor) -> Tensor:
    """The function of a layer, for a layer and an input that `_fusable` lets pass."""
    dtype = input.dtype
    kind = input.device.type
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return function.apply(layer, dtype, input, *layer._learned())


# ---- forward -------------------------------------------------------------------------------------


def layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _is_small(x: Tensor) -> bool:
    """Whether products over the pixels of all images together pay for copies to channels_last."""
    return x.device.type == "cpu" and x.shape[2] * x.shape[3] < 128


def _key_layout(steps: Forward | Backward, maps: Tensor) -> torch.memory_format:
    """Of the maps of the 3x3 convolution. Its weight is reordered for channels_last, and so is the
    gradient of it: only where the maps inside are so, and larger than the weight."""
    inside = steps.inside and maps.numel() > steps.p.key.numel()
    return layout(inside or steps.outside)


def _key_input(steps: Forward | Backward, x: Tensor, input: Tensor) -> Tensor:
    """The input in that layout; `x` is what it is inside."""
    wanted = _key_layout(steps, x)
    return x if wanted == layout(steps.inside) else input.to(x.dtype, memory_format=wanted)


def cast(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)


class Forward:
    """The steps from the input to what `expand` leaves.

    Attributes:
        outside, inside: whether maps are channels_last, as the input and as they are computed on.
    """

    def __init__(self, ctx, layer: nn.Module, dtype: torch.dtype, input: Tensor, p: Parameters):
        self.layer, self.p, self.dtype = layer, p, dtype
        self.outside = input.stride(1) == 1 and input.shape[1] > 1 and not input.is_contiguous()
        self.inside = self.outside or _is_small(input)
        self.products = Products(layer._groups, self.inside)
        ctx.layer, ctx.dtype, ctx.outside, ctx.inside = layer, dtype, self.outside, self.inside
        ctx.modes = [norm.training for norm in layer._norms]
        ctx.named = p._make

    def maps(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Static context, hidden maps and value before their norms, of which it makes notes; and
        the static context after it."""
        layer, p = self.layer, self.p
        embed, values = layer._branches
        x = input.to(self.dtype, memory_format=layout(self.inside))
        static0, self.key_norm = self._key(x, input)
        static = _run(_ops.batch_norm, static0, self.key_norm.table, True)
        columns = layer._split(p.join.flatten(1).to(self.dtype))
        hidden0 = self.products.forward([x, static], columns)
        self.hidden_norm = norm_of(embed[1], hidden0, p.hidden_weight, p.hidden_bias)
        value0 = self.products.forward([x], [p.value.flatten(1).to(self.dtype)])
        self.value_norm = norm_of(values[1], value0, p.value_weight, p.value_bias)
        return static0, hidden0, value0, static

    def _key(self, x: Tensor, input: Tensor) -> tuple[Tensor, Norm]:
        conv, norm, _ = self.layer.key_embed
        static0 = F.conv2d(
            _key_input(self, x, input),
            self.p.key.to(self.dtype), None, 1, conv.padding, 1, conv.groups,
        ).contiguous(memory_format=layout(self.inside))  # fmt: skip
        return static0, norm_of(norm, static0, self.p.key_weight, self.p.key_bias)

    def expand(self, hidden0: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The second convolution of the hidden maps, with a weight `[O, C // groups]`."""
        hidden = _run(_ops.batch_norm, hidden0, self.hidden_norm.table, True)
        return self.products.forward([hidden], [weight], bias)

    @property
    def norms(self) -> tuple[Norm, Norm, Norm]:
        return self.key_norm, self.hidden_norm, self.value_norm


# ---- backward ------------------------------------------------------------------------------------


class Backward:
    """The steps back; what is not needed any more is let go at once.

    Of a layer of its own are `_ends` and the gradient of `expand`.
    """

    def __init__(self, ctx, grad: Tensor) -> None:
        self.layer, self.dtype = ctx.layer, ctx.dtype
        self.inside, self.outside = ctx.inside, ctx.outside
        self.products = Products(ctx.layer._groups, ctx.inside)
        self.layout = layout(ctx.inside)
        count = len(ctx.layer._paths)
        self.input, *saved = ctx.saved_tensors
        if ctx.once:
            ctx.maybe_clear_saved_tensors()  # else they live until the end; kept with the graph
        self.p, self.needs = ctx.named(saved[:count]), ctx.named(ctx.needs_input_grad[3:])
        key, hidden, value, *self.saved = saved[count:]
        self.maps = {"key": key, "hidden": hidden, "value": value}  # before their norms
        self.norms: dict[str, Norm] = dict(zip(self.maps, ctx.norms, strict=True))
        self.grad = grad.contiguous(memory_format=self.layout)
        self.needs_input = ctx.needs_input_grad[2]
        self.found: dict[str, Tensor | None] = {}

    def _ends(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the static context (to which the rest may be added in place), the value and
        what `expand` made."""
        raise NotImplementedError

    def _expand_weight(self) -> Tensor:
        """The weight of `expand`, `[O, C // groups]`."""
        return self.p.expand.flatten(1).to(self.dtype)

    def _found_expand(self, grad_weight: Tensor) -> None:
        """Takes down the gradient of that weight."""
        self.found["expand"] = grad_weight

    def gradients(self) -> tuple[Tensor | None, ...]:
        grad_static, grad_value, grad_expanded = self._ends()
        grad_hidden0 = self._expand(grad_expanded)
        del grad_expanded
        grad_value0 = self._norm("value", grad_value)
        del grad_value
        grad_static, columns = self._hidden(grad_hidden0, grad_static)
        grad_static0 = self._norm("key", grad_static)
        del grad_static
        x = self.input.to(self.dtype, memory_format=self.layout)
        self._products_of_input(x, grad_hidden0, grad_value0, columns[1])
        grad_input = self._key(x, grad_static0)
        del x, grad_static0
        if self.needs_input:
            rows = [columns[0], self.p.value.flatten(1).to(self.dtype)]
            grads = [grad_hidden0, grad_value0]
            self.products.grad_map(grads, rows, grad_input)
            grad_input = grad_input.to(self.input.dtype, memory_format=layout(self.outside))
        return grad_input, *(self._typed(name) for name in self.p._fields)

    def _typed(self, name: str) -> Tensor | None:
        grad, parameter = self.found.get(name), getattr(self.p, name)
        if grad is None or not getattr(self.needs, name):
            return None
        return grad.to(parameter.dtype).view(parameter.shape)

    def _again(self, name: str) -> Tensor:
        """A map after its norm, and ReLU where there is one."""
        return _run(_ops.batch_norm, self.maps[name], self.norms[name].table, name != "value")

    def _norm(self, name: str, grad: Tensor) -> Tensor:
        """Through the norm, and ReLU, of a map that is not needed any more."""
        norm = self.norms[name]
        grad_x, self.found[f"{name}_weight"], self.found[f"{name}_bias"] = _run(
            _ops.batch_norm_backward,
            grad, self.maps.pop(name), norm.table, norm.factor, name != "value", norm.batch,
        )  # fmt: skip
        return grad_x

    def _expand(self, grad: Tensor) -> Tensor:
        """Through the second convolution of the hidden maps and the norm before it."""
        if self.needs.expand:
            self._found_expand(self.products.grad_weight(grad, self._again("hidden")))
        grad_hidden = self.products.grad_map([grad], [self._expand_weight()])
        return self._norm("hidden", grad_hidden)

    def _hidden(self, grad_hidden0: Tensor, grad_static: Tensor):
        """The gradient of the static context through `join` is added to the one from the end."""
        columns = self.layer._split(self.p.join.flatten(1).to(self.dtype))
        self.products.grad_map([grad_hidden0], [columns[1]], grad_static)
        grad_columns = None
        if self.needs.join:
            grad_columns = self.products.grad_weight(grad_hidden0, self._again("key"))
        return grad_static, (columns[0], grad_columns)

    def _products_of_input(self, x, grad_hidden0, grad_value0, of_static) -> None:
        if self.needs.join:
            of_input = self.products.grad_weight(grad_hidden0, x)
            self.found["join"] = self.layer._merge(of_input, of_static)
        if self.needs.value:
            self.found["value"] = self.products.grad_weight(grad_value0, x)

    def _key(self, x: Tensor, grad_static0: Tensor) -> Tensor | None:
        conv, needs = self.layer.key_embed[0], [self.needs_input, self.needs.key, False]
        if not any(needs):
            return None
        grad_input, self.found["key"], _ = torch.ops.aten.convolution_backward(
            grad_static0.contiguous(memory_format=_key_layout(self, x)),
            _key_input(self, x, self.input),
            self.p.key.to(self.dtype), None,
            [1, 1], conv.padding, [1, 1], False, [0, 0], conv.groups, needs,
        )  # fmt: skip
        return None if grad_input is None else grad_input.contiguous(memory_format=self.layout)


# ---- derivatives of the backward -----------------------------------------------------------------


class _Composed(nn.Module):
    """The layer with the composed forward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        return self.layer._compose(input)


def composed_gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as functions that can be differentiated again, or mapped over."""
    paths = ctx.layer._paths
    count = 1 + len(paths)
    # Views, one for each place: a parameter that stands in two of them has a gradient in each.
    inputs = [None if t is None else t.view_as(t) for t in ctx.saved_tensors[:count]]
    state = {f"layer.{path}": t for path, t in zip(paths, inputs[1:], strict=True) if t is not None}
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


@contextmanager
def _modes(layer: nn.Module, modes: list[bool]) -> Iterator[None]:
    """Within it the norms of the layer are in these modes, training or evaluation."""
    norms = layer._norms
    before = [norm.training for norm in norms]
    try:
        for norm, training in zip(norms, modes, strict=True):
            norm.training = training
        yield
    finally:
        for norm, training in zip(norms, before, strict=True):
            norm.training = training
