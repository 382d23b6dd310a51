"""Models to export, and what a file of theirs may contain."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from cases import Case
from torch import Tensor, nn

import cotnet_ext
from cotnet_ext import functional

DATA = Path(__file__).parent / "data"
# The file says where it is from.
TENSORRT = frozenset(
    line
    for line in (DATA / "tensorrt_operators.txt").read_text().splitlines()
    if not line.startswith("#")
)


def operators(path: Path) -> Counter[str]:
    """How often each operator is in an ONNX file, which has none but standard ones."""
    import onnx

    model = onnx.load(path)
    assert not model.functions
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    return Counter(node.op_type for node in model.graph.node)


class Functions(nn.Module):
    """All functions that have a window, for several cases at once."""

    def __init__(self, cases: tuple[Case, ...]) -> None:
        super().__init__()
        self.cases = cases
        for i, case in enumerate(cases):
            generator = torch.Generator().manual_seed(i)
            for name in ("norm_weight", "norm_bias"):
                values = torch.randn(case.norm_size, generator=generator)
                self.register_buffer(f"{name}_{i}", values)

    def forward(self, inputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        results = []
        for i, (case, x, w) in enumerate(zip(self.cases, inputs, weights, strict=True)):
            norm = (getattr(self, f"norm_weight_{i}"), getattr(self, f"norm_bias_{i}"))
            results += [
                functional.local_aggregation(x, w, **case.geometry),
                functional.softmax_aggregation(x, w, **case.geometry),
                functional.group_norm_aggregation(x, w, *norm, 1e-5, **case.geometry),
            ]
        return results


class OpenFunctions(nn.Module):
    """Every function on maps whose batch, height and width are open."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.weights = nn.Conv2d(channels, 2 * 3 * 9, 1)
        self.strided = nn.Conv2d(channels, 2 * 3 * 9, 3, stride=2, padding=1)
        self.local = cotnet_ext.LocalConvolution(channels, channels, 3, padding=1, pad_mode=1)
        self.norm = nn.GroupNorm(6, 54)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        w = self.weights(x).unflatten(1, (2, 3, 9))
        window = {"kernel_size": 3, "padding": 1}
        return {
            "local": functional.local_aggregation(x, w, **window),
            "module": self.local(x, w),
            "of a view": functional.local_aggregation(x, w.flip(3), **window),
            "strided": functional.local_aggregation(
                x, self.strided(x).unflatten(1, (2, 3, 9)), stride=2, **window
            ),
            "softmax": functional.softmax_aggregation(x, w[:, :1], **window),
            "group norm": functional.group_norm_aggregation(
                x, w, self.norm.weight, self.norm.bias, **window
            ),
            "plain group norm": functional.group_norm_aggregation(x, w, **window),
            "gate": functional.spatial_softmax_gate(x, x + 1, x),
            "fusion": functional.context_fusion(x, -x, x.mean((2, 3))[..., None].repeat(1, 1, 2)),
        }


class Detector(nn.Module):
    """Somebody's model: layers of ours among others, several outputs, a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish())
        self.attention = cotnet_ext.CoTAttention(16, 3)
        self.down = nn.Conv2d(16, 32, 3, 2, 1)
        self.layer = cotnet_ext.CoXtLayer(32, 3)
        self.heads = nn.ModuleList([nn.Conv2d(16, 5, 1), nn.Conv2d(32, 5, 1)])

    def forward(self, images: Tensor, *, scale: Tensor) -> dict[str, list[Tensor]]:
        p2 = self.attention(self.stem(images))
        p3 = self.layer(self.down(p2))
        maps = [head(p) for head, p in zip(self.heads, (p2, p3), strict=True)]
        return {"maps": maps, "scores": [(m * scale).sigmoid().amax((2, 3)) for m in maps]}
