"""Convolutions of a layer with the norm and the ReLU behind them, computed from the parameters of
submodules that are as they were made; others are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._norm_relu import can_normalise, norm_relu
from ._plain import is_plain as _is_plain
from ._pointwise import pointwise, pointwise_sums


def _is_plain_sequence(module: nn.Module, length: int) -> bool:
    return _is_plain(module, nn.Sequential) and len(module) == length


def _is_plain_pointwise(module: nn.Module, groups: int | None = None) -> bool:
    """Whether `module` is a 1x1 convolution that may be computed from its parameters."""
    return _is_plain_sampled(module) and module.stride == (1, 1) and groups in (None, module.groups)


def _is_plain_sampled(module: nn.Module) -> bool:
    """The same, of some of the pixels: with any stride."""
    return (
        _is_plain(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.padding == (0, 0)
    )


def _autocast_enabled(tensor: Tensor) -> bool:
    kind = tensor.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def _is_foldable(norm: nn.Module, weight: Tensor) -> bool:
    """Whether `norm` may be folded into the convolution with `weight` before it.

    Only in evaluation without gradients, so that what is recorded or traced is what the modules
    say, and in the full dtypes, where rounding the product of weight and factor loses nothing.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and _is_plain(norm, nn.BatchNorm2d)
        and not norm.training
        and norm.running_mean is not None
        and weight.dtype == norm.running_mean.dtype
        and weight.dtype in (torch.float32, torch.float64)
        and not _autocast_enabled(weight)
    )


def _fold(norm: nn.BatchNorm2d, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight `[O, ...]` and bias `[O]` of a convolution that does what `norm` did after it."""
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    mean = norm.running_mean if bias is None else norm.running_mean - bias
    start = torch.zeros_like(mean) if norm.bias is None else norm.bias
    shift = torch.addcmul(start, mean, factor, value=-1)
    return weight * factor.view(-1, *(1,) * (weight.dim() - 1)), shift


def _run(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, with 1x1 convolutions as `pointwise` and BatchNorms folded where allowed."""
    if _is_plain_pointwise(module):
        return _convolve(module, None, x)
    return run_parts(module, x) if _is_plain(module, nn.Sequential) else module(x)


def run_parts(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What the modules do one after the other, as `_run` does it."""
    parts = list(modules)
    ours = False  # whether x is a result of this function, which nobody else sees
    while parts:
        part = parts.pop(0)
        if ours and _is_plain(part, nn.ReLU) and not torch.is_grad_enabled():
            x = x.relu_()
            continue
        if can_normalise(part, x):
            rectifies = bool(parts) and _is_plain(parts[0], nn.ReLU)
            x, ours = norm_relu(part, x, rectifies), False
            parts = parts[rectifies:]
            continue
        if _is_plain(part, nn.Sequential):
            x, ours = run_parts(part, x), False
            continue
        if not _is_plain(part, nn.Conv2d) or part.padding_mode != "zeros":
            x, ours = part(x), False
            continue
        ours = True
        folds = bool(parts) and _is_foldable(parts[0], part.weight)
        x = _convolve(part, parts.pop(0) if folds else None, x)
    return x


def _convolve(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, x: Tensor) -> Tensor:
    """A plain convolution, and `norm` folded into it."""
    weight, bias = conv.weight, conv.bias
    if norm is not None:
        weight, bias = _fold(norm, weight, bias)
    if _is_plain_sampled(conv) and (conv.stride == (1, 1) or x.device.type == "cpu"):
        vertical, horizontal = conv.stride
        x = x[:, :, ::vertical, ::horizontal] if conv.stride != (1, 1) else x
        return pointwise([x], [weight.flatten(1)], bias, conv.groups)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _fold_if_allowed(
    conv: nn.Conv2d, norm: nn.Module
) -> tuple[Tensor, Tensor | None, nn.Module | None]:
    """Weight `[O, C // groups]` and bias of a plain 1x1 convolution, and what is left of `norm`."""
    weight = conv.weight.flatten(1)
    if _is_foldable(norm, weight):
        return *_fold(norm, weight, conv.bias), None
    return weight, conv.bias, norm


def _finish(x: Tensor, norm: nn.Module | None, act: nn.Module | None = None) -> Tensor:
    """`act(norm(x))` for an `x` that nobody else sees; `norm` is None where it was folded."""
    rectifies = act is not None and _is_plain(act, nn.ReLU)
    if norm is None and rectifies:
        return x.relu_()
    if norm is not None and can_normalise(norm, x):
        x = norm_relu(norm, x, rectifies)
        return x if rectifies or act is None else act(x)
    x = x if norm is None else norm(x)
    return x if act is None else act(x)


def _is_joint(embed: nn.Module, length: int, values: nn.Module, groups: int) -> bool:
    """Whether the first convolutions of both sequences may be computed together by `_join`."""
    return (
        _is_plain_sequence(embed, length)
        and _is_plain_sequence(values, 2)
        and _is_plain_pointwise(embed[0], groups)
        and _is_plain_pointwise(values[0], groups)
    )


def _join(
    input: Tensor,
    static: Tensor,
    embed: nn.Sequential,
    values: nn.Sequential,
    split: Callable[[Tensor], list[Tensor]],
) -> tuple[Tensor, Callable[[], Tensor]]:
    """The first three modules of `embed` on both maps, and what gives `values` of the input.

    `split` gives the columns of a weight for the input, and those for static. The value is finished
    later so that in the backward its normalisation is done before the longer branch starts.
    """
    join, norm, act, *_ = embed
    conv, value_norm = values
    weight, bias, norm = _fold_if_allowed(join, norm)
    value_weight, value_bias, value_norm = _fold_if_allowed(conv, value_norm)
    hidden, value = pointwise_sums(
        [input, static], [split(weight), [value_weight, None]], [bias, value_bias], join.groups
    )
    return _finish(hidden, norm, act), lambda: _finish(value, value_norm)
