"""The operators of CoT networks as functions: stateless, differentiable to any order, on CPU and
CUDA.

What holds for all of them:

* dtypes float64, float32, float16, bfloat16; sums are kept in float32 (float64 for float64) and the
  result has the arguments' dtype. Under ``torch.autocast`` floating arguments other than float64
  are cast to the autocast dtype first.
* contiguous and ``channels_last`` maps run natively and the result keeps the first map's memory
  format; other strides are accepted and copied.
* reverse mode of any order, forward mode, ``torch.func`` transforms,
  ``torch.compile(fullgraph=True, dynamic=True)`` and ``torch.export``. (A backward *of* a backward
  through ``torch.compile`` is refused by PyTorch's AOTAutograd.)
* the same bits on every run: nothing is summed in an order that depends on timing.
* ``TypeError`` for a wrong type or dtype, ``ValueError`` for wrong shapes, sizes, devices or modes,
  raised before anything is computed.

Dimensions: N batch, C channels, G heads, Cw weight channels, K = kh*kw taps (row by row), H x W the
input map, Ho x Wo the output map.

Source: Li, Yao, Pan and Mei, "Contextual Transformer Networks for Visual Recognition",
arXiv:2107.12292; the operators are those of its published code, JDAI-CV/CoTNet.
``local_aggregation`` goes back to Zhao, Jia and Koltun, "Exploring Self-attention for Image
Recognition" (SAN), arXiv:2004.13621.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _autograd, _checks, _ops

__all__ = [
    "context_fusion",
    "group_norm_aggregation",
    "local_aggregation",
    "softmax_aggregation",
    "spatial_softmax_gate",
]

_IntPair = int | tuple[int, int]


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the autocast dtype of the first one's device, where autocast is on."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else None
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )


def _call(function: type, op: Callable, composed: Callable, *args):
    """Picks the layer that this context differentiates: forward mode the composition, a compiled
    graph and code without gradients the operator itself, everything else the
    ``autograd.Function``."""
    if forward_ad._current_level >= 0:
        return composed(*args)
    if torch.compiler.is_compiling():
        return op(*args)
    if torch.is_grad_enabled():
        return function.apply(*args)
    return _ops.below_autograd(op, *args)


def _attempt(op: Callable, first: Tensor, second: Tensor, window: tuple) -> Tensor | None:
    """The result where nothing is recorded, traced or cast; None where that is not so, or the
    operator refuses: the checks in Python, a third of a small call's time, then say why."""
    if (
        type(first) is not Tensor
        or type(second) is not Tensor
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or first.device.type not in ("cpu", "cuda")
        or torch.is_autocast_enabled(first.device.type)
    ):
        return None
    try:
        return _ops.below_autograd(op, first, second, *window)
    except RuntimeError:
        return None


def local_aggregation(
    input: Tensor,
    weight: Tensor,
    kernel_size: _IntPair = 3,
    stride: _IntPair = 1,
    padding: _IntPair = 0,
    dilation: _IntPair = 1,
    *,
    padding_mode: str = "zeros",
) -> Tensor:
    r"""Sums a window of ``input`` with weights of its own at every position.

    .. code-block:: text

        y[n, g*C + c, i, j] = sum over (u, v) of
            weight[n, g, c % Cw, u*kw + v, i, j] * input[n, c, i*sh - ph + u*dh, j*sw - pw + v*dw]

    A cross-correlation (no flip). Channels share weights interleaved: channel c uses weight channel
    ``c % Cw``.

    Args:
        input: ``[N, C, H, W]``.
        weight: ``[N, G, Cw, K, Ho, Wo]`` with Cw dividing C; a view of a convolution's
            ``[N, G*Cw*K, Ho, Wo]`` output in either memory format is used as it is.
        kernel_size, stride, padding, dilation: an int, or a pair (rows, columns). Any kernel size,
            odd or even.
        padding_mode: ``"zeros"``, or ``"reflect"`` as :func:`torch.nn.functional.pad` reflects
            (padding < size).

    Returns:
        ``[N, G*C, Ho, Wo]``, heads outermost, with ``Ho = (H + 2*ph - dh*(kh - 1) - 1) // sh + 1``
        and Wo alike.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is not as above.
    """
    window = _checks.window(kernel_size, stride, padding, dilation, padding_mode)
    result = _attempt(_ops.local_aggregation, input, weight, window)
    if result is not None:
        return result
    input, weight = _autocast(input, weight)
    _checks.aggregation(input, weight, window)
    return _call(
        _autograd.LocalAggregation,
        _ops.local_aggregation,
        _autograd.composed_local_aggregation,
        input,
        weight,
        *window,
    )


def softmax_aggregation(
    input: Tensor,
    logits: Tensor,
    kernel_size: _IntPair = 3,
    stride: _IntPair = 1,
    padding: _IntPair = 0,
    dilation: _IntPair = 1,
    *,
    padding_mode: str = "zeros",
) -> Tensor:
    r"""``local_aggregation(input, logits.softmax(dim=3), ...)`` in one kernel.

    .. code-block:: text

        p[n, g, m, t, i, j] = exp(logits[n, g, m, t, i, j])
                              / sum over s of exp(logits[n, g, m, s, i, j])

    The probabilities are never written to memory, forward or backward; ``input`` and ``logits`` are
    what is saved. Large logits do not overflow and ``-inf`` is legal (weight 0).

    Args:
        input: ``[N, C, H, W]``.
        logits: ``[N, G, Cw, K, Ho, Wo]`` with Cw dividing C.
        kernel_size, stride, padding, dilation, padding_mode: as in :func:`local_aggregation`.

    Returns:
        ``[N, G*C, Ho, Wo]``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is not as above.
    """
    input, logits = _autocast(input, logits)
    window = _checks.window(kernel_size, stride, padding, dilation, padding_mode)
    _checks.aggregation(input, logits, window, "logits")
    return _call(
        _autograd.SoftmaxAggregation,
        _ops.softmax_aggregation,
        _autograd.composed_softmax_aggregation,
        input,
        logits,
        *window,
    )


def group_norm_aggregation(
    input: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    kernel_size: _IntPair = 3,
    stride: _IntPair = 1,
    padding: _IntPair = 0,
    dilation: _IntPair = 1,
    *,
    padding_mode: str = "zeros",
) -> Tensor:
    r"""``local_aggregation(input, w_hat, ...)`` with ``w_hat`` the group-normalised ``weight``.

    .. code-block:: text

        w_hat[n, g, m, t, i, j] = (weight[n, g, m, t, i, j] - mean[n, g, m])
                                  / sqrt(var[n, g, m] + eps)
                                  * norm_weight[(g*Cw + m)*K + t] + norm_bias[(g*Cw + m)*K + t]

    that is :func:`torch.nn.functional.group_norm` with G*Cw groups on ``weight`` seen as
    ``[N, G*Cw*K, Ho, Wo]``: one group is the K taps of one weight channel over the whole map. The
    normalised weights are never written to memory; ``input``, ``weight`` and two numbers per group
    are what is saved.

    Args:
        input: ``[N, C, H, W]``.
        weight: ``[N, G, Cw, K, Ho, Wo]`` with Cw dividing C.
        norm_weight, norm_bias: ``[G*Cw*K]``, or None for 1 and 0.
        eps: added to the variance.
        kernel_size, stride, padding, dilation, padding_mode: as in :func:`local_aggregation`.

    Returns:
        ``[N, G*C, Ho, Wo]``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is not as above.
    """
    input, weight, norm_weight, norm_bias = _autocast(input, weight, norm_weight, norm_bias)
    window = _checks.window(kernel_size, stride, padding, dilation, padding_mode)
    _checks.number("eps", eps)
    parameters = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    _checks.aggregation(input, weight, window, optional=parameters)
    _checks.norm_parameters(weight, parameters)
    result = _call(
        _autograd.GroupNormAggregation,
        _ops.group_norm_aggregation,
        _autograd.composed_group_norm_aggregation,
        input,
        weight,
        norm_weight,
        norm_bias,
        eps,
        *window,
    )
    return result[0] if isinstance(result, tuple) else result


def spatial_softmax_gate(logits: Tensor, value: Tensor, static: Tensor) -> Tensor:
    r"""Gates ``value`` with a softmax over the whole map and adds it to ``static``.

    .. code-block:: text

        y[n, c, i, j] = static[n, c, i, j]
                        + softmax over (i, j) of logits[n, c] at (i, j) * value[n, c, i, j]

    The dynamic context of the plain ``CoTAttention``, joined with its static context. The
    probabilities are never written to memory; ``logits`` and ``value`` are what is saved.

    Args:
        logits, value, static: ``[N, C, H, W]``.

    Returns:
        ``[N, C, H, W]`` in the memory format of ``logits``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or device is not as above.
    """
    logits, value, static = _autocast(logits, value, static)
    _checks.maps(logits=logits, value=value, static=static)
    return _call(
        _autograd.SpatialSoftmaxGate,
        _ops.spatial_softmax_gate,
        _autograd.composed_spatial_softmax_gate,
        logits,
        value,
        static,
    )


def context_fusion(dynamic: Tensor, static: Tensor, logits: Tensor) -> Tensor:
    r"""Blends dynamic and static context, channel by channel: the radix-2 selection of the official
    CoT block.

    .. code-block:: text

        p = softmax over the last dimension of logits
        y[n, c] = p[n, c, 0] * dynamic[n, c] + p[n, c, 1] * static[n, c]

    Args:
        dynamic, static: ``[N, C, H, W]``.
        logits: ``[N, C, 2]``.

    Returns:
        ``[N, C, H, W]`` in the memory format of ``dynamic``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or device is not as above.
    """
    dynamic, static, logits = _autocast(dynamic, static, logits)
    _checks.alike(dynamic=dynamic, static=static, logits=logits)
    _checks.maps(dynamic=dynamic, static=static)
    _checks.fusion_logits(dynamic, logits)
    return _call(
        _autograd.ContextFusion,
        _ops.context_fusion,
        _autograd.composed_context_fusion,
        dynamic,
        static,
        logits,
    )
