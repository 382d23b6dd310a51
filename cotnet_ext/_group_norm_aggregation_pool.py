"""An aggregation with all that follows it in a layer for evaluation: a summand for each channel,
the SiLU, and the mean over the map.

The operator `torch.ops.cotnet_ext.group_norm_aggregation_pool` is defined by
`defined_group_norm_aggregation_pool` below, from which its derivatives come as well. It is for
evaluation: gradients are those of the definition, at the cost of its parts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _checks, _ops
from ._autograd import composed_group_norm_aggregation
from ._batch_norm import _differentiate, _empty_table, _tables, _wide
from .functional import _autocast


def defined_group_norm_aggregation_pool(
    input, weight, norm_weight, norm_bias, shift, static, eps, *window
):
    """`silu(group_norm_aggregation(input, weight, ...) + shift)` `[N, G*C, Ho, Wo]`, and the mean
    over the map of it and `static` (None for 0), `[N, G*C]`."""
    summed = composed_group_norm_aggregation(input, weight, norm_weight, norm_bias, eps, *window)
    z = _wide(summed) + shift[:, None, None]
    output = z * z.sigmoid()
    means = output.mean((2, 3))
    if static is not None:
        means = means + _wide(static).mean((2, 3))
    return output.to(input.dtype), means


def group_norm_aggregation_pool(
    input: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    shift: Tensor,
    static: Tensor | None,
    eps: float,
    kernel_size: int,
) -> tuple[Tensor, Tensor]:
    """The dynamic context of a layer for evaluation, and the mean of both contexts over the map.

    .. code-block:: text

        output[n, c] = silu(group_norm_aggregation(input, weight, ...)[n, c] + shift[c])
        means[n, c]  = mean over the map of output[n, c] + static[n, c]

    Windows have stride 1 and are padded with zeros to the size of the map.

    Args:
        input: ``[N, C, H, W]``.
        weight: ``[N, G, Cw, K, H, W]`` with Cw dividing C.
        norm_weight, norm_bias: ``[G*Cw*K]``, or None for 1 and 0.
        shift: ``[G*C]``, cast to the type of sums (float32; float64 for float64).
        static: ``[N, G*C, H, W]``, or None for 0.
        eps: added to the variance.
        kernel_size: taps of a row and of a column.

    Returns:
        ``[N, G*C, H, W]`` and, in the type of sums, ``[N, G*C]``.

    Dtypes, memory formats, differentiability and errors as of the functions in ``functional``;
    where something is recorded or transformed, the parts run one by one.
    """
    arguments = _autocast(input, weight, norm_weight, norm_bias)
    (static,) = _autocast(static)
    wide = torch.float64 if arguments[0].dtype == torch.float64 else torch.float32
    arguments = (*arguments, shift.to(wide), static, eps)
    window = _checks.window(kernel_size, 1, kernel_size // 2, 1, "zeros")
    _check(*arguments, *window)
    if torch.compiler.is_compiling() and forward_ad._current_level < 0:
        return _ops.group_norm_aggregation_pool(*arguments, *window)
    if _is_watched(*arguments):
        return defined_group_norm_aggregation_pool(*arguments, *window)
    return _ops.below_autograd(_ops.group_norm_aggregation_pool, *arguments, *window)


def _is_watched(*arguments: object) -> bool:
    """Whether derivatives of the call may be asked for."""
    return (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or (
            torch.is_grad_enabled()
            and any(isinstance(arg, Tensor) and arg.requires_grad for arg in arguments)
        )
    )


def _check(input, weight, norm_weight, norm_bias, shift, static, eps, *window) -> tuple[int, ...]:
    parameters = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    shape = _checks.aggregation(input, weight, window, optional={**parameters, "static": static})
    _checks.norm_parameters(weight, parameters)
    _tables(input, shift=(shift, (shape[1],)))
    if static is not None and tuple(static.shape) != shape:
        raise ValueError(f"static must be {list(shape)}, got {list(static.shape)}")
    return shape


@torch.library.register_fake("cotnet_ext::group_norm_aggregation_pool")
def _(input, *arguments):
    n, c, h, w = _check(input, *arguments)
    output = _ops._empty(input, (n, c, h, w), _checks.memory_format(input))
    return output, _empty_table(input, n, c)


_differentiate("group_norm_aggregation_pool", defined_group_norm_aggregation_pool)
