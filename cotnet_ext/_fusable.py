"""Whether a layer may take its fused path, and if not, why."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ._batch_norm import uses_batch
from ._layer_parameters import OF_BATCH_NORMS
from ._plain import why_not_plain

_TENSORS = (Tensor, nn.Parameter)


class Built(NamedTuple):
    """What the constructor made of a convolution, besides stride 1 and zeros around the map."""

    kernel_size: int
    groups: int
    inputs: int
    outputs: int
    may_have_bias: bool = False


_log = logging.getLogger("cotnet_ext")


def is_fusable(layer: nn.Module, input: Tensor) -> bool:
    """Whether a training step of `layer` may be one function.

    Where a gradient is recorded and it may not, the logger `cotnet_ext` says why at level DEBUG.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    reason = why_not_fusable(layer, input)
    if reason and _log.isEnabledFor(logging.DEBUG):
        _log.debug("%s takes the composed path: %s", type(layer).__name__, reason)
    return reason is None


def why_not_fusable(layer: nn.Module, input: Tensor) -> str | None:
    """Why a training step of `layer` must be composed of its modules; None if it need not."""
    return (
        _why_not_now(input)
        or _why_not_built(layer)
        or _why_not_sized(layer)
        or _why_not_typed(layer, input)
        or _why_not_counted(layer, input)
    )


def _why_not_now(input: Tensor) -> str | None:
    if torch.compiler.is_compiling():
        return "it is compiled or exported"
    if not torch.is_grad_enabled():
        return "no gradient is recorded"
    if torch._C._are_functorch_transforms_active():
        return "it runs under torch.func"
    if forward_ad._current_level >= 0:
        return "it runs in forward mode"
    if type(input) not in _TENSORS:
        return f"its input is a {type(input).__name__}"
    if input.device.type not in ("cpu", "cuda"):
        return f"its input is on {input.device}"
    return None


def _why_not_built(layer: nn.Module) -> str | None:
    """Which submodule is not as the constructor made it."""
    for name, kinds in layer._parts.items():
        module = getattr(layer, name)
        if not isinstance(kinds, tuple):
            reason = why_not_plain(module, kinds)
            if reason:
                return f"{name} {reason}"
            continue
        reason = why_not_plain(module, nn.Sequential)
        if reason is None and len(module) != len(kinds):
            reason = f"has {len(module)} modules, not {len(kinds)}"
        if reason:
            return f"{name} {reason}"
        for i, (part, kind) in enumerate(zip(module, kinds, strict=True)):
            reason = why_not_plain(part, kind)
            if reason:
                return f"{name}.{i} {reason}"
    return None


def _why_not_sized(layer: nn.Module) -> str | None:
    """Which convolution, window or GroupNorm is not of the layer's sizes."""
    for name, made in layer._convolutions().items():
        conv, k = layer.get_submodule(name), made.kernel_size
        built = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
        asked = ((k, k), (1, 1), (k // 2, k // 2), (1, 1), "zeros")
        sizes = (conv.groups, conv.in_channels, conv.out_channels)
        if built != asked or sizes != (made.groups, made.inputs, made.outputs):
            return f"{name} has another window or other channels"
        if conv.bias is not None and not made.may_have_bias:
            return f"{name} has a bias"
    return None if "local_conv" not in layer._parts else _why_not_aggregated(layer)


def _why_not_aggregated(layer: nn.Module) -> str | None:
    dim, k = layer.dim, layer.kernel_size
    if layer.embed[4].num_groups != dim // 8:
        return f"embed.4 has {layer.embed[4].num_groups} groups, not {dim // 8}"
    local = layer.local_conv
    if local.window != {
        "kernel_size": k, "stride": 1, "padding": k // 2, "dilation": 1, "padding_mode": "zeros"
    }:  # fmt: skip
        return "local_conv has another window"
    return None


def _why_not_typed(layer: nn.Module, input: Tensor) -> str | None:
    if input.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return f"its input is {input.dtype}"
    kind = input.device.type
    casts = torch.is_autocast_enabled(kind) and input.dtype != torch.float64
    parameters = layer._learned()
    for name, tensor in zip(parameters._fields, parameters, strict=True):
        if tensor is None:
            continue
        if type(tensor) not in _TENSORS:
            return f"its {name} is a {type(tensor).__name__}"
        if tensor.device != input.device:
            return f"its {name} is on {tensor.device}"
        if tensor.dtype == input.dtype or casts:
            continue
        if tensor.dtype != torch.float32 or name not in OF_BATCH_NORMS:
            return f"its {name} is {tensor.dtype}, not {input.dtype}"
    if not input.requires_grad and not any(t is not None and t.requires_grad for t in parameters):
        return "nothing in it needs a gradient"
    return None


def _why_not_counted(layer: nn.Module, input: Tensor) -> str | None:
    if input.numel() == 0:
        return "its input is empty"
    n, _, h, w = input.shape
    batch = [uses_batch(norm) for norm in layer._norms]
    pools = "se" in layer._parts  # its norm is the last, and has one value for each image
    if any(batch) and n * h * w == 1 or pools and batch[-1] and n == 1:
        return "a BatchNorm has one value for each channel"
    return None


def explain(model: nn.Module) -> dict[str, str | None]:
    """Why each layer of `model` is composed in a training step, by its name; None for
    those that are one function. Taken for a batch of their dtype and on their device."""
    reasons = {}
    for name, layer in model.named_modules():
        if not hasattr(layer, "_parts"):
            continue
        weight = next(layer.parameters())
        batch = torch.empty(2, layer.dim, 4, 4, dtype=weight.dtype, device=weight.device)
        with torch.enable_grad():
            reasons[name] = why_not_fusable(layer, batch)
    return reasons
