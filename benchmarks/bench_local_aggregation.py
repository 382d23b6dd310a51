"""local_aggregation against unfold, shift-and-sum and a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Iterator

from .comparison import Options
from .harness import measure
from .window_ops import comparisons


def rows(options: Options) -> Iterator[dict]:
    for comparison in comparisons("local_aggregation", options):
        yield from measure(comparison, options)
