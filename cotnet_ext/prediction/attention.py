"""The weights with which the contextual layers of a network sum their windows."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..modules import CotLayer, CoXtLayer


def attention_layers(model: nn.Module) -> dict[str, CotLayer | CoXtLayer]:
    """The contextual layers of a network by their names, in the order of the network."""
    kinds = (CotLayer, CoXtLayer)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def default_layers(model: nn.Module) -> list[str]:
    """The last contextual layer of each stage."""
    last = {name.partition(".")[0]: name for name in attention_layers(model)}
    return list(last.values())


def choose_layers(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """The layers with these names or patterns, such as `layer4.*`, in the order of the network.

    Names may stop at the block: `layer4.2` is `layer4.2.conv2`.

    Raises:
        ValueError: a name or pattern fits none; the nearest is suggested.
    """
    names = list(attention_layers(model))
    chosen: set[str] = set()
    for pattern in wanted:
        fits = [n for n in names if fnmatchcase(n, pattern) or n.startswith(f"{pattern}.")]
        if not fits:
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise ValueError(
                f"no contextual layer is named {pattern!r}; did you mean {near[0]!r}? "
                f"There are {len(names)}, from {names[0]!r} to {names[-1]!r}"
            )
        chosen.update(fits)
    return [name for name in names if name in chosen]


def attention_of(model: nn.Module, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The normalised window weights of layers on these images.

    Args:
        model: a network with contextual layers, in evaluation mode.
        images: `[N, 3, H, W]`.
        names: of `attention_layers(model)`.

    Returns:
        For each name a float32 tensor `[N, Cw, K, h, w]` on the CPU: `Cw` sets of the K = k*k
        weights (row-major) with which each pixel of the layer's map sums its window.
    """
    layers = attention_layers(model)
    found: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found[name] = _weights(layer, arguments[0])

        return hook

    handles = [layers[name].register_forward_pre_hook(keep(name)) for name in names]
    try:
        with torch.inference_mode():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[name] for name in names}


def _weights(layer: CotLayer | CoXtLayer, x: Tensor) -> Tensor:
    """As in the layer's forward, which never writes the normalised weights to memory."""
    weights = layer.embed(layer._concatenate(x, layer.key_embed(x)))
    return weights.unflatten(1, (layer.dim // 8, layer.kernel_size**2)).float().cpu()
