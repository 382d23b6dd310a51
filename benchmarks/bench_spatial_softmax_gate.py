"""spatial_softmax_gate against the same in PyTorch and a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Iterator

from .comparison import Options
from .harness import measure
from .inputs import Maps
from .pixel_ops import comparisons


def rows(options: Options) -> Iterator[dict]:
    for comparison in comparisons("spatial_softmax_gate", options, Maps, count=3):
        yield from measure(comparison, options)
