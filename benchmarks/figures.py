"""The figures to reach: for each, which row shows it, how to read it there, and the target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .byte_model import pass_bytes
from .comparison import SUBJECT, Options, comparison_name, dtype_name
from .networks import NETWORKS
from .shapes import COT_ATTENTION, COT_LAYER_EVAL, MEMORY_BOUND, STAGES, TINY, Shape

REACHED, MISSED, FAILED, ABSENT = "reached", "MISSED", "FAILED", "not measured"


def _time(row: dict) -> float | None:
    return row["ms"] and row["ms"]["p50"]


def _share(row: dict) -> float | None:
    return row["share_of_copy"]


def _ratio(row: dict) -> float | None:
    """Time of the row over the time of the subject of its comparison."""
    return row["ratio"]


def _inverse_ratio(row: dict) -> float | None:
    return row["ratio"] and 1 / row["ratio"]


def _peak_ratio(row: dict) -> float | None:
    return row["peak_ratio"]


@dataclass(frozen=True)
class Figure:
    """A claim about one row."""

    claim: str
    comparison: str
    provider: str
    read: Callable[[dict], float | None]
    target: float
    at_most: bool = False
    dtype: str = "float32"
    layout: str = "contiguous"
    unit: str = "x"

    def judge(self, rows: list[dict]) -> tuple[float | None, str]:
        """The measured value and the verdict."""
        mine = [row for row in rows if self._matches(row)]
        if not mine:
            return None, ABSENT
        if mine[-1]["error"]:
            return None, FAILED
        measured = self.read(mine[-1])
        if measured is None:  # what it is measured against has failed
            return None, FAILED
        reached = measured <= self.target if self.at_most else measured >= self.target
        return measured, REACHED if reached else MISSED

    def _matches(self, row: dict) -> bool:
        here = (row["comparison"], row["provider"], row.get("dtype"), row.get("layout"))
        there = (self.comparison, self.provider, self.dtype, self.layout)
        return here == there if "dtype" in row else here[:2] == there[:2]


def figures(gpu: bool = False) -> list[Figure]:
    """All figures of a CPU or a GPU, in the order in which the report shows them."""
    if gpu:
        return [*_gpu_shares(), *_gpu_maps(), *_gpu_peers()]
    return [
        *_operator(),
        *_fused(),
        *_modules(),
        *_layers(),
        *_networks(),
        *_overhead(),
    ]


def _operator() -> Iterator[Figure]:
    op = "local_aggregation"
    for shape, target in zip(STAGES, (0.8, 0.8, 0.8, 0.6), strict=True):
        forward = comparison_name(op, "forward", shape)
        yield Figure("share of copy bandwidth", forward, SUBJECT, _share, target, unit="")
    for direction in ("forward", "forward+backward"):
        for shape in STAGES:
            name = comparison_name(op, direction, shape)
            yield Figure("speed-up over compiled shift-and-sum", name, "shift, compiled", _ratio, 5)
    forward = comparison_name(op, "forward", STAGES[0])
    yield Figure("speed-up over unfold", forward, "unfold", _ratio, 40)
    for direction in ("forward", "forward+backward"):
        for shape in STAGES:
            name = comparison_name(op, direction, shape)
            yield Figure(
                "time in channels_last / in NCHW", name, SUBJECT, _ratio, 1.3,
                at_most=True, layout="channels_last",
            )  # fmt: skip
    half = comparison_name(op, "forward", MEMORY_BOUND, torch.bfloat16)
    yield Figure("speed-up over float32", half, SUBJECT, _ratio, 1.3)


def _fused() -> Iterator[Figure]:
    for op, target in (("softmax_aggregation", 1.5), ("group_norm_aggregation", 1.6)):
        for direction in ("forward", "forward+backward"):
            for shape in STAGES:
                yield Figure(
                    "time / that of local_aggregation", comparison_name(op, direction, shape),
                    "local_aggregation", _inverse_ratio, target, at_most=True,
                )  # fmt: skip


def _modules() -> Iterator[Figure]:
    for direction, targets in (("eval", (5, 2.6)), ("train step", (3, 3))):
        for shape, target in zip(COT_ATTENTION, targets, strict=True):
            name = comparison_name("CoTAttention", direction, shape)
            yield Figure("speed-up over the reference", name, "reference", _ratio, target)
            yield Figure("peak extra memory, reference / ours", name, "reference", _peak_ratio, 3)
    name = comparison_name("CotLayer", "eval", COT_LAYER_EVAL[0])
    yield Figure("speed-up over the reference", name, "reference", _ratio, 2)


# For the four stages: over the eager reference, and over the compiled one at each.
OPTIMISED = {
    "CoTAttention": ((4, 4, 4, 4), None),
    "CotLayer": ((4, 3, 2.5, 1.8), 1.5),
    "CoXtLayer": ((3, 2.5, 2, 1.5), 1.3),
}
TRAINED = {
    "CoTAttention": ((3, 3, 3, 3), None),
    "CotLayer": ((4, 2.5, 1.8, 1.4), 1.3),
    "CoXtLayer": ((3, 2, 1.5, 1.3), 1.3),
}


def _layers() -> Iterator[Figure]:
    for layer, targets in OPTIMISED.items():
        for shape, target in zip(STAGES, targets[0], strict=True):
            name = comparison_name(f"optimised {layer}", "eval", shape)
            yield from _speed_ups(name, target, targets[1])
    for layer, targets in TRAINED.items():
        for shape, target in zip(STAGES, targets[0], strict=True):
            name = comparison_name(layer, "train step", shape)
            yield from _speed_ups(name, target, targets[1])
            yield Figure(
                "peak extra memory, reference / ours", name, "reference", _peak_ratio, 1 / 0.6
            )


def _speed_ups(name: str, eager: float, compiled: float | None) -> Iterator[Figure]:
    yield Figure("speed-up over the reference", name, "reference", _ratio, eager)
    if compiled is not None:
        claim = "speed-up over the compiled reference"
        yield Figure(claim, name, "reference, compiled", _ratio, compiled)


# Over the eager reference network.
NETWORK_EVAL = {"cotnet50": 2.2, "cotnext50_2x48d": 2, "se_cotnetd_50": 1.4}


def _networks() -> Iterator[Figure]:
    for network in NETWORKS:
        name = comparison_name(network.name, "eval", network.eval_shape)
        target = NETWORK_EVAL[network.name]
        yield Figure("speed-up over the reference", name, "reference", _ratio, target)
        yield Figure("peak extra memory, reference / ours", name, "reference", _peak_ratio, 1 / 0.7)
        if network.train_shape is None:
            continue
        yield Figure(
            "speed-up over the compiled reference", name, "reference, compiled", _ratio, 1.2
        )
        yield Figure(
            "speed-up of bfloat16 over float32", name, "cotnet_ext, bfloat16", _inverse_ratio, 1.2,
            dtype="bfloat16",
        )  # fmt: skip
        name = comparison_name(network.name, "train step", network.train_shape)
        yield Figure("speed-up over the reference", name, "reference", _ratio, 1.6)


def _overhead() -> Iterator[Figure]:
    yield Figure("time beyond torch's own", "import", SUBJECT, _time, 500, at_most=True, unit=" ms")
    for claim, direction, target in (
        ("time without grad", "forward", 0.015),
        ("time with grad", "recorded forward", 0.040),
    ):
        name = comparison_name("one call", direction, TINY)
        yield Figure(claim, name, SUBJECT, _time, target, at_most=True, unit=" ms")


# ---- on a GPU ----------------------------------------------------------------------------------

GPU = Options(gpu=True)
LAYOUTS = ("contiguous", "channels_last")
# Shares of the copy for the four stages: kernels on small maps end before they have really begun.
FORWARD = (0.9, 0.9, 0.9, 0.8)
BACKWARD = (0.85, 0.85, 0.8, 0.7)
NORM_BACKWARD = (0.7, 0.7, 0.7, 0.7)  # recomputes what the norm did to the weights
GPU_SHARES = (
    ("local_aggregation", "forward", FORWARD),
    ("local_aggregation", "backward", BACKWARD),
    ("softmax_aggregation", "forward", FORWARD),
    ("softmax_aggregation", "backward", BACKWARD),
    ("group_norm_aggregation", "backward", NORM_BACKWARD),
)


def _share_figure(op: str, direction: str, shape: Shape, target: float) -> Iterator[Figure]:
    for dtype in GPU.dtypes:
        name = comparison_name(op, direction, shape, dtype)
        for layout in LAYOUTS:
            yield Figure(
                f"share of copy bandwidth, {layout}", name, SUBJECT, _share, target,
                dtype=dtype_name(dtype), layout=layout, unit="",
            )  # fmt: skip


def _gpu_shares() -> Iterator[Figure]:
    for op, direction, targets in GPU_SHARES:
        for shape, target in zip(GPU.shapes(), targets, strict=True):
            yield from _share_figure(op, direction, shape, target)


def _gpu_maps() -> Iterator[Figure]:
    """Of 64 MB and more, so that the kernels reach their speed."""
    for op in ("spatial_softmax_gate", "context_fusion"):
        for direction in GPU.directions:
            for shape in GPU.shapes():
                if pass_bytes(op, direction, shape, torch.bfloat16) >= 64e6:
                    yield from _share_figure(op, direction, shape, 0.85)


def _gpu_peers() -> Iterator[Figure]:
    op = "local_aggregation"
    for direction, target in (("forward", 1.8), ("backward", 2.5)):
        for shape in GPU.shapes():
            for dtype in (torch.float32, torch.bfloat16):
                name = comparison_name(op, direction, shape, dtype)
                yield Figure(
                    "speed-up over compiled shift-and-sum", name, "shift, compiled", _ratio, target,
                    dtype=dtype_name(dtype),
                )  # fmt: skip
            name = comparison_name(op, direction, shape)
            yield Figure("speed-up over the official kernels", name, "official CuPy", _ratio, 3)
