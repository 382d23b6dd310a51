"""group_norm_aggregation against group norm before either baseline, and local_aggregation."""

from __future__ import annotations

from collections.abc import Iterator

from .comparison import Options
from .harness import measure
from .window_ops import comparisons


def rows(options: Options) -> Iterator[dict]:
    for comparison in comparisons("group_norm_aggregation", options, norm=True):
        yield from measure(comparison, options)
