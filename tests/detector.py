"""A small detector in the manner of YOLO, with a contextual layer wherever people put one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Conv(nn.Module):
    def __init__(self, into: int, out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(into, out, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """1x1 convolution and a layer that keeps the map, with a shortcut."""

    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.cv1 = Conv(dim, dim)
        self.cv2 = mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C3(nn.Module):
    """Two branches, one through bottlenecks, and a convolution of both."""

    def __init__(self, into: int, out: int, mixers: list[nn.Module]) -> None:
        super().__init__()
        hidden = out // 2
        self.cv1, self.cv2 = Conv(into, hidden), Conv(into, hidden)
        self.m = nn.Sequential(*(Bottleneck(hidden, mixer) for mixer in mixers))
        self.cv3 = Conv(2 * hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class Detector(nn.Module):
    """Backbone with strides 8 and 16, a neck that goes up once, and a head per stride.

    `layers` has `CoTAttention` and `CotLayer`: the first stands in the backbone's C3 and, by itself
    in a list, after the neck; the second in the neck's C3.
    """

    def __init__(self, layers, classes: int = 3, anchors: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(Conv(3, 8, 3, 2), Conv(8, 16, 3, 2), Conv(16, 32, 3, 2))
        self.c3 = C3(32, 32, [layers.CoTAttention(16), Conv(16, 16, 3)])
        self.down = Conv(32, 64, 3, 2)
        self.c4 = C3(64, 64, [layers.CoTAttention(dim=32, kernel_size=5)])
        self.lateral = Conv(64, 32)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.p3 = C3(64, 32, [layers.CotLayer(16, 3)])
        self.attention = nn.ModuleDict({"p3": layers.CoTAttention(32), "p4": nn.Identity()})
        outputs = anchors * (classes + 5)
        self.heads = nn.ModuleList([nn.Conv2d(32, outputs, 1), nn.Conv2d(64, outputs, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        c3 = self.c3(self.stem(x))
        c4 = self.c4(self.down(c3))
        p3 = self.p3(torch.cat((self.up(self.lateral(c4)), c3), 1))
        maps = self.attention["p3"](p3), self.attention["p4"](c4)
        return [head(features) for head, features in zip(self.heads, maps, strict=True)]


LAYERS = ("attention.p3", "c3.m.0.cv2", "c4.m.0.cv2", "p3.m.0.cv2", "p3.m.0.cv2.local_conv")
