"""What all derivatives of operators share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function

NO_WINDOW = (None,) * 5  # gradients of kernel_size, stride, padding, dilation, padding_mode


class _Leaf(tuple):
    """A tuple that PyTorch's pytrees take for one leaf: a ``Function`` under ``vmap`` cannot be
    given nested ones."""

    __slots__ = ()


class OpFunction(Function):
    """A ``Function`` whose ``apply`` does not bind its arguments to a signature first, which every
    call with ``setup_context`` otherwise pays for with some 10 microseconds. All arguments are
    positional and have no defaults."""

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *args):
        args = tuple([_Leaf(arg) if type(arg) is tuple else arg for arg in args])
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(Function, cls).apply(*unwrap_dead_wrappers(args))


def only(asked: tuple[bool, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return tuple(grad if wanted else None for grad, wanted in zip(grads, asked, strict=True))


def second_order(
    composed: Callable[..., Tensor],
    grad: Tensor,
    inputs: tuple[Tensor, ...],
    asked: tuple[bool, ...],
    cotangents: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Gradients for (grad, *inputs) of the backward of ``composed``, of which the outputs in
    ``asked`` were computed."""

    def backward(grad, *inputs):
        grads = torch.func.vjp(composed, *inputs)[1](grad)
        return tuple(g for g, wanted in zip(grads, asked, strict=True) if wanted)

    _, pull_back = torch.func.vjp(backward, grad, *inputs)
    return pull_back(tuple(c for c, wanted in zip(cotangents, asked, strict=True) if wanted))
