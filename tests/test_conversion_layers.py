"""`convert`: single layers of other people compute the same with ours in their place."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import randn
from conversions import converted, passes, settle
from foreign import official
from layers import assert_equal, both_modes, build, every_kind, make_input, run
from torch import nn

import cotnet_ext
from cotnet_ext import compat, reference
from cotnet_ext.conversion import Finding

# ---- Single layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [reference, official], ids=["reference", "official"])
@both_modes
@every_kind
def test_a_layer_computes_the_same(package, training, name):
    layer = build(package, name).train(training)
    expected = run(copy.deepcopy(layer), make_input(name))
    kind = type(layer).__name__
    ours, report = converted(layer)
    assert type(ours) is getattr(cotnet_ext, kind)
    assert report[0] == Finding("", f"{package.__name__}.{kind}", f"cotnet_ext.{kind}")
    assert_equal(run(ours, make_input(name)), expected)


class CoTAttention(nn.Module):
    """As in many forks of YOLO: other names for the same things, and an argument of its own."""

    def __init__(self, c1: int, c2: int | None = None) -> None:
        super().__init__()
        self.c1, self.k = c1, 3
        self.key_embed = nn.Sequential(
            nn.Conv2d(c1, c1, 3, padding="same", groups=4, bias=False),
            nn.BatchNorm2d(c1),
            nn.SiLU(),
        )
        self.value_embed = nn.Sequential(nn.Conv2d(c1, c1, 1, bias=False), nn.BatchNorm2d(c1))
        self.attention_embed = nn.Sequential(
            nn.Conv2d(2 * c1, c1 // 2, 1, bias=False),
            nn.BatchNorm2d(c1 // 2),
            nn.SiLU(),
            nn.Conv2d(c1 // 2, 9 * c1, 1),
        )

    def forward(self, x):
        k1, v = self.key_embed(x), self.value_embed(x).flatten(2)
        att = self.attention_embed(torch.cat([k1, x], 1))
        att = att.reshape(len(x), self.c1, self.k**2, -1).mean(2)
        return k1 + (torch.softmax(att, -1) * v).reshape(x.shape)


class YoloCoT(CoTAttention):
    """A subclass that only calls the constructor in another way."""

    def __init__(self, c1: int, *_: object) -> None:
        super().__init__(c1)


class CotLayer(CoTAttention):
    """The layer with the softmax under the name of the one with the window."""


@pytest.mark.parametrize("kind", [CoTAttention, YoloCoT, CotLayer])
@both_modes
def test_copies_with_small_changes(kind, training):
    layer = settle(kind(16, 16)).train(training)
    x = randn(3, 16, 7, 6)
    expected = passes(copy.deepcopy(layer), x)
    ours, _ = converted(layer)
    assert type(ours) is cotnet_ext.CoTAttention
    assert (ours.dim, ours.kernel_size, ours.c1, ours.k) == (16, 3, 16, 3)
    assert_equal(passes(ours, x), expected)


class CoTLayer(official.CotLayer):
    """As `models/cotnet_hybrid.py` of the official repository names it."""


def test_the_official_hybrid_layer():
    layer = settle(CoTLayer(16, 3))
    expected = passes(copy.deepcopy(layer), randn(3, 16, 7, 6))
    ours, report = converted(nn.ModuleList([layer]))
    assert [finding.replacement for finding in report] == [
        "cotnet_ext.CotLayer",
        "cotnet_ext.LocalConvolution",
    ]
    assert type(ours[0]) is type(compat.CoTLayer(16, 3)) is cotnet_ext.CotLayer
    assert_equal(passes(ours[0], randn(3, 16, 7, 6)), expected)


# ---- Local convolutions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "size"),
    [
        ({"kernel_size": 3}, (7, 6)),
        ({"kernel_size": 5, "stride": 2, "padding": 2}, (5, 4)),
        ({"kernel_size": 2, "padding": 1, "dilation": 2}, (9, 8)),
        ({"kernel_size": (3, 1), "stride": (1, 2), "padding": (1, 0)}, (9, 4)),
        ({"kernel_size": 3, "padding": 1, "pad_mode": 1}, (9, 8)),
    ],
)
def test_local_convolution(window, size):
    theirs = official.LocalConvolution(8, 8, **window)
    ours, report = converted(copy.deepcopy(theirs))
    assert [str(finding) for finding in report] == [
        "the model itself: foreign_official.LocalConvolution -> cotnet_ext.LocalConvolution"
    ]
    assert type(ours) is cotnet_ext.LocalConvolution
    kernel = window["kernel_size"]
    taps = kernel[0] * kernel[1] if isinstance(kernel, tuple) else kernel**2
    x, weight = randn(2, 8, 9, 8), randn(2, 1, 4, taps, *size)
    torch.testing.assert_close(ours(x, weight), theirs(x, weight), rtol=1e-12, atol=1e-12)


class LocalConvolution(nn.Module):
    """The original, which needs CuPy: its attributes, and a forward that cannot run here."""

    def __init__(self, kernel_size=3, padding=1, pad_mode=0) -> None:
        super().__init__()
        self.in_channels = self.out_channels = 8
        self.kernel_size, self.padding, self.pad_mode = kernel_size, padding, pad_mode
        self.stride = self.dilation = 1

    def forward(self, input, weight):
        raise ModuleNotFoundError("No module named 'cupy'")


class LocalConvolutionDilate(LocalConvolution):
    def forward(self, input, weight, dilation):
        raise ModuleNotFoundError("No module named 'cupy'")


class LocalConvolutionMix(LocalConvolution):
    def __init__(self) -> None:
        super().__init__()
        self.kernel_size1, self.kernel_size2, self.padding1, self.padding2 = 3, 5, 1, 2

    def forward(self, input, weight1, weight2):
        raise ModuleNotFoundError("No module named 'cupy'")


class LocalConvolutionMixMerge(LocalConvolutionMix):
    def __init__(self) -> None:
        super().__init__()
        self.head_num, self.w_channels = 2, 4

    def forward(self, input, weight):
        raise ModuleNotFoundError("No module named 'cupy'")


def test_originals_that_need_cupy():
    parts = (LocalConvolution, LocalConvolutionDilate)
    parts += (LocalConvolutionMix, LocalConvolutionMixMerge)
    model, report = converted(nn.ModuleList(part() for part in parts))
    for module, part, finding in zip(model, parts, report, strict=True):
        package = cotnet_ext if part is LocalConvolution else compat
        assert type(module) is getattr(package, part.__name__)
        assert "cupy" in finding.remark
    x = randn(1, 8, 6, 5)
    weight = randn(1, 2, 4, 9, 6, 5)
    expected = reference.local_aggregation(x, weight, padding=1)
    torch.testing.assert_close(model[0](x, weight), expected)
    torch.testing.assert_close(model[1](x, weight, [1, 1, 1, 1]), expected)
    weight2 = randn(1, 2, 4, 25, 6, 5)
    expected = torch.cat((expected, reference.local_aggregation(x, weight2, 5, padding=2)), 1)
    torch.testing.assert_close(model[2](x, weight, weight2), expected)
    merged = torch.cat((weight.flatten(1, 3), weight2.flatten(1, 3)), 1)
    torch.testing.assert_close(model[3](x, merged), expected)


class Unwritten(compat.LocalConvolutionMix):
    """Ours under another name stays."""


def test_settings_that_the_originals_ignore():
    dilate = LocalConvolutionDilate()
    dilate.stride = 2
    model, report = converted(
        nn.ModuleList([LocalConvolution(pad_mode=1), dilate, Unwritten(8, 8, 3, 5)])
    )
    assert [type(module) for module in model] == [
        LocalConvolution,
        LocalConvolutionDilate,
        Unwritten,
    ]
    assert [finding.remark for finding in report] == [
        "its pad_mode=1 is ignored by the original and honoured by LocalConvolution; "
        "set it to 0 to keep the numbers",
        "its stride=2 is ignored by the original and honoured by LocalConvolutionDilate; "
        "set it to 1 to keep the numbers",
    ]
