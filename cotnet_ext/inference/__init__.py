"""Models for evaluation only: norms folded into convolutions, layers fused.

What is done, in this order:

1. The layers of CoT networks are exchanged for those of `layers.py`.
2. BatchNorms go into the convolutions before them, activations behind them, and sums of residual
   blocks too, wherever one module calls them one after the other (`graph.py`).
3. Convolutions run with what was fused, on weights in the order of the backend (`convolution.py`).

`logging.getLogger("cotnet_ext.inference")` says at level DEBUG what was fused, and what was left
and why.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .graph import class_with_views, fuse_chains, fuse_sums, log, replace
from .layers import NotFusable, fuse_layer

__all__ = ["optimize_for_inference"]


def optimize_for_inference(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> nn.Module:
    """An eval-only copy of `model` with norms folded and layers fused; same results, less time.

    Any model will do: networks of `cotnet_ext.models`, detectors with layers of this package
    somewhere inside, or models without any. What cannot be fused with certainty is left as it is:
    modules with hooks, parametrizations or replaced parts, norms that need the batch. Convert
    layers of other packages first, see `cotnet_ext.convert`.

    Args:
        model: the model; it is not changed, whatever mode it is in.
        dtype: of parameters, buffers and results; float tensors among the arguments are cast to
            it. None: as they are. On the CPU bfloat16 is fastest on processors that compute with
            it, float32 on others.
        memory_format: of the maps inside and of the results, `torch.channels_last` or
            `torch.contiguous_format`. None: channels_last, which is the faster one, unless some
            `forward` of the model calls `view`: maps that are channels_last often have no such
            views.

    Returns:
        A copy in evaluation mode with parameters that need no gradients, of the same class where
        the class is not one of the layers that were exchanged. Residual blocks become
        `torch.fx.GraphModule`. Its `state_dict` is that of the fused modules, so load checkpoints
        before. `copy.deepcopy`, pickle, `torch.compile`, `torch.export` and CUDA graphs work;
        `train()` raises RuntimeError.

    Raises:
        TypeError: `model` is no module, or `dtype` or `memory_format` is of another type.
        ValueError: `dtype` is no floating dtype, or `memory_format` is another one.
    """
    _check(model, dtype, memory_format)
    memory_format = _choose_format(model) if memory_format is None else memory_format
    model = copy.deepcopy(model).eval()
    model.requires_grad_(False)
    with torch.no_grad():
        model = _fuse_layers(model, memory_format)
        model = fuse_chains(model, memory_format)
        model = fuse_sums(model)
        model = model.eval().requires_grad_(False)
        model = model.to(dtype=dtype, memory_format=memory_format)
    model.register_forward_pre_hook(_Cast(dtype, memory_format), with_kwargs=True)
    model.train = _EvalOnly(model)
    return model


def _check(
    model: nn.Module, dtype: torch.dtype | None, memory_format: torch.memory_format | None
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, got {dtype!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating dtype such as torch.bfloat16, got {dtype}")
    if memory_format is not None and not isinstance(memory_format, torch.memory_format):
        raise TypeError(f"memory_format must be a torch.memory_format, got {memory_format!r}")
    if memory_format not in (None, torch.channels_last, torch.contiguous_format):
        raise ValueError(
            "memory_format must be torch.channels_last or torch.contiguous_format, "
            f"got {memory_format}"
        )


def _choose_format(model: nn.Module) -> torch.memory_format:
    viewer = class_with_views(model)
    if viewer is None:
        return torch.channels_last
    log.debug("maps stay contiguous: %s uses view", viewer.__name__)
    return torch.contiguous_format


def _fuse_layers(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    for path, layer in list(model.named_modules()):
        try:
            fused = fuse_layer(layer, memory_format)
        except NotFusable as error:
            log.debug("left %s %s: %s", type(layer).__name__, path, error)
            continue
        if fused is not None:
            model = replace(model, layer, fused.train(False), path)
    return model


class _Cast:
    """Brings the tensors among the arguments of a model to its dtype and layout."""

    def __init__(self, dtype: torch.dtype | None, memory_format: torch.memory_format) -> None:
        self.dtype = dtype
        # Not the memory format: torch.save cannot write one.
        self.channels_last = memory_format == torch.channels_last

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if len(args) == 1 and isinstance(args[0], Tensor) and not kwargs:
            return (self._cast(args[0]),), kwargs  # walking the tree takes longer than a small call
        return pytree.tree_map_only(Tensor, self._cast, (args, kwargs))

    def _cast(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if tensor.dim() == 4 and self.channels_last:
            return tensor.to(dtype=self.dtype, memory_format=torch.channels_last)
        return tensor.to(dtype=self.dtype)


class _EvalOnly:
    """Stands in for the method `train` of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, mode: bool = True) -> nn.Module:
        if mode:
            raise RuntimeError(
                "a model from optimize_for_inference cannot be trained, its norms are part of its "
                "convolutions: train the model that it was made from"
            )
        return self.model
