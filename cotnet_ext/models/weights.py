"""Whose weights these are, from the names and shapes of tensors."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from ..checkpoints import CheckpointError
from .network import PLANES
from .table import VARIANTS


def identify(tensors: Mapping[str, Tensor]) -> list[str]:
    """The variants whose stem, blocks and widths these are; two of them differ in nothing else."""
    found = [re.match(r"layer(\d)\.(\d+)\.conv1\.weight$", key) for key in tensors]
    places = {(int(match[1]), int(match[2])) for match in found if match}
    stages = range(1, len(PLANES) + 1)
    blocks = tuple(sum(stage == place[0] for place in places) for stage in stages)
    width = _first_size(tensors, "layer1.0.conv1.weight")
    stem = _first_size(tensors, "conv1.0.weight")
    return [
        name
        for name, variant in VARIANTS.items()
        if (variant.blocks, variant.stem_width) == (blocks, stem)
        and PLANES[0] * variant.base_width // 64 * variant.cardinality == width
    ]


def _first_size(tensors: Mapping[str, Tensor], key: str) -> int | None:
    return tensors[key].shape[0] if key in tensors and tensors[key].dim() else None


@contextlib.contextmanager
def naming_the_owner(name: str) -> Iterator[None]:
    """Weights that do not fit the network `name` within it: the error says which they would fit."""
    try:
        yield
    except CheckpointError as error:
        owners = identify(error.checkpoint.tensors) if error.checkpoint else []
        if not owners or name in owners:
            raise
        raise CheckpointError(f"{error}; its blocks are those of {owners[0]}") from None
