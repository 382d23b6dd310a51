"""Sums of 1x1 convolutions as products of matrices, which read maps where they lie.

On the CPU a convolution of PyTorch copies its maps to blocks of channels first, and its result
back, forward and backward. To a product, NCHW and channels_last are both fine as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from . import _ops

Maps = Sequence[Tensor]  # each [N, C, H, W], all of one layout
Weights = Sequence[Tensor | None]  # one for each map, [O, C // groups]; None: without this map


def pointwise(maps: Maps, weights: Weights, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """The sum of 1x1 convolutions, of each map `[N, C, H, W]` with its weight `[O, C // groups]`.

    Returns `[N, O, H, W]` in the memory format of the first map.
    """
    return pointwise_sums(maps, [weights], [bias], groups)[0]


def pointwise_sums(
    maps: Maps, weights: Sequence[Weights], biases: Sequence[Tensor | None], groups: int = 1
) -> Sequence[Tensor]:
    """Several `pointwise` of the same maps; the gradient of a map is then summed where it lies."""
    if _are_images(maps) and _is_plainly_recorded([*maps, *_flat(weights), *biases]):
        used = tuple(tuple(weight is not None for weight in row) for row in weights)
        return _Sums.apply(groups, used, *maps, *biases, *_flat(weights))
    return [
        _sum(*_present(maps, row), bias, groups) for row, bias in zip(weights, biases, strict=True)
    ]


def _are_images(maps: Maps) -> bool:
    """Whether maps are NCHW, on the CPU, in front of nobody's compiler."""
    x = maps[0]
    return x.device.type == "cpu" and x.stride(1) != 1 and not torch.compiler.is_compiling()


def _is_plainly_recorded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a gradient is recorded, and nothing but the recording happens."""
    given = [t for t in tensors if t is not None]
    return (
        torch.is_grad_enabled()
        and any(t.requires_grad for t in given)
        and all(t.dtype in (torch.float32, torch.float64) for t in given)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


def _flat(rows: Sequence[Weights]) -> list[Tensor]:
    return [weight for row in rows for weight in row if weight is not None]


def _present(maps: Sequence, weights: Sequence) -> tuple[Sequence, Sequence]:
    """Those maps and weights that both are there."""
    pairs = [(x, w) for x, w in zip(maps, weights, strict=True) if x is not None and w is not None]
    return tuple(zip(*pairs, strict=True)) if pairs else ((), ())


# ---- forward -------------------------------------------------------------------------------------


def _sum(maps: Maps, weights: Weights, bias: Tensor | None, groups: int) -> Tensor:
    x = maps[0]
    if _are_images(maps):
        # The gradient of the weight is first written once per image, [N, O, C]: not for small maps.
        if 4 * x.shape[2] * x.shape[3] > x.shape[1]:
            return _of_images(maps, weights, bias, groups)
    elif x.device.type == "cpu" and groups == 1 and not torch.compiler.is_compiling():
        return _of_pixels(maps, weights, bias)
    total = F.conv2d(x, weights[0][..., None, None], bias, groups=groups)
    for x, weight in zip(maps[1:], weights[1:], strict=True):
        total = total + F.conv2d(x, weight[..., None, None], groups=groups)
    return total


def _of_pixels(maps: Maps, weights: Weights, bias: Tensor | None) -> Tensor:
    """The sum for channels_last maps, as `[N*H*W, C] @ [C, O]`."""
    n, c, h, w = maps[0].shape
    total = bias
    for x, weight in zip(maps, weights, strict=True):
        pixels = x.permute(0, 2, 3, 1).reshape(n * h * w, c)
        columns = weight.t()
        total = pixels.mm(columns) if total is None else torch.addmm(total, pixels, columns)
    return total.view(n, h, w, weights[0].shape[0]).permute(0, 3, 1, 2)


def _of_images(maps: Maps, weights: Weights, bias: Tensor | None, groups: int) -> Tensor:
    """The sum for NCHW maps, as `[N*groups, O, C] @ [N*groups, C, H*W]`."""
    n, _, h, w = maps[0].shape
    # The bias comes first where its gradient is recorded: the sum is then one operation with the
    # product. Without a gradient the result takes it in place, which needs no copies of the bias.
    recorded = torch.is_grad_enabled()
    total = bias.view(groups, -1, 1).repeat(n, 1, 1) if recorded and bias is not None else None
    for x, weight in zip(maps, weights, strict=True):
        pixels, rows = _images(x, groups), _for_each_image(weight, groups, n)
        total = rows.bmm(pixels) if total is None else torch.baddbmm(total, rows, pixels)
    # No view to autograd: what follows may write to the result in place.
    total = torch.ops.aten._unsafe_view(total, [n, weights[0].shape[0], h, w])
    if recorded or bias is None:
        return total
    # Under vmap the bias may be a batch where the product is none, and then does not fit into it.
    add = torch.Tensor.add if torch._C._are_functorch_transforms_active() else torch.Tensor.add_
    return add(total, bias.view(-1, 1, 1))


def _images(x: Tensor, groups: int) -> Tensor:
    """`[N*groups, C // groups, H*W]` of a map."""
    n, c, h, w = x.shape
    return x.reshape(n * groups, c // groups, h * w)


def _for_each_image(weight: Tensor, groups: int, n: int) -> Tensor:
    """`[n*groups, O // groups, C // groups]` of a weight; a view when there is one group."""
    return weight.unflatten(0, (groups, -1)).expand(n, -1, -1, -1).flatten(0, 1)


# ---- backward ------------------------------------------------------------------------------------


class _Sums(Function):
    """`pointwise_sums` of NCHW maps with a backward that copies no map either.

    Arguments: groups, which maps each sum uses, the maps, the biases or None, and the weights.
    """

    @staticmethod
    def forward(ctx, groups, used, *operands):
        ctx.groups, ctx.used = groups, used
        ctx.set_materialize_grads(False)
        maps, biases, weights = _split(used, operands)
        kept = [*maps, *_flat(weights)]
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        return tuple(
            _sum(*_present(maps, row), bias, groups)
            for row, bias in zip(weights, biases, strict=True)
        )

    @staticmethod
    @_ops.gradient_by_gradient
    def backward(ctx, *grads):
        maps, _, weights = _split(ctx.used, ctx.saved_tensors, biases=False)
        need_maps, need_biases, need_weights = _split(ctx.used, ctx.needs_input_grad[2:])
        grads = [None if grad is None else grad.contiguous() for grad in grads]
        grad_maps = [
            _grad_map(grads, column, ctx.groups) if needed else None
            for column, needed in zip(zip(*weights, strict=True), need_maps, strict=True)
        ]
        grad_biases = [
            grad.sum((0, 2, 3)) if needed and grad is not None else None
            for grad, needed in zip(grads, need_biases, strict=True)
        ]
        grad_weights = [
            _grad_weight(grad, x, ctx.groups) if needed and grad is not None else None
            for grad, needs, uses in zip(grads, need_weights, ctx.used, strict=True)
            for x, needed, is_used in zip(maps, needs, uses, strict=True)
            if is_used
        ]
        return None, None, *grad_maps, *grad_biases, *grad_weights

    @staticmethod
    def jvp(ctx, _groups, _used, *tangents):
        maps, _, weights = _split(ctx.used, ctx.saved_tensors, biases=False)
        maps_t, biases_t, weights_t = _split(ctx.used, tangents)
        n, _, h, w = maps[0].shape
        results = []
        for row, row_t, bias_t in zip(weights, weights_t, biases_t, strict=True):
            changes = _present([*maps_t, *maps], [*row, *row_t])
            if changes[0]:
                results.append(_of_images(*changes, bias_t, ctx.groups))
            else:
                constant = torch.zeros_like(_flat([row])[0][:, 0]) if bias_t is None else bias_t
                results.append(constant.view(-1, 1, 1).repeat(n, 1, h, w))
        return tuple(results)


def _split(used: Sequence, operands: Sequence, biases: bool = True) -> tuple[Sequence, ...]:
    """What stands for the maps, for the biases, and for the weights in rows with gaps."""
    maps, rest = operands[: len(used[0])], operands[len(used[0]) :]
    weights = iter(rest[len(used) * biases :])
    return maps, rest[: len(used)], [[next(weights) if u else None for u in row] for row in used]


def _grad_map(grads: Sequence[Tensor | None], weights: Weights, groups: int) -> Tensor | None:
    """The sum over all results of their gradients through the weights of one map."""
    total = None
    for grad, weight in zip(*_present(grads, weights), strict=True):
        n, _, h, w = grad.shape
        rows = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # [C, O // groups]
        factors = _for_each_image(rows, groups, n), _images(grad, groups)
        if total is None:
            total, size = torch.bmm(*factors), (n, rows.shape[0], h, w)
        elif torch.is_grad_enabled():
            total = torch.baddbmm(total, *factors)
        else:
            total.baddbmm_(*factors)
    return None if total is None else total.view(size)


def _grad_weight(grad: Tensor, x: Tensor, groups: int) -> Tensor:
    """Summed from one `[O, C]` per image where those are smaller than maps, else image by image."""
    n, c, h, w = x.shape
    rows, columns = _images(grad, groups), _images(x, groups).transpose(1, 2)
    if torch.is_grad_enabled() or n == 0 or h * w * groups >= c:
        return rows.bmm(columns).unflatten(0, (n, groups)).sum(0).flatten(0, 1)
    total = grad.new_zeros(groups, rows.shape[1], columns.shape[2])
    for row, column in zip(rows.split(groups), columns.split(groups), strict=True):
        total.baddbmm_(row, column)
    return total.flatten(0, 1)
