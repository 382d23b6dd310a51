"""The operators of fused layers against their definitions in PyTorch and a copy of the same bytes.

Each reads its maps once and writes its results once; `batch_norm_backward` reads its maps twice.
`group_norm_aggregation_pool`, of a layer for evaluation, is also compared with its parts; its map
alone is asked for, so that a compiler may leave the means out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import cotnet_ext
from cotnet_ext import _batch_norm, _ops, reference

from . import baselines
from .baselines import compiled
from .comparison import SUBJECT, Comparison, Contender, Function, Options, copy_contender
from .harness import measure
from .inputs import LAYOUTS, Maps, MapsAndWeights
from .shapes import Shape


@dataclass(frozen=True)
class Case:
    """An operator on some maps.

    Attributes:
        name: of the operator.
        maps: it reads, of the size of the feature map.
        written: maps it writes.
        bind: the call with its tables, from the operator or its definition and `table(*sizes)`.
        weights: whether it reads the weights of windows, too, after the maps.
    """

    name: str
    maps: int
    written: int
    bind: Callable[[Function, Callable, Shape], Function]
    weights: bool = False


def _statistics(op: Function, table: Callable, shape: Shape) -> Function:
    c = shape.channels
    return lambda x: op(x, table(x, c), table(x, c), 1e-5)[0]


def _forward(op: Function, table: Callable, shape: Shape) -> Function:
    return lambda x: op(x, table(x, 3, shape.channels), True)


def _backward(op: Function, table: Callable, shape: Shape) -> Function:
    c = shape.channels
    return lambda g, x: op(g, x, table(x, 3, c), table(x, c), True, True)[0]


def _pool(op: Function, table: Callable, shape: Shape) -> Function:
    c = shape.channels
    return lambda y, k: op(y, k, table(y, 3, c), table(y, 3, c))


def _fusion(op: Function, table: Callable, shape: Shape) -> Function:
    n, c = shape.batch, shape.channels
    return lambda y, k: op(y, k, table(y, 3, c), table(y, 3, c), table(y, n, 2, c))


def _sums(op: Function, table: Callable, shape: Shape) -> Function:
    c = shape.channels
    return lambda g, y, k: op(g, y, k, table(g, 3, c), table(g, 3, c))


def _aggregation_pool(op: Function, table: Callable, shape: Shape) -> Function:
    c, k, p = shape.channels, shape.kernel_size, shape.padding
    window = ([k, k], [1, 1], [p, p], [1, 1], "zeros")
    return lambda x, static, w: op(x, w, None, None, table(x, c), static, 1e-5, *window)[0]


CASES = (
    Case("batch_norm_statistics", 1, 0, _statistics),
    Case("batch_norm", 1, 1, _forward),
    Case("batch_norm_backward", 2, 1, _backward),
    Case("batch_norm_fusion_pool", 2, 0, _pool),
    Case("batch_norm_fusion", 2, 1, _fusion),
    Case("batch_norm_fusion_sums", 3, 0, _sums),
    Case("group_norm_aggregation_pool", 2, 1, _aggregation_pool, weights=True),
)


def rows(options: Options) -> Iterator[dict]:
    for case in CASES:
        for shape in options.shapes():
            for dtype in options.dtypes:
                contenders = _contenders(case, shape, dtype, options)
                yield from measure(
                    Comparison(case.name, "forward", shape, contenders, dtype), options
                )


def _contenders(case: Case, shape: Shape, dtype: torch.dtype, options: Options) -> list[Contender]:
    channels = shape.channels * (case.maps + case.written)
    if case.weights:
        channels += shape.weight_channels * shape.taps
    total = channels * shape.batch * shape.positions * dtype.itemsize
    tables: dict = {}

    def table(like: Tensor, *sizes: int) -> Tensor:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        if (sizes, wide) not in tables:
            generator = torch.Generator().manual_seed(sum(sizes))
            numbers = 0.5 + torch.rand(sizes, generator=generator)
            tables[sizes, wide] = numbers.to(like.device, wide)
        return tables[sizes, wide]

    ours = case.bind(getattr(_ops, case.name), table, shape)
    definition = case.bind(_definition(case.name), table, shape)

    def contender(provider: str, function: Function, layout: str = "contiguous") -> Contender:
        maker = MapsAndWeights if case.weights else Maps
        make = maker(shape, dtype, layout, options.device, case.maps)
        return Contender(provider, function, definition, make, total)

    contenders = [
        contender(SUBJECT, ours),
        contender(SUBJECT, ours, "channels_last"),
        copy_contender(total, options.device),
        contender("reference", definition),
    ]
    to_compile, name = definition, "reference, compiled"
    if case.weights:
        shift = case.bind(baselines.pooled(baselines.group_norm_aggregation), table, shape)
        to_compile, name = shift, "shift, compiled"
        parts = case.bind(baselines.pooled(cotnet_ext.group_norm_aggregation), table, shape)
        contenders += [contender("parts", parts, layout) for layout in LAYOUTS]
    if options.compiled and dtype == torch.float32:
        contenders.append(contender(name, compiled(to_compile)))
    return contenders


def _definition(name: str) -> Function:
    if name == "group_norm_aggregation_pool":
        return baselines.pooled(reference.group_norm_aggregation)
    return getattr(_batch_norm, f"defined_{name}")
