"""`create_model`, and a function of its own for every name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..checkpoints import load_into
from .features import check_out_indices
from .network import PLANES, CoTNet, CoTNetFeatures, check_head
from .table import VARIANTS, get_variant
from .weights import naming_the_owner

OUTPUT_STRIDES = (8, 16, 32)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    reference: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    output_stride: int = 32,
    global_pool: str = "avg",
) -> nn.Module:
    """Builds a network of `list_models()`, randomly initialised or with the weights of a file.

    Args:
        name: such as `"cotnet50"`.
        num_classes: outputs of the classifier; 0 builds none.
        in_chans: channels of the image.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        features_only: build the backbone that returns a list of maps, for detection and the like.
        out_indices: which maps: 0 after the stem at half the size of the image, 1 to 4 the stages;
            negative ones count from the end, an int asks for the last so many. Default: all.
        reference: build the same network of the modules of `cotnet_ext.reference`.
        checkpoint: a file to load, see `cotnet_ext.checkpoints.load_into`: `.safetensors`, `.pth`,
            `.pth.tar`, `.pt`. A classifier for another number of classes is not taken from it.
        output_stride: 8, 16 or 32; where the stride would grow beyond it, maps keep their size.
        global_pool: `"avg"`, `"max"`, or `""` for the map itself, with `num_classes=0`.

    Returns:
        A `CoTNet`, `[N, in_chans, H, W]` to `[N, num_classes]`, or with `features_only` a
        `CoTNetFeatures`, `[N, in_chans, H, W]` to a list of maps, in training mode.

    Raises:
        ValueError, TypeError: for an argument that cannot be, naming it; for an unknown name with
            the nearest that exists.

    Source: Li et al., Contextual Transformer Networks for Visual Recognition, arXiv:2107.12292, and
    JDAI-CV/CoTNet.
    """
    variant = get_variant(name)
    check_head(num_classes, global_pool)
    _check_count("in_chans", in_chans)
    _check_rate("drop_rate", drop_rate)
    _check_rate("drop_path_rate", drop_path_rate)
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride!r}")
    if out_indices is not None and not features_only:
        raise ValueError("out_indices needs features_only=True")
    if reference:
        from .. import reference as layers
    else:
        from .. import modules as layers
    common: dict[str, Any] = {
        "in_chans": in_chans,
        "drop_path_rate": float(drop_path_rate),
        "output_stride": output_stride,
    }
    if features_only:
        count = len(PLANES) + 1
        chosen = check_out_indices(count if out_indices is None else out_indices, count)
        model: nn.Module = CoTNetFeatures(variant, layers, out_indices=chosen, **common)
    else:
        model = CoTNet(
            variant,
            layers,
            num_classes=num_classes,
            drop_rate=float(drop_rate),
            global_pool=global_pool,
            **common,
        )
    if checkpoint is not None:
        with naming_the_owner(name):
            load_into(model, checkpoint)
    return model


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_rate(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and less than 1, got {value}")


def _entry_point(name: str):
    title = VARIANTS[name].title

    def build(**options: Any) -> nn.Module:
        return create_model(name, **options)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{title}; `create_model({name!r}, ...)` with the same options."
    return build


ENTRY_POINTS = {name: _entry_point(name) for name in VARIANTS}
