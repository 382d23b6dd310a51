"""The bytes a pass must move: every tensor crosses memory once, nothing else does.

`GB/s` and `share of copy` in the results divide this number, never what an implementation really
moves, by its time. So an implementation that reads a tensor twice or writes intermediates scores
lower. Per-channel tensors (norm weights, statistics, the `[N, C, 2]` logits) are not counted.

    images   tensors of the size of the feature map: x, y, their gradients, ...
    weights  tensors with one value per tap, weight channel and pixel: w, logits, their gradients
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .shapes import Shape


@dataclass(frozen=True)
class Traffic:
    images: int
    weights: int = 0


WINDOW_FORWARD = Traffic(images=2, weights=1)  # x, w -> y
WINDOW_BACKWARD = Traffic(images=3, weights=2)  # g, x, w -> dx, dw

FORWARD = {
    "local_aggregation": WINDOW_FORWARD,
    "softmax_aggregation": WINDOW_FORWARD,
    "group_norm_aggregation": WINDOW_FORWARD,
    "spatial_softmax_gate": Traffic(images=4),  # logits, value, static -> y
    "context_fusion": Traffic(images=3),  # dynamic, static -> y
}
BACKWARD = {
    "local_aggregation": WINDOW_BACKWARD,
    "softmax_aggregation": WINDOW_BACKWARD,
    "group_norm_aggregation": WINDOW_BACKWARD,
    "spatial_softmax_gate": Traffic(images=5),  # g, logits, value -> dlogits, dvalue; dstatic is g
    "context_fusion": Traffic(images=5),  # g, dynamic, static -> ddynamic, dstatic
}


def pass_bytes(op: str, direction: str, shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of one `direction` ("forward", "backward" or "forward+backward") of `op`."""
    models = {"forward": FORWARD, "backward": BACKWARD}
    traffic = [models[part][op] for part in direction.split("+")]
    image = shape.batch * shape.channels * shape.positions
    weight = shape.batch * shape.weight_channels * shape.taps * shape.positions
    elements = sum(part.images * image + part.weights * weight for part in traffic)
    return elements * dtype.itemsize
