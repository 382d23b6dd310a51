"""The operators in ONNX: for each forward operator a function of ONNX operators of opset 18.

An aggregation is one grouped convolution with one-hot kernels, which lays the K pixels of a window
side by side in the channels, a product with the weights, and a grouped convolution that adds them
up. Under onnxruntime on a CPU that takes 0.6 to 0.9 times as long as adding up shifted copies
(Pad, and for each tap Slice, Mul, Add); and a BatchNorm after it folds into the last convolution.

Only sizes of channels and windows are written into the graph. Batch, height and width stay open
where they are symbolic, and no operator computes with shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18 as op

_OPS = torch.ops.cotnet_ext


def translations() -> dict[Callable, Callable]:
    """Operator to ONNX, as `torch.onnx.export(custom_translation_table=...)` takes it."""
    return {
        _OPS.local_aggregation.default: _local_aggregation,
        _OPS.softmax_aggregation.default: _softmax_aggregation,
        _OPS.group_norm_aggregation.default: _group_norm_aggregation,
        _OPS.group_norm_aggregation_pool.default: _group_norm_aggregation_pool,
        _OPS.spatial_softmax_gate.default: _spatial_softmax_gate,
        _OPS.context_fusion.default: _context_fusion,
    }


def _local_aggregation(input, weight, kernel_size, stride, padding, dilation, padding_mode):
    window = (kernel_size, stride, padding, dilation, padding_mode)
    return _aggregate(input, weight.shape, _flat(weight), *window)


def _softmax_aggregation(input, logits, kernel_size, stride, padding, dilation, padding_mode):
    _, heads, shared, taps, *size = logits.shape
    rows = _regroup(_flat(logits), 4, [-1, heads * shared, taps], size)
    weight = _regroup(op.Softmax(rows, axis=2), 5, [-1, heads * shared * taps], size)
    window = (kernel_size, stride, padding, dilation, padding_mode)
    return _aggregate(input, logits.shape, weight, *window)


def _group_norm_aggregation(
    input, weight, norm_weight, norm_bias, eps, kernel_size, stride, padding, dilation, padding_mode
):
    _, heads, shared, taps, *size = weight.shape
    groups = heads * shared
    # A group of the norm is one channel of the instance norm.
    one, zero = (_constant(np.full(groups, value, _dtype(weight))) for value in (1, 0))
    rows = _regroup(_flat(weight), 4, [-1, groups, taps], size)
    normalised = op.InstanceNormalization(rows, one, zero, epsilon=eps)
    normalised = _regroup(normalised, 5, [-1, groups * taps], size)
    if norm_weight is not None:
        normalised = op.Mul(normalised, op.Unsqueeze(norm_weight, _numbers(1, 2)))
    if norm_bias is not None:
        normalised = op.Add(normalised, op.Unsqueeze(norm_bias, _numbers(1, 2)))
    window = (kernel_size, stride, padding, dilation, padding_mode)
    return _aggregate(input, weight.shape, normalised, *window), *_statistics(rows, one, eps)


def _statistics(rows: ir.Value, one: ir.Value, eps: float) -> tuple[ir.Value, ir.Value]:
    """Mean and 1 / deviation of each group, for a backward; unread as they are, they go away."""
    axes = _numbers(2, 3, 4)
    mean = op.ReduceMean(rows, axes, keepdims=0)
    squares = op.ReduceMean(op.Mul(rows, rows), axes, keepdims=0)
    variance = op.Sub(squares, op.Mul(mean, mean))
    eps = op.CastLike(op.Constant(value_float=eps), one)
    return mean, op.Reciprocal(op.Sqrt(op.Add(variance, eps)))


def _group_norm_aggregation_pool(
    input, weight, norm_weight, norm_bias, shift, static, *eps_and_window
):
    summed, *_ = _group_norm_aggregation(input, weight, norm_weight, norm_bias, *eps_and_window)
    # Maps in their own dtype, as runtimes are made for; numbers of channels in that of sums.
    z = op.Add(summed, op.Unsqueeze(op.CastLike(shift, input), _numbers(1, 2)))
    output = op.Mul(z, op.Sigmoid(z))
    means = op.ReduceMean(output, _numbers(2, 3), keepdims=0)
    if static is not None:
        means = op.Add(means, op.ReduceMean(static, _numbers(2, 3), keepdims=0))
    return output, op.CastLike(means, shift)


def _spatial_softmax_gate(logits, value, static):
    rows = op.Reshape(logits, _numbers(0, 0, -1))
    gate = op.Reshape(op.Softmax(rows, axis=2), _shape(logits))
    return op.Add(static, op.Mul(gate, value))


def _context_fusion(dynamic, static, logits):
    p = op.Unsqueeze(op.Softmax(logits, axis=2), _numbers(3))  # [N, C, 2, 1]
    of_dynamic, of_static = op.Split(p, axis=2, num_outputs=2)
    return op.Add(op.Mul(of_dynamic, dynamic), op.Mul(of_static, static))


# ---- Parts ---------------------------------------------------------------------------------------


def _aggregate(
    input: ir.Value,
    weight_shape: ir.Shape,
    weight: ir.Value,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    padding_mode: str,
) -> ir.Value:
    """`local_aggregation` with its weight as `[N, G*Cw*K, Ho, Wo]`."""
    _, heads, shared, taps, *size = weight_shape
    channels, dtype = input.shape[1], _dtype(input)
    pads = [*padding, *padding]
    if padding_mode == "reflect":
        ends = _numbers(0, 0, *padding, 0, 0, *padding)
        input, pads = op.Pad(input, ends, mode="reflect"), [0, 0, 0, 0]
    pick = np.eye(taps, dtype=dtype).reshape(taps, 1, *kernel_size)
    pixels = op.Conv(
        input,
        _constant(np.tile(pick, (channels, 1, 1, 1))),
        group=channels,
        kernel_shape=list(kernel_size),
        strides=list(stride),
        pads=pads,
        dilations=list(dilation),
    )  # [N, C*K, Ho, Wo]
    several, one = ([heads], [1]) if heads > 1 else ([], [])
    pixels = _regroup(pixels, 4, [-1, *one, channels // shared, shared * taps], size)
    weight = _regroup(weight, 4, [-1, *several, 1, shared * taps], size)
    channels *= heads
    products = op.Mul(pixels, weight)
    products = _regroup(products, 5 + len(several), [-1, channels * taps], size)
    ones = np.ones((channels, taps, 1, 1), dtype)
    return op.Conv(products, _constant(ones), group=channels, kernel_shape=[1, 1])


def _flat(weight: ir.Value) -> ir.Value:
    """The weight `[N, G, Cw, K, Ho, Wo]` as `[N, G*Cw*K, Ho, Wo]`, mostly what it is a view of."""
    _, heads, shared, taps, *size = weight.shape
    channels = heads * shared * taps
    view = weight.producer()
    if view is not None and view.op_type == "Reshape":
        source = view.inputs[0].shape
        if source is not None and list(source[1:]) == [channels, *size]:
            return view.inputs[0]
    return _regroup(weight, 6, [-1, channels], size)


def _regroup(x: ir.Value, rank: int, sizes: Sequence[int], size: Sequence[object]) -> ir.Value:
    """`x [..., H, W]` of this rank seen as `[*sizes, H, W]`; `size` is that of the map.

    A 0 in the shape of a Reshape is the size of the input at the same place. So that the axes of
    the map keep their places, the side that has fewer axes gets some of length 1 before them.
    """
    if all(isinstance(length, int) for length in size):
        return op.Reshape(x, _numbers(*sizes, *size))
    more = len(sizes) + 2 - rank
    if more > 0:
        x = op.Unsqueeze(x, _numbers(*range(more)))
    x = op.Reshape(x, _numbers(*[1] * -more, *sizes, 0, 0))
    return op.Squeeze(x, _numbers(*range(-more))) if more < 0 else x


def _shape(x: ir.Value) -> ir.Value:
    """What a Reshape takes to give the shape of `x`."""
    open_axes = [axis for axis, size in enumerate(x.shape) if not isinstance(size, int)]
    if set(open_axes) <= {0}:
        return _numbers(-1 if open_axes else x.shape[0], *x.shape[1:])
    return op.Shape(x)


def _dtype(x: ir.Value) -> np.dtype:
    return x.dtype.numpy()


def _constant(values: np.ndarray) -> ir.Value:
    return op.Constant(value=ir.tensor(values))


def _numbers(*values: int) -> ir.Value:
    return op.Constant(value_ints=list(values))
