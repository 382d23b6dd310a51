"""Every function and module beside its reference, on feature maps of the photographs.

Each one runs three times over: ours in float32, the reference in float32, and the reference in
float64, which stands for the exact answer. Ours passes when its error against the exact answer is
at most `MARGIN` times the error of the reference in float32, or at most `FLOOR`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from .. import functional, modules, reference
from .measure import median_seconds, peak_bytes, scaled_error

MARGIN = 4.0
FLOOR = 2e-6
KINK = 2e-6  # of the numbers of about 1 that a norm hands to a ReLU


@dataclass(frozen=True)
class Case:
    """One function or module: `build(namespace)` makes it from ours or from the reference, and
    `inputs(maps)` makes its arguments of the maps `[N, channels, H, W]` of a stage."""

    name: str
    channels: int
    build: Callable[[ModuleType], Callable[..., Tensor]]
    inputs: Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Pair:
    """A quantity of the reference and of ours."""

    reference: float
    ours: float

    @property
    def ratio(self) -> float:
        return self.reference / self.ours


@dataclass(frozen=True)
class Row:
    """A line of the table. Errors are relative, times in seconds, memory in bytes."""

    name: str
    shape: tuple[int, ...]
    error: Pair
    inference: Pair
    training: Pair
    memory: Pair

    @property
    def size(self) -> str:
        """C x H x W, as text."""
        return " x ".join(str(length) for length in self.shape[1:])

    @property
    def passed(self) -> bool:
        return self.error.ours <= max(MARGIN * self.error.reference, FLOOR)


def _mixed(maps: Tensor, channels: int, seed: int) -> Tensor:
    """Other maps `[N, channels, H, W]` of the same photographs: a random 1x1 convolution."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, maps.shape[1], 1, 1, generator=generator)
    return nn.functional.conv2d(maps, mixing / maps.shape[1] ** 0.5)


def _local_weights(maps: Tensor) -> Tensor:
    """Local 3x3 weights `[N, 1, C/8, 9, H, W]`, the sharing of the official layers."""
    batch, channels, height, width = maps.shape
    weights = _mixed(maps, 9 * channels // 8, seed=1)
    return weights.reshape(batch, 1, channels // 8, 9, height, width)


def _gate_inputs(maps: Tensor) -> list[Tensor]:
    channels = maps.shape[1]
    return [_mixed(maps, channels, seed=1), maps, _mixed(maps, channels, seed=2)]


def _fusion_inputs(maps: Tensor) -> list[Tensor]:
    batch, channels = maps.shape[:2]
    logits = _mixed(maps, 2 * channels, seed=2).mean((2, 3)).reshape(batch, channels, 2)
    return [maps, _mixed(maps, channels, seed=1), logits]


def _with_weights(maps: Tensor) -> list[Tensor]:
    return [maps, _local_weights(maps)]


def _aggregation(name: str) -> Callable[[ModuleType], Callable[..., Tensor]]:
    def build(namespace: ModuleType) -> Callable[..., Tensor]:
        function = getattr(namespace, name)
        return lambda maps, weights: function(maps, weights, kernel_size=3, padding=1)

    return build


def _function(name: str) -> Callable[[ModuleType], Callable[..., Tensor]]:
    return lambda namespace: getattr(namespace, name)


def _module(name: str, *arguments: int, **options: int) -> Callable[[ModuleType], nn.Module]:
    return lambda namespace: getattr(namespace, name)(*arguments, **options)


CASES = (
    Case("local_aggregation", 64, _aggregation("local_aggregation"), _with_weights),
    Case("softmax_aggregation", 64, _aggregation("softmax_aggregation"), _with_weights),
    Case("group_norm_aggregation", 64, _aggregation("group_norm_aggregation"), _with_weights),
    Case("spatial_softmax_gate", 64, _function("spatial_softmax_gate"), _gate_inputs),
    Case("context_fusion", 64, _function("context_fusion"), _fusion_inputs),
    Case("LocalConvolution", 64, _module("LocalConvolution", 64, 64, 3, padding=1), _with_weights),
    Case("CoTAttention", 64, _module("CoTAttention", 64, 3), lambda maps: [maps]),
    Case("CoTAttention", 256, _module("CoTAttention", 256, 3), lambda maps: [maps]),
    Case("CotLayer", 64, _module("CotLayer", 64, 3), lambda maps: [maps]),
    Case("CotLayer", 256, _module("CotLayer", 256, 3), lambda maps: [maps]),
    Case("CoXtLayer", 128, _module("CoXtLayer", 128, 3), lambda maps: [maps]),
)


def compare(maps_by_channels: dict[int, Tensor], seed: int, repeats: int) -> Iterator[Row]:
    """One row for each case, in the order of `CASES`."""
    for case in CASES:
        yield _compare_case(case, maps_by_channels[case.channels], seed, repeats)


def _compare_case(case: Case, maps: Tensor, seed: int, repeats: int) -> Row:
    pair = _same_pair(case, seed)
    arguments = [tensor.detach().requires_grad_() for tensor in case.inputs(maps)]
    # A random gradient of the output: that of a plain sum would hide errors that cancel.
    cotangent = torch.randn(maps.shape, generator=torch.Generator().manual_seed(seed))

    precise = [tensor.detach().double().requires_grad_() for tensor in arguments]
    truths = [_observe(exact, precise, cotangent.double()) for exact in _exact(pair[0])]
    errors = [_error(_observe(subject, arguments, cotangent), truths) for subject in pair]

    steps = [partial(_step, subject, arguments, cotangent) for subject in pair]
    inferences = [partial(_infer, subject, arguments) for subject in pair]
    return Row(
        name=case.name,
        shape=tuple(maps.shape),
        error=Pair(*errors),
        inference=Pair(*median_seconds(inferences, repeats)),
        training=Pair(*median_seconds(steps, repeats)),
        memory=Pair(*(peak_bytes(step) for step in steps)),
    )


def _same_pair(case: Case, seed: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The reference and ours, with the same parameters and buffers."""
    torch.manual_seed(seed)
    ours = case.build(modules if hasattr(modules, case.name) else functional)
    theirs = case.build(reference)
    if isinstance(ours, nn.Module):
        theirs.load_state_dict(ours.state_dict())
    return theirs, ours


class _EarlyReLU(nn.Module):
    """A ReLU whose kink is a little beside zero, by less than roundings of float32."""

    def __init__(self, kink: float) -> None:
        super().__init__()
        self.kink = kink

    def forward(self, x: Tensor) -> Tensor:
        return x * (x > self.kink)


def _exact(subject: Callable[..., Tensor]) -> list[Callable[..., Tensor]]:
    """The subject in float64. Of a module with ReLUs three times: where their input is zero up to
    rounding, either gradient is as right as the other."""
    if not isinstance(subject, nn.Module):
        return [subject]
    exact = [copy.deepcopy(subject).double() for _ in range(3)]
    for module, kink in zip(exact[1:], (KINK, -KINK), strict=True):
        for path, part in list(module.named_modules()):
            if isinstance(part, nn.ReLU):
                module.set_submodule(path, _EarlyReLU(kink))
    return exact


def _parameters(subject: Callable[..., Tensor]) -> list[Tensor]:
    return list(subject.parameters()) if isinstance(subject, nn.Module) else []


def _step(
    subject: Callable[..., Tensor], arguments: Sequence[Tensor], cotangent: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Forward and backward: the output, and the gradients of arguments and parameters."""
    if isinstance(subject, nn.Module):
        subject.train()
    output = subject(*arguments)
    wanted = [*arguments, *_parameters(subject)]
    # A parameter without influence, such as a bias that a softmax cancels, may stay unused.
    gradients = torch.autograd.grad(
        output, wanted, cotangent, allow_unused=True, materialize_grads=True
    )
    return output.detach(), gradients


def _infer(subject: Callable[..., Tensor], arguments: Sequence[Tensor]) -> Tensor:
    if isinstance(subject, nn.Module):
        subject.eval()
    with torch.inference_mode():
        return subject(*arguments)


def _observe(
    subject: Callable[..., Tensor], arguments: Sequence[Tensor], cotangent: Tensor
) -> list[list[Tensor]]:
    """What must agree: the output and the gradients of a training step, the running statistics
    it leaves, and the output in eval mode."""
    output, gradients = _step(subject, arguments, cotangent)
    seen = [[output], list(gradients), [_infer(subject, arguments)]]
    if isinstance(subject, nn.Module):
        seen.append([buffer for buffer in subject.buffers() if buffer.is_floating_point()])
    return [tensors for tensors in seen if tensors]


def _error(found: list[list[Tensor]], truths: list[list[list[Tensor]]]) -> float:
    errors = [scaled_error(ours, *exact) for ours, *exact in zip(found, *truths, strict=True)]
    return float(torch.tensor(errors).max())  # unlike Python's max, keeps NaN
