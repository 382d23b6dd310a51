"""BatchNorm and what follows it in a contextual layer, in the parts that a fused layer is made of.

A *norm* is a table of numbers of channels in the type of sums (float32, for float64 float64), with
the rows m, a, b of

    z = (x - m) * a + b

For BatchNorm these are its mean, `weight / sqrt(variance + eps)` and its bias. A norm for a
backward has two more rows, c and d of `grad_x = a * (grad_z - c - (x - m) * d)`: zeros where m and
a are given numbers; the mean of `grad_z` and the mean of `grad_z * (x - m)` divided by
`variance + eps` where they are the batch's own. `norms` are the norm of the dynamic context and,
below it, that of the static context.

Each operator `torch.ops.cotnet_ext.NAME` is defined by `defined_NAME` below, from which its
derivatives come as well: layers have faster ones of their own (`_training`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import _checks, _ops

# ---- definitions ---------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rows(table: Tensor) -> list[Tensor]:
    """The rows `[C]` or `[N, C]` of a table, as factors of maps."""
    return [row[..., None, None] for row in table.unbind(-2)]


def _normed(x: Tensor, norm: Tensor) -> Tensor:
    m, a, b, *_ = _rows(norm)
    return (_wide(x) - m) * a + b


def _contexts(dynamic: Tensor, static: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    z = _normed(dynamic, norms[:3])
    return z * z.sigmoid(), _normed(static, norms[3:]).relu()


def defined_batch_norm_statistics(input):
    """Mean and biased variance `[C]` over images and pixels."""
    x = _wide(input)
    mean = x.mean((0, 2, 3))
    return mean, (x - mean[:, None, None]).square().mean((0, 2, 3))


def defined_batch_norm(input, norm, relu):
    """`z`, or `relu(z)`."""
    z = _normed(input, norm)
    return (z.relu() if relu else z).to(input.dtype)


def _grad_z(grad, input, norm, relu):
    return _wide(grad) * (_normed(input, norm) > 0) if relu else _wide(grad)


def defined_batch_norm_sums(grad, input, norm, relu):
    """The sums over the map of `grad_z` and of `grad_z * (x - m)`, `[N, 2, C]`."""
    grad_z, centred = _grad_z(grad, input, norm, relu), _wide(input) - _rows(norm)[0]
    return torch.stack([grad_z.sum((2, 3)), (grad_z * centred).sum((2, 3))], dim=1)


def defined_batch_norm_backward(grad, input, norm, relu):
    """`grad_x`, with a norm of five rows."""
    m, a, _, c, d = _rows(norm)
    grad_z = _grad_z(grad, input, norm, relu)
    return (a * (grad_z - c - (_wide(input) - m) * d)).to(input.dtype)


def defined_batch_norm_fusion_pool(dynamic, static, norms):
    """The sum over the map of `silu(z)` of the dynamic and `relu(z)` of the static, `[N, C]`."""
    s, r = _contexts(dynamic, static, norms)
    return s.sum((2, 3)) + r.sum((2, 3))


def defined_batch_norm_fusion(dynamic, static, norms, attention):
    """Both contexts, weighted with the two rows of attention, `[N, 2, C]`."""
    s, r = _contexts(dynamic, static, norms)
    p0, p1 = _rows(attention)
    return (p0 * s + p1 * r).to(dynamic.dtype)


def _slope(z: Tensor) -> Tensor:
    """The derivative of silu."""
    chance = z.sigmoid()
    return chance * (1 + z * (1 - chance))


def defined_batch_norm_fusion_sums(grad, dynamic, static, norms):
    """With `s = silu(z)`, `t` its derivative and `r = relu(z)` of the static, the sums over the map
    of `g*s, g*r, g*t, t, g*t*(x - m), t*(x - m)`, `[N, 6, C]`."""
    s, r = _contexts(dynamic, static, norms)
    g, t = _wide(grad), _slope(_normed(dynamic, norms[:3]))
    centred = _wide(dynamic) - _rows(norms)[0]
    terms = (g * s, g * r, g * t, t, g * t * centred, t * centred)
    return torch.stack([term.sum((2, 3)) for term in terms], dim=1)


def defined_batch_norm_fusion_backward(grad, dynamic, norm, attention):
    """Gradients of the dynamic context, and of the static one after its norm and ReLU. The norm has
    five rows; attention `[N, 3, C]` has p0, p1 and q, the gradient that the pooling hands to every
    pixel."""
    m, a, _, c, d = _rows(norm)
    p0, p1, q = _rows(attention)
    g = _wide(grad)
    grad_z = _slope(_normed(dynamic, norm)) * (p0 * g + q)
    grad_dynamic = a * (grad_z - c - (_wide(dynamic) - m) * d)
    return grad_dynamic.to(dynamic.dtype), (p1 * g + q).to(dynamic.dtype)


# ---- a BatchNorm as a norm -----------------------------------------------------------------------


class Norm(NamedTuple):
    """What `nn.BatchNorm2d` does to one map, as numbers.

    Attributes:
        table: the norm `[3, C]`.
        factor: `1 / sqrt(variance + eps)`, `[C]`.
        count: values of a channel behind mean and variance; 0 where these are given numbers.
    """

    table: Tensor
    factor: Tensor
    count: int

    def backward(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The norm with five rows, and the gradients of weight and bias, from the sums over all
        images of `grad_z` and `grad_z * (x - m)`, `[2, C]`."""
        if self.count:
            rest = torch.stack([sums[0], sums[1] * self.factor.square()]) / self.count
        else:
            rest = torch.zeros_like(sums)
        return torch.cat([self.table, rest]), sums[1] * self.factor, sums[0]


def uses_batch(module: nn.BatchNorm2d) -> bool:
    """Whether the module normalises with the statistics of the batch."""
    return module.training or module.running_mean is None


def norm_of(module: nn.BatchNorm2d, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Norm:
    """The norm of `module` for a map; its running statistics are updated as by `module(x)`."""
    if uses_batch(module):
        mean, variance = _ops.batch_norm_statistics(x)
        count = x.numel() // x.shape[1]
        update_running(module, mean, variance, count)
    else:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean, variance = module.running_mean.to(wide), module.running_var.to(wide)
        count = 0
    factor = (variance + module.eps).rsqrt()
    scale = factor if weight is None else factor * weight
    shift = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    return Norm(torch.stack([mean, scale, shift]), factor, count)


def update_running(module: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """As `nn.BatchNorm2d.forward`: an exponential average, with `momentum=None` a cumulative one,
    and the unbiased variance."""
    if not module.training or not module.track_running_stats or module.running_mean is None:
        return
    share = module.momentum
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if share is None:
            share = 1.0 / float(module.num_batches_tracked)
    if share is None:
        share = 0.0
    unbiased = variance * (count / max(count - 1, 1))
    for running, new in ((module.running_mean, mean), (module.running_var, unbiased)):
        running.copy_(running.to(new.dtype) * (1 - share) + share * new)


# ---- checks and fakes ----------------------------------------------------------------------------


def _table(name: str, table: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
    wanted = torch.float64 if like.dtype == torch.float64 else torch.float32
    if table.dtype != wanted:
        raise TypeError(f"{name} must be {wanted}, got {table.dtype}")
    if table.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {table.device}")
    if tuple(table.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(table.shape)}")


def _empty_map(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=_checks.memory_format(like))


def _empty_table(like: Tensor, *shape: int) -> Tensor:
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty(shape, dtype=wide)


@torch.library.register_fake("cotnet_ext::batch_norm_statistics")
def _(input):
    _checks.maps(input=input)
    return _empty_table(input, input.shape[1]), _empty_table(input, input.shape[1])


@torch.library.register_fake("cotnet_ext::batch_norm")
def _(input, norm, relu):
    _checks.maps(input=input)
    _table("norm", norm, input, (3, input.shape[1]))
    return _empty_map(input)


@torch.library.register_fake("cotnet_ext::batch_norm_sums")
def _(grad, input, norm, relu):
    _checks.maps(input=input, grad=grad)
    _table("norm", norm, input, (3, input.shape[1]))
    return _empty_table(input, input.shape[0], 2, input.shape[1])


@torch.library.register_fake("cotnet_ext::batch_norm_backward")
def _(grad, input, norm, relu):
    _checks.maps(input=input, grad=grad)
    _table("norm", norm, input, (5, input.shape[1]))
    return _empty_map(input)


@torch.library.register_fake("cotnet_ext::batch_norm_fusion_pool")
def _(dynamic, static, norms):
    _checks.maps(dynamic=dynamic, static=static)
    n, channels = dynamic.shape[:2]
    _table("norms", norms, dynamic, (6, channels))
    return _empty_table(dynamic, n, channels)


@torch.library.register_fake("cotnet_ext::batch_norm_fusion")
def _(dynamic, static, norms, attention):
    _checks.maps(dynamic=dynamic, static=static)
    n, channels = dynamic.shape[:2]
    _table("norms", norms, dynamic, (6, channels))
    _table("attention", attention, dynamic, (n, 2, channels))
    return _empty_map(dynamic)


@torch.library.register_fake("cotnet_ext::batch_norm_fusion_sums")
def _(grad, dynamic, static, norms):
    _checks.maps(dynamic=dynamic, static=static, grad=grad)
    n, channels = dynamic.shape[:2]
    _table("norms", norms, dynamic, (6, channels))
    return _empty_table(dynamic, n, 6, channels)


@torch.library.register_fake("cotnet_ext::batch_norm_fusion_backward")
def _(grad, dynamic, norm, attention):
    _checks.maps(dynamic=dynamic, grad=grad)
    n, channels = dynamic.shape[:2]
    _table("norm", norm, dynamic, (5, channels))
    _table("attention", attention, dynamic, (n, 3, channels))
    return _empty_map(dynamic), _empty_map(dynamic)


# ---- derivatives and batching --------------------------------------------------------------------


def _differentiate(name: str, definition: Callable) -> None:
    """Registers the derivatives of the operator as those of its definition."""

    def setup_context(ctx, inputs, output):
        ctx.places = [i for i, arg in enumerate(inputs) if isinstance(arg, Tensor)]
        ctx.others = {i: arg for i, arg in enumerate(inputs) if not isinstance(arg, Tensor)}
        ctx.save_for_backward(*(inputs[i] for i in ctx.places))

    def backward(ctx, *grads):
        def defined(*tensors):
            arguments = {**ctx.others, **dict(zip(ctx.places, tensors, strict=True))}
            return definition(*(arguments[i] for i in range(len(arguments))))

        _, pull_back = torch.func.vjp(defined, *ctx.saved_tensors)
        given = dict(zip(ctx.places, pull_back(grads if len(grads) > 1 else grads[0]), strict=True))
        return tuple(given.get(i) for i in range(len(given) + len(ctx.others)))

    torch.library.register_autograd(f"cotnet_ext::{name}", backward, setup_context=setup_context)


def _loop(op: Callable, info, in_dims, *args):
    """One call for each element of a mapped dimension: statistics are those of one batch."""

    def element(i):
        return (
            arg.select(dim, i) if isinstance(arg, Tensor) and dim is not None else arg
            for arg, dim in zip(args, in_dims, strict=True)
        )

    results = [op(*element(i)) for i in range(info.batch_size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def _register(name: str) -> None:
    op = getattr(_ops, name)
    _differentiate(name, globals()[f"defined_{name}"])
    torch.library.register_vmap(op, lambda info, in_dims, *args: _loop(op, info, in_dims, *args))


for _name in _ops.BATCH_NORM:
    _register(_name)
