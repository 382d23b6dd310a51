"""context_fusion against the same in PyTorch and a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Iterator

from .comparison import Options
from .harness import measure
from .inputs import MapsAndLogits
from .pixel_ops import comparisons


def rows(options: Options) -> Iterator[dict]:
    for comparison in comparisons("context_fusion", options, MapsAndLogits, count=2):
        yield from measure(comparison, options)
