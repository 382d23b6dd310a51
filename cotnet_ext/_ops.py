"""The registered operators ``torch.ops.cotnet_ext.*``: loading the library, fake kernels and
batching rules.

The names below are the raw overloads: they check again in C++, allocate their outputs and compute.
Fake kernels return what the real ones return, strides included.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from . import _checks

try:
    from . import _C  # noqa: F401  (loading it registers the operators)
except ImportError as error:
    raise ImportError(
        f"cotnet_ext's compiled library could not be loaded under torch {torch.__version__}: "
        f"{error}. It needs torch >= 2.10; reinstall it in this environment with "
        "`pip install --no-build-isolation --force-reinstall --no-deps .`"
    ) from error

_ops = torch.ops.cotnet_ext

local_aggregation = _ops.local_aggregation.default
local_aggregation_grad_input = _ops.local_aggregation_grad_input.default
local_aggregation_grad_weight = _ops.local_aggregation_grad_weight.default
local_aggregation_backward = _ops.local_aggregation_backward.default
softmax_aggregation = _ops.softmax_aggregation.default
softmax_aggregation_backward = _ops.softmax_aggregation_backward.default
group_norm_aggregation = _ops.group_norm_aggregation.default
group_norm_aggregation_backward = _ops.group_norm_aggregation_backward.default
group_norm_aggregation_pool = _ops.group_norm_aggregation_pool.default
spatial_softmax_gate = _ops.spatial_softmax_gate.default
spatial_softmax_gate_backward = _ops.spatial_softmax_gate_backward.default
context_fusion = _ops.context_fusion.default
context_fusion_backward = _ops.context_fusion_backward.default

# The parts of a fused layer; `_batch_norm` says what they are.
BATCH_NORM = (
    "batch_norm_statistics",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_fusion_pool",
    "batch_norm_fusion",
    "batch_norm_fusion_sums",
    "batch_norm_fusion_backward",
)
for _name in BATCH_NORM:
    globals()[_name] = getattr(_ops, _name).default


def below_autograd(op: Callable, *args):
    """Calls ``op`` where no gradient is recorded for it: skips the layer that ``register_autograd``
    puts before every call of the raw operator, half of the cost of a small one."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def must_compose() -> bool:
    """Whether a backward is differentiated again, or runs under ``torch.func``."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def gradient_by_gradient(backward: Callable) -> Callable:
    """For the ``backward(ctx, *grads)`` of a ``Function`` that PyTorch cannot map over: of batches
    of gradients (``is_grads_batched``, ``jacobian`` with ``vectorize=True``) it gets one at a time.
    A gradient that nobody asks for may be None. ``ctx.once`` says whether there is but one."""

    @functools.wraps(backward)
    def mapped(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        batched = [
            grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads
        ]
        ctx.once = not any(batched)
        if ctx.once:
            return backward(ctx, *grads)
        level = torch._C._vmapmode_increment_nesting() - 1  # the level that we are at
        torch._C._vmapmode_decrement_nesting()
        rows = [
            torch._remove_batch_dim(grad, level, 1, 0).unbind()
            if several
            else itertools.repeat(grad)
            for grad, several in zip(grads, batched, strict=True)
        ]
        results = [backward(ctx, *each) for each in zip(*rows, strict=False)]
        return tuple(
            None if each[0] is None else torch._add_batch_dim(torch.stack(each), 0, level)
            for each in zip(*results, strict=True)
        )

    return mapped


@functools.cache
def build_info() -> dict[str, object]:
    """What was compiled: version, CUDA (bool, version, architectures), oldest torch, compiler,
    vector width in use."""
    raw = dict(line.split("=", 1) for line in _ops.build_info().splitlines())
    return {
        "version": raw["version"],
        "cuda": bool(raw["cuda_version"]),
        "cuda_version": raw["cuda_version"] or None,
        "cuda_archs": raw["cuda_archs"].split(),
        "torch_target": raw["torch_target"],
        "compiler": raw["compiler"],
        "cpu_capability": raw["cpu_capability"],
    }


# ---- fake kernels --------------------------------------------------------------------------------


def _empty(like: Tensor, shape: tuple[int, ...], memory_format: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _empty_weight(
    like: Tensor, shape: tuple[int, ...], memory_format: torch.memory_format
) -> Tensor:
    n, g, cw, k, h, w = shape
    return _empty(like, (n, g * cw * k, h, w), memory_format).view(shape)


def _empty_like_weight(like: Tensor, weight: Tensor, memory_format: torch.memory_format) -> Tensor:
    n, g, cw, k, h, w = weight.shape
    if memory_format == torch.channels_last and _checks.tap_major(weight):
        return _empty_weight(like, (n, g, k, cw, h, w), memory_format).transpose(2, 3)
    return _empty_weight(like, (n, g, cw, k, h, w), memory_format)


def _masked(like: Tensor, asked: bool, make: Callable[[], Tensor]) -> Tensor:
    return make() if asked else like.new_empty(0)


def _statistics(weight: Tensor) -> Tensor:
    n, g, cw = weight.shape[:3]
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.new_empty((n, g * cw), dtype=dtype)


@torch.library.register_fake("cotnet_ext::local_aggregation")
def _(input, weight, *window):
    return _empty(input, _checks.aggregation(input, weight, window), _checks.memory_format(input))


@torch.library.register_fake("cotnet_ext::local_aggregation_grad_input")
def _(grad, weight, input_size, *window):
    _checks.alike(grad=grad, weight=weight)
    shape = (grad.shape[0], grad.shape[1] // weight.shape[1], *input_size)
    return _empty(grad, shape, _checks.memory_format(grad))


@torch.library.register_fake("cotnet_ext::local_aggregation_grad_weight")
def _(grad, input, weight_channels, kernel_size, *_):
    _checks.alike(grad=grad, input=input)
    n, channels, ho, wo = grad.shape
    shape = (
        n,
        channels // input.shape[1],
        weight_channels,
        kernel_size[0] * kernel_size[1],
        ho,
        wo,
    )
    return _empty_weight(input, shape, _checks.memory_format(input))


@torch.library.register_fake("cotnet_ext::local_aggregation_backward")
def _(grad, input, weight, *window):
    return _aggregation_grads(grad, input, weight, window, (True, True))


@torch.library.register_fake("cotnet_ext::softmax_aggregation")
def _(input, logits, *window):
    return _empty(
        input, _checks.aggregation(input, logits, window, "logits"), _checks.memory_format(input)
    )


@torch.library.register_fake("cotnet_ext::softmax_aggregation_backward")
def _(grad, input, logits, *window_and_mask):
    *window, mask = window_and_mask
    return _aggregation_grads(grad, input, logits, window, mask)


def _aggregation_grads(grad, input, weight, window, mask):
    _checks.aggregation(input, weight, window)
    _checks.alike(input=input, grad=grad)
    memory_format = _checks.memory_format(input)
    return (
        _masked(input, mask[0], lambda: _empty(input, tuple(input.shape), memory_format)),
        _masked(input, mask[1], lambda: _empty_like_weight(input, weight, memory_format)),
    )


@torch.library.register_fake("cotnet_ext::group_norm_aggregation")
def _(input, weight, norm_weight, norm_bias, eps, *window):
    parameters = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    shape = _checks.aggregation(input, weight, window, optional=parameters)
    _checks.norm_parameters(weight, parameters)
    return (
        _empty(input, shape, _checks.memory_format(input)),
        _statistics(weight),
        _statistics(weight),
    )


@torch.library.register_fake("cotnet_ext::group_norm_aggregation_backward")
def _(grad, input, weight, mean, rstd, norm_weight, norm_bias, *window_mask_eps):
    *window, mask, _ = window_mask_eps
    taps = (weight.shape[1] * weight.shape[2] * weight.shape[3],)
    return (
        *_aggregation_grads(grad, input, weight, window, mask),
        _masked(input, mask[2], lambda: input.new_empty(taps)),
        _masked(input, mask[3], lambda: input.new_empty(taps)),
    )


@torch.library.register_fake("cotnet_ext::spatial_softmax_gate")
def _(logits, value, static):
    _checks.maps(logits=logits, value=value, static=static)
    return _empty(logits, tuple(logits.shape), _checks.memory_format(logits))


@torch.library.register_fake("cotnet_ext::spatial_softmax_gate_backward")
def _(grad, logits, value, mask):
    _checks.maps(logits=logits, value=value, grad=grad)
    memory_format = _checks.memory_format(logits)
    return tuple(
        _masked(logits, asked, lambda: _empty(logits, tuple(logits.shape), memory_format))
        for asked in mask
    )


@torch.library.register_fake("cotnet_ext::context_fusion")
def _(dynamic, static, logits):
    _checks.maps(dynamic=dynamic, static=static)
    _checks.alike(dynamic=dynamic, logits=logits)
    _checks.fusion_logits(dynamic, logits)
    return _empty(dynamic, tuple(dynamic.shape), _checks.memory_format(dynamic))


@torch.library.register_fake("cotnet_ext::context_fusion_backward")
def _(grad, dynamic, static, logits, mask):
    _checks.maps(dynamic=dynamic, static=static, grad=grad)
    memory_format = _checks.memory_format(dynamic)
    maps = (
        _masked(dynamic, asked, lambda: _empty(dynamic, tuple(dynamic.shape), memory_format))
        for asked in mask[:2]
    )
    return *maps, _masked(dynamic, mask[2], lambda: dynamic.new_empty(tuple(logits.shape)))


# ---- batching: a vmapped dimension is more batch -------------------------------------------------


def _fold_into_batch(op, info, in_dims, *args):
    """Every map and weight starts with N, so a mapped dimension folds into it and one call serves
    all."""
    size = info.batch_size

    def fold(arg, dim):
        if not isinstance(arg, Tensor) or (
            dim is None and arg.dim() == 1
        ):  # numbers, parameters of a norm
            return arg
        batched = arg.unsqueeze(0).expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
        return batched.flatten(0, 1)

    result = op(*map(fold, args, in_dims))
    several = isinstance(result, tuple)
    outputs = result if several else (result,)
    # A gradient that was not asked for is an empty vector, with no batch to unfold.
    mapped = tuple(0 if output.dim() > 1 else None for output in outputs)
    unfolded = tuple(
        output if dim is None else output.unflatten(0, (size, output.shape[0] // size))
        for output, dim in zip(outputs, mapped, strict=True)
    )
    return (unfolded, mapped) if several else (unfolded[0], mapped[0])


def _fold_or_loop(op, info, in_dims, *args):
    """Parameters of a norm have no batch dimension: where they, or their gradients, are mapped, one
    call per element."""
    mapped_parameter = any(
        isinstance(arg, Tensor) and dim is not None and arg.dim() == 2
        for arg, dim in zip(args, in_dims, strict=True)
    )
    forward = op is not group_norm_aggregation_backward
    if forward and not mapped_parameter:
        return _fold_into_batch(op, info, in_dims, *args)

    def element(i):
        return (
            arg.select(dim, i) if isinstance(arg, Tensor) and dim is not None else arg
            for arg, dim in zip(args, in_dims, strict=True)
        )

    calls = [op(*element(i)) for i in range(info.batch_size)]
    return tuple(torch.stack(output) for output in zip(*calls, strict=True)), (0,) * len(calls[0])


for _op in (
    local_aggregation,
    local_aggregation_grad_input,
    local_aggregation_grad_weight,
    local_aggregation_backward,
    softmax_aggregation,
    softmax_aggregation_backward,
    spatial_softmax_gate,
    spatial_softmax_gate_backward,
    context_fusion,
    context_fusion_backward,
):
    torch.library.register_vmap(_op, functools.partial(_fold_into_batch, _op))
for _op in (
    group_norm_aggregation,
    group_norm_aggregation_backward,
    group_norm_aggregation_pool,
):
    torch.library.register_vmap(_op, functools.partial(_fold_or_loop, _op))
