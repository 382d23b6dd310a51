"""What is compared: a problem, everybody who solves it, and what one call of each is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from .inputs import CopyBuffers
from .shapes import GPU_BATCHES, QUICK, STAGES, Shape

SUBJECT = "cotnet_ext"
COPY = "copy"

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensor]  # or an nn.Module, whose parameters then get gradients too
Call = Callable[[], Tensors]


class InputMaker(Protocol):
    """Makes an input set. Equal makers stand for the same inputs, which are then shared."""

    dtype: torch.dtype
    layout: str

    def __call__(self) -> Tensors: ...


@dataclass(frozen=True)
class Options:
    """How to measure; one value for a whole run."""

    device: str = "cpu"
    threads: int = 2  # of PyTorch
    own_process: bool = False  # for each comparison
    gpu: bool = False  # what is compared: more dtypes and peers, larger batches, backward alone
    only_dtypes: tuple[str, ...] = ()  # on a GPU; empty: all
    official: Path | None = None  # a checkout of the official repository, for its CuPy kernels
    quick: bool = False
    warm: bool = False
    compiled: bool = True
    budget_s: float = 2.0  # measured time of one comparison
    rotate_bytes: int = 512 << 20  # more than caches hold
    max_sets: int = 1024
    turn_calls: int = 3  # timed calls in a row of one contender
    min_rounds: int = 7
    max_rounds: int = 200

    def shapes(self, shapes: Iterable[Shape] = STAGES) -> tuple[Shape, ...]:
        if self.quick:
            return QUICK
        return tuple(on_gpu(shape) for shape in shapes) if self.gpu else tuple(shapes)

    @property
    def directions(self) -> tuple[str, str]:
        return ("forward", "backward" if self.gpu else "forward+backward")

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        every = (torch.float32, *[torch.float16] * self.gpu, torch.bfloat16)
        wanted = self.only_dtypes
        return tuple(dtype for dtype in every if not wanted or dtype_name(dtype) in wanted)


def on_gpu(shape: Shape) -> Shape:
    """A batch that keeps a large GPU busy."""
    return replace(shape, batch=GPU_BATCHES * shape.batch)


@dataclass(frozen=True)
class Contender:
    """One way to compute something."""

    provider: str
    function: Function
    reference: Function | None  # the truth, in pure PyTorch; None: nothing to check
    make: InputMaker
    bytes: int | None = None  # see byte_model.py
    leeway: float = 1.0  # a peer that rounds more is still timed; times of what may be lost


@dataclass(frozen=True)
class Comparison:
    """Contenders for one pass of one op on one shape. The first is the subject."""

    op: str
    direction: str  # a key of PASSES
    shape: Shape
    contenders: list[Contender]
    dtype: torch.dtype = torch.float32
    repeat: int = 1  # calls in one sample, for what is too short to time alone
    keep_results: bool = True  # as long as inputs, or only until the next call
    host: bool = False  # the time until the call returns, whatever the device has yet to do

    @property
    def name(self) -> str:
        return comparison_name(self.op, self.direction, self.shape, self.dtype)


def comparison_name(
    op: str, direction: str, shape: Shape, dtype: torch.dtype = torch.float32
) -> str:
    """Identifies a comparison in the results."""
    return f"{op}, {direction}, {shape}, {dtype_name(dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def copy_contender(total_bytes: int, device: str) -> Contender:
    """`destination.copy_(source)` that moves as many bytes as the byte model counts."""

    def copy(source: Tensor, destination: Tensor) -> Tensor:
        return destination.copy_(source)

    make = CopyBuffers(total_bytes // 8, device)
    return Contender(COPY, copy, reference=None, make=make, bytes=8 * make.floats)


# ---- passes: what one call is ------------------------------------------------------------------


def _forward(function: Function, parameters: Tensors, inputs: Tensors) -> Tensors:
    return (function(*inputs),)


def _step(function: Function, parameters: Tensors, inputs: Tensors) -> Tensors:
    """The output, and all gradients; the last of the inputs is the gradient of the output."""
    *inputs, upstream = inputs
    output = function(*inputs)
    return (output.detach(), *_gradients(output, [*inputs, *parameters], upstream))


def _gradients(output: Tensor, leaves: list[Tensor], upstream: Tensor) -> Tensors:
    return torch.autograd.grad(output, leaves, upstream, allow_unused=True, materialize_grads=True)


@dataclass(frozen=True)
class Pass:
    run: Callable[[Function, Tensors, Tensors], Tensors]
    records: bool = False  # does autograd record the call?
    upstream: bool = False  # does it need a gradient for its output?
    training: bool = False  # the mode of modules
    ahead: bool = False  # the forward takes place before the call that is timed


PASSES = {
    "forward": Pass(_forward),
    "recorded forward": Pass(_forward, records=True),
    "backward": Pass(_step, records=True, upstream=True, ahead=True),
    "forward+backward": Pass(_step, records=True, upstream=True),
    "eval": Pass(_forward),
    "train step": Pass(_step, records=True, upstream=True, training=True),
}


def prepare(function: Function, inputs: Tensors, direction: str) -> Call:
    """`function` on `inputs`, ready to be called and timed (only once, if its forward is done)."""
    kind = PASSES[direction]
    parameters: Tensors = ()
    if isinstance(function, nn.Module):
        function.train(kind.training)
        parameters = tuple(function.parameters()) if kind.upstream else ()
    if kind.ahead:
        *leaves, upstream = inputs
        output = function(*leaves)
        return lambda: _gradients(output, [*leaves, *parameters], upstream)
    return lambda: kind.run(function, parameters, inputs)


def inputs_for(direction: str, make: InputMaker) -> Tensors:
    """An input set with what the pass needs: recorded, and with a gradient for the output.

    The output is like the first input, unless the maker has an `upstream` that knows better.
    """
    kind = PASSES[direction]
    inputs = tuple(t.requires_grad_(kind.records) for t in make())
    if not kind.upstream:
        return inputs
    upstream = getattr(make, "upstream", lambda inputs: torch.randn_like(inputs[0].detach()))
    return (*inputs, upstream(inputs))
