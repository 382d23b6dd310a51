"""softmax_aggregation against softmax before either baseline, and against local_aggregation."""

from __future__ import annotations

from collections.abc import Iterator

from .comparison import Options
from .harness import measure
from .window_ops import comparisons


def rows(options: Options) -> Iterator[dict]:
    for comparison in comparisons("softmax_aggregation", options):
        yield from measure(comparison, options)
