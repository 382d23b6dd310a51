"""The two ends of a bottleneck in a training step, each as one differentiable function of NCHW maps
on the CPU. With `B` for BatchNorm they are, around an attention from a to h,

    a = relu(B(reduce * x)),  s = x, or project * x           y = relu(B(expand * h) + s), or + B(s)

The shortcut s goes through the entrance, so that gradients meet where they lie: the exit leaves a
gradient of s that nobody else sees, and the products of the entrance are added to it in place.
Saved are x, h, y and what the convolutions left before their norms, as by the modules. They are let
go as soon as they are used: at the size of these maps a page that is touched anew costs as much as
a pass over it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn import functional as F

from . import _ops
from ._batch_norm import Norm, norm_of
from ._convolutions import _is_plain_sampled
from ._norm_relu import composed_gradients, composed_norm, suits
from ._ops import below_autograd as _run
from ._plain import is_plain
from ._pointwise import _grad_weight
from ._products import Products

_PRODUCTS = Products(groups=1, channels_last=False)


# ---- when ----------------------------------------------------------------------------------------


def can_fuse(block: nn.Module, x: Tensor) -> bool:
    """Whether `enter` and `leave` do what the modules of `block` around its attention do, if its
    drop path does nothing."""
    return (
        _is_plainly_recorded(x)
        and is_plain(block.act1, nn.ReLU)
        and is_plain(block.act3, nn.ReLU)
        and _is_pair(block.conv1, block.bn1, x)
        and x.shape[1] == block.conv1.in_channels
        and _is_pair(block.conv3, block.bn3, x)
        and block.conv1.stride == block.conv3.stride == (1, 1)
        and _has_plain_shortcut(block, x)
    )


def can_leave(block: nn.Module, h: Tensor, s: Tensor) -> bool:
    """Whether what the attention left is such that `leave` may follow."""
    n, c, *pixels = h.shape
    return (
        _is_plainly_recorded(h)
        and h.dtype == s.dtype
        and c == block.conv3.in_channels
        and (n, block.conv3.out_channels, *pixels) == tuple(s.shape)
    )


def _is_plainly_recorded(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.dim() == 4
        and x.is_contiguous()
        and x.shape[0] * x.shape[2] * x.shape[3] > 1  # values of a channel: a norm refuses one
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _is_pair(conv: nn.Module, norm: nn.Module, x: Tensor) -> bool:
    """Whether these are a 1x1 convolution and its norm, of the type of `x`."""
    return (
        _is_plain_sampled(conv)
        and conv.groups == 1
        and conv.bias is None
        and type(conv.weight) is nn.Parameter
        and conv.weight.dtype == x.dtype
        and conv.weight.device == x.device
        and conv.weight.requires_grad
        and is_plain(norm, nn.BatchNorm2d)
        and norm.num_features == conv.out_channels
        and suits(norm, x)
    )


def _has_plain_shortcut(block: nn.Module, x: Tensor) -> bool:
    shortcut = block.downsample
    if shortcut is None:
        return block.conv3.out_channels == x.shape[1]
    return (
        is_plain(shortcut, nn.Sequential)
        and len(shortcut) == 2
        and _is_pair(*shortcut, x)
        and shortcut[0].in_channels == x.shape[1]
        and shortcut[0].out_channels == block.conv3.out_channels
    )


# ---- entrance ------------------------------------------------------------------------------------


def enter(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The map for the attention, and the shortcut before its norm; for a block and an input that
    `can_fuse` lets pass. Of a shortcut that is the input, nobody but `leave` may use the second."""
    projection = None if block.downsample is None else block.downsample[0]
    stride = (1, 1) if projection is None else projection.stride
    projected = None if projection is None else projection.weight
    norm = block.bn1
    return _Entrance.apply(
        norm, stride, x, block.conv1.weight, norm.weight, norm.bias, projected
    )  # fmt: skip


class _Entrance(Function):
    """Arguments: the norm, the stride of the shortcut, the input, the weight of the first
    convolution, the parameters of the norm, and the weight of the shortcut or None."""

    @staticmethod
    def forward(ctx, module, stride, x, weight, norm_weight, norm_bias, projection):
        reduced = _PRODUCTS.forward([x], [weight.flatten(1)])
        ctx.norm = norm_of(module, reduced, norm_weight, norm_bias)
        ctx.eps, ctx.stride = module.eps, stride
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, norm_weight, norm_bias, projection, reduced)
        a = _run(_ops.batch_norm, reduced, ctx.norm.table, True)
        if projection is None:
            return a, x.view_as(x)
        return a, _PRODUCTS.forward([_sampled(x, stride).contiguous()], [projection.flatten(1)])

    @staticmethod
    @_ops.gradient_by_gradient
    def backward(ctx, grad_a, grad_s):
        *inputs, reduced = ctx.saved_tensors
        if _ops.must_compose():
            grads = composed_gradients(
                lambda *places: _composed_entrance(ctx, *places),
                inputs, ctx.needs_input_grad[2:], (grad_a, grad_s),
            )  # fmt: skip
            return None, None, *grads
        if ctx.once:
            ctx.maybe_clear_saved_tensors()
        x, *learned = inputs
        del inputs
        with torch.autocast("cpu", enabled=False):
            grad_reduced, of_norm = None, [None, None]
            if grad_a is not None:
                grad_reduced, *of_norm = _through(ctx.norm, grad_a, reduced, True)
            del grad_a, reduced
            return None, None, *_through_products(ctx, x, learned, grad_reduced, of_norm, grad_s)


def _through_products(ctx, x, learned, grad_reduced, of_norm, grad_s) -> tuple[Tensor | None, ...]:
    """Gradients of the input and of what is learned; None for what has no part in the result."""
    weight, norm_weight, norm_bias, projection = learned
    if grad_s is not None:
        # To be added to in place; of a batch of gradients, one may serve all.
        grad_s = grad_s.contiguous() if ctx.once else grad_s.clone()
    of_weight = of_projection = grad_x = None
    if grad_reduced is not None:
        of_weight = _grad_weight(grad_reduced, x, 1)
    if projection is not None and grad_s is not None:
        seen = x if ctx.stride == (1, 1) else _sampled(x, ctx.stride).contiguous()
        of_projection = _grad_weight(grad_s, seen, 1)
    if ctx.needs_input_grad[2]:
        grad_x = _grad_input(x, grad_reduced, weight, grad_s, projection, ctx.stride)
    return grad_x, *_typed([of_weight, *of_norm, of_projection], learned)


def _grad_input(x, grad_reduced, weight, grad_s, projection, stride) -> Tensor | None:
    grads, rows = [grad_reduced], [weight.flatten(1)]
    if projection is None:
        return grad_s if grad_reduced is None else _PRODUCTS.grad_map(grads, rows, grad_s)
    if grad_s is None:
        return None if grad_reduced is None else _PRODUCTS.grad_map(grads, rows)
    if stride == (1, 1) and grad_reduced is not None:
        return _PRODUCTS.grad_map([*grads, grad_s], [*rows, projection.flatten(1)])
    grad_seen = _PRODUCTS.grad_map([grad_s], [projection.flatten(1)])
    if stride == (1, 1):
        return grad_seen
    grad_x = torch.zeros_like(x) if grad_reduced is None else _PRODUCTS.grad_map(grads, rows)
    _sampled(grad_x, stride).add_(grad_seen)
    return grad_x


def _sampled(x: Tensor, stride: tuple[int, int]) -> Tensor:
    """The pixels that a strided 1x1 convolution sees."""
    return x[:, :, :: stride[0], :: stride[1]]


def _composed_entrance(ctx, x, weight, norm_weight, norm_bias, projection):
    a = composed_norm(ctx.norm, ctx.eps, F.conv2d(x, weight), norm_weight, norm_bias).relu()
    return a, x if projection is None else F.conv2d(x, projection, stride=ctx.stride)


# ---- exit ----------------------------------------------------------------------------------------


def leave(block: nn.Module, h: Tensor, s: Tensor) -> Tensor:
    """The result of the block, from what the attention left and the shortcut of `enter`."""
    norms = [block.bn3] if block.downsample is None else [block.bn3, block.downsample[1]]
    of_norms = (t for norm in norms for t in (norm.weight, norm.bias))
    return _Exit.apply(norms, h, s, block.conv3.weight, *of_norms)


class _Exit(Function):
    """Arguments: the last norm, and that of the shortcut if it has one; what the attention left,
    the shortcut, the weight of the last convolution, and the parameters of the norms."""

    @staticmethod
    def forward(ctx, modules, h, s, weight, *of_norms):
        expanded = _PRODUCTS.forward([h], [weight.flatten(1)])
        maps = [expanded, s][: len(modules)]
        pairs = zip(of_norms[::2], of_norms[1::2], strict=True)
        ctx.norms = [
            norm_of(module, x, *pair) for module, x, pair in zip(modules, maps, pairs, strict=True)
        ]
        ctx.eps = [module.eps for module in modules]
        y, *normed = (
            _run(_ops.batch_norm, x, norm.table, False)
            for x, norm in zip(maps, ctx.norms, strict=True)
        )
        y.add_(normed[0] if normed else s).relu_()
        ctx.save_for_backward(h, weight, *of_norms, y, *maps)
        return y

    @staticmethod
    @_ops.gradient_by_gradient
    def backward(ctx, grad):
        count = 2 * len(ctx.norms)
        h, weight, *saved = ctx.saved_tensors
        of_norms, (y, *maps) = saved[:count], saved[count:]
        if _ops.must_compose():
            # Where the shortcut has no norm its values do not count: the signs of y are known.
            s = maps[1] if len(maps) > 1 else torch.zeros_like(y).requires_grad_()
            positive = y > 0
            grads = composed_gradients(
                lambda *places: _composed_exit(ctx, positive, *places),
                [h, s, weight, *of_norms], ctx.needs_input_grad[1:], (grad,),
            )  # fmt: skip
            return None, *grads
        if ctx.once:
            ctx.maybe_clear_saved_tensors()
        del saved
        # A tensor of its own, to which the entrance may add: nobody else sees it.
        grad = torch.ops.aten.threshold_backward(grad.contiguous(), y, 0)
        del y
        with torch.autocast("cpu", enabled=False):
            grads = [_through(norm, grad, maps.pop(0), False) for norm in ctx.norms]
            grad_expanded, *learned = grads[0]
            if len(grads) > 1:
                grad, *more = grads[1]
                learned += more
            grad_weight = _grad_weight(grad_expanded, h, 1)
            grad_h = _PRODUCTS.grad_map([grad_expanded], [weight.flatten(1)])
        return None, grad_h, grad, *_typed([grad_weight, *learned], [weight, *of_norms])


def _composed_exit(ctx, positive: Tensor, h, s, weight, *of_norms) -> Tensor:
    z = composed_norm(ctx.norms[0], ctx.eps[0], F.conv2d(h, weight), *of_norms[:2])
    if len(ctx.norms) > 1:
        s = composed_norm(ctx.norms[1], ctx.eps[1], s, *of_norms[2:])
    # Moved to where the signs of y are, which are known while the values of s may not be.
    total = z + s
    return (total + (torch.where(positive, 1.0, -1.0) - total).detach()).relu()


# ---- both ----------------------------------------------------------------------------------------


def _through(norm: Norm, grad: Tensor, x: Tensor, relu: bool) -> Sequence[Tensor]:
    """Gradients of a map before its norm, and of the parameters of the norm."""
    return _run(_ops.batch_norm_backward, grad, x, norm.table, norm.factor, relu, norm.batch)


def _typed(grads: Sequence[Tensor | None], learned: Sequence[Tensor | None]):
    """Gradients in the form of what they are of."""
    pairs = zip(grads, learned, strict=True)
    return (None if t is None or g is None else g.to(t.dtype).view(t.shape) for g, t in pairs)
