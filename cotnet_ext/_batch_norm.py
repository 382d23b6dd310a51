"""BatchNorm and what follows it in a contextual layer, in the parts that a fused layer is made of.

A *norm* is a table `[3, C]` of numbers of channels, with the rows m, a, b of

    z = (x - m) * a + b

For BatchNorm these are its mean, `weight * factor` with `factor = 1 / sqrt(variance + eps)`, and
its bias. Tables have the type of sums: float32, for float64 float64.

Each operator `torch.ops.cotnet_ext.NAME` is defined by `defined_NAME` below, from which its
derivatives come as well; layers have faster ones (`_training`).
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
    m, a, b = _rows(norm)
    return (_wide(x) - m) * a + b


def _contexts(dynamic, static, norm, static_norm) -> tuple[Tensor, Tensor]:
    z = _normed(dynamic, norm)
    return z * z.sigmoid(), _normed(static, static_norm).relu()


def defined_batch_norm_statistics(input, weight, bias, eps):
    """The norm `[3, C]` of the batch, its factor `[C]` and its variance `[C]`, the biased one. Mean
    and variance of nothing are 0."""
    x = _wide(input)
    count = max(x.numel() // max(x.shape[1], 1), 1)
    mean = x.sum((0, 2, 3)) / count
    variance = (x - mean[:, None, None]).square().sum((0, 2, 3)) / count
    factor = (variance + eps).rsqrt()
    scale = factor if weight is None else factor * weight
    shift = torch.zeros_like(mean) if bias is None else bias
    return torch.stack([mean, scale, shift]), factor, variance


def defined_batch_norm(input, norm, relu):
    """`z`, or `relu(z)`."""
    z = _normed(input, norm)
    return (z.relu() if relu else z).to(input.dtype)


def _through_norm(grad_z, input, norm, factor, batch):
    """Gradients of the map, the weight and the bias. With statistics of the batch, the mean of the
    gradient and its part along `x - m` do not count."""
    m, a, _ = _rows(norm)
    centred = _wide(input) - m
    grad_bias, with_x = grad_z.sum((0, 2, 3)), (grad_z * centred).sum((0, 2, 3))
    if batch:
        along = (with_x * factor.square())[:, None, None] * centred
        grad_z = grad_z - (grad_bias[:, None, None] + along) / (grad_z.numel() // grad_z.shape[1])
    return (a * grad_z).to(input.dtype), with_x * factor, grad_bias


def defined_batch_norm_backward(grad, input, norm, factor, relu, batch):
    """Gradients of `input`, and of weight and bias of the norm, `[C]`. `batch` says whether m and
    the factor are the batch's own."""
    grad_z = _wide(grad) * (_normed(input, norm) > 0) if relu else _wide(grad)
    return _through_norm(grad_z, input, norm, factor, batch)


def defined_batch_norm_fusion_pool(dynamic, static, norm, static_norm):
    """The mean over the map of `silu(z)` of the dynamic and `relu(z)` of the static, `[N, C]`."""
    s, r = _contexts(dynamic, static, norm, static_norm)
    return s.mean((2, 3)) + r.mean((2, 3))


def defined_batch_norm_fusion(dynamic, static, norm, static_norm, attention):
    """Both contexts, weighted with the two rows of attention, `[N, 2, C]`."""
    s, r = _contexts(dynamic, static, norm, static_norm)
    p0, p1 = _rows(attention)
    return (p0 * s + p1 * r).to(dynamic.dtype)


def _slope(z: Tensor) -> Tensor:
    """The derivative of silu."""
    chance = z.sigmoid()
    return chance * (1 + z * (1 - chance))


def defined_batch_norm_fusion_sums(grad, dynamic, static, norm, static_norm):
    """With `s = silu(z)`, `t` its derivative and `r = relu(z)` of the static, the sums over the map
    of `g*s, g*r, g*t, t, g*t*(x - m), t*(x - m)`, `[N, 6, C]`."""
    s, r = _contexts(dynamic, static, norm, static_norm)
    g, t = _wide(grad), _slope(_normed(dynamic, norm))
    centred = _wide(dynamic) - _rows(norm)[0]
    terms = (g * s, g * r, g * t, t, g * t * centred, t * centred)
    return torch.stack([term.sum((2, 3)) for term in terms], dim=1)


def defined_batch_norm_fusion_backward(grad, dynamic, norm, factor, attention, pooled, sums, batch):
    """Gradients of the dynamic context, of the static one after its norm and ReLU, and of weight
    and bias of the norm. `pooled [N, C]` is the gradient that the pooling hands to every pixel. The
    definition needs no `sums` (those of `batch_norm_fusion_sums`): they follow from the rest."""
    p0, p1 = _rows(attention)
    g, q = _wide(grad), pooled[..., None, None]
    grad_z = _slope(_normed(dynamic, norm)) * (p0 * g + q)
    grad_static = (p1 * g + q).to(dynamic.dtype)
    grad_dynamic, *of_norm = _through_norm(grad_z, dynamic, norm, factor, batch)
    return grad_dynamic, grad_static, *of_norm


# ---- a BatchNorm as a norm -----------------------------------------------------------------------


class Norm(NamedTuple):
    """What `nn.BatchNorm2d` does to one map, as numbers.

    Attributes:
        table: the norm `[3, C]`.
        factor: `1 / sqrt(variance + eps)`, `[C]`.
        batch: whether mean and variance are the batch's own.
    """

    table: Tensor
    factor: Tensor
    batch: bool


def uses_batch(module: nn.BatchNorm2d) -> bool:
    """Whether the module normalises with the statistics of the batch."""
    return module.training or module.running_mean is None


def norm_of(module: nn.BatchNorm2d, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Norm:
    """The norm of `module` for a map; its running statistics are updated as by `module(x)`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = None if weight is None else weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    if uses_batch(module):
        table, factor, variance = _ops.below_autograd(
            _ops.batch_norm_statistics, x, weight, bias, module.eps
        )
        update_running(module, table[0], variance, x.numel() // x.shape[1])
        return Norm(table, factor, True)
    mean = module.running_mean.to(wide)
    factor = (module.running_var.to(wide) + module.eps).rsqrt()
    scale = factor if weight is None else factor * weight
    shift = torch.zeros_like(mean) if bias is None else bias
    return Norm(torch.stack([mean, scale, shift]), factor, False)


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
    share = share or 0.0
    unbiased = share * count / max(count - 1, 1)
    _average(module.running_mean, mean, share, share)
    _average(module.running_var, variance, share, unbiased)


def _average(running: Tensor, new: Tensor, share: float, factor: float) -> None:
    if running.dtype == new.dtype:
        running.mul_(1 - share).add_(new, alpha=factor)
    else:  # rounded once
        running.copy_(running.to(new.dtype).mul_(1 - share).add_(new, alpha=factor))


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


def _tables(like: Tensor, /, **tables: tuple[Tensor | None, tuple[int, ...]]) -> None:
    for name, (table, shape) in tables.items():
        if table is not None:
            _table(name, table, like, shape)


@torch.library.register_fake("cotnet_ext::batch_norm_statistics")
def _(input, weight, bias, eps):
    _checks.maps(input=input)
    c = input.shape[1]
    _tables(input, weight=(weight, (c,)), bias=(bias, (c,)))
    return tuple(_empty_table(input, *shape) for shape in ((3, c), (c,), (c,)))


@torch.library.register_fake("cotnet_ext::batch_norm")
def _(input, norm, relu):
    _checks.maps(input=input)
    _tables(input, norm=(norm, (3, input.shape[1])))
    return _empty_map(input)


@torch.library.register_fake("cotnet_ext::batch_norm_backward")
def _(grad, input, norm, factor, relu, batch):
    _checks.maps(input=input, grad=grad)
    c = input.shape[1]
    _tables(input, norm=(norm, (3, c)), factor=(factor, (c,)))
    return _empty_map(input), _empty_table(input, c), _empty_table(input, c)


def _check_contexts(dynamic, static, norm, static_norm, **more) -> tuple[int, int]:
    _checks.maps(dynamic=dynamic, static=static, **more)
    n, c = dynamic.shape[:2]
    _tables(dynamic, norm=(norm, (3, c)), static_norm=(static_norm, (3, c)))
    return n, c


@torch.library.register_fake("cotnet_ext::batch_norm_fusion_pool")
def _(dynamic, static, norm, static_norm):
    n, c = _check_contexts(dynamic, static, norm, static_norm)
    return _empty_table(dynamic, n, c)


@torch.library.register_fake("cotnet_ext::batch_norm_fusion")
def _(dynamic, static, norm, static_norm, attention):
    n, c = _check_contexts(dynamic, static, norm, static_norm)
    _tables(dynamic, attention=(attention, (n, 2, c)))
    return _empty_map(dynamic)


@torch.library.register_fake("cotnet_ext::batch_norm_fusion_sums")
def _(grad, dynamic, static, norm, static_norm):
    n, c = _check_contexts(dynamic, static, norm, static_norm, grad=grad)
    return _empty_table(dynamic, n, 6, c)


@torch.library.register_fake("cotnet_ext::batch_norm_fusion_backward")
def _(grad, dynamic, norm, factor, attention, pooled, sums, batch):
    _checks.maps(dynamic=dynamic, grad=grad)
    n, c = dynamic.shape[:2]
    _tables(
        dynamic,
        norm=(norm, (3, c)),
        factor=(factor, (c,)),
        attention=(attention, (n, 2, c)),
        pooled=(pooled, (n, c)),
        sums=(sums, (n, 6, c)),
    )
    of_norm = (_empty_table(dynamic, c) for _ in range(2))
    return _empty_map(dynamic), _empty_map(dynamic), *of_norm


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
