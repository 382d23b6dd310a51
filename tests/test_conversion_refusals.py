"""`convert`: what computes something else than our layers is left alone, and why is said."""

from __future__ import annotations

import logging

import pytest
import torch
from cases import randn
from conversions import converted, swapped
from foreign import official
from torch import Tensor, nn

import cotnet_ext
from cotnet_ext import convert


def altered(package, name: str, **children) -> nn.Module:
    """A layer of `package` with these paths set to other modules, or removed where None."""
    layer = getattr(package, name)(16, 3)
    for path, child in children.items():
        if child is None:
            delattr(layer, path)
        elif "__" in path:
            layer.set_submodule(path.replace("__", "."), child)
        else:
            setattr(layer, path, child)
    return layer


def conv(*sizes, **options) -> nn.Conv2d:
    return nn.Conv2d(*sizes, **{"bias": False, **options})


STRUCTURES = {
    "no key_embed": (("CotLayer", {"key_embed": None}), "it has no key_embed, which CotLayer has"),
    "no se": (("CotLayer", {"se": None}), "it has no se, which CotLayer has"),
    "more": (
        ("CoTAttention", {"drop": nn.Dropout()}),
        "it has drop, which CoTAttention has not",
    ),
    "a parameter": (
        ("CoTAttention", {"gamma": nn.Parameter(torch.ones(1))}),
        "it has gamma, which CoTAttention has not",
    ),
    "a linear key": (
        ("CotLayer", {"key_embed": nn.Linear(16, 16)}),
        "key_embed does not begin with a Conv2d",
    ),
    "an empty key": (
        ("CotLayer", {"key_embed": nn.Sequential()}),
        "key_embed does not begin with a Conv2d",
    ),
    "3-d": (
        ("CoTAttention", {"key_embed__0": nn.Conv3d(16, 16, 3)}),
        "key_embed[0] has kernel_size=(3, 3, 3), expected a square one of a Conv2d",
    ),
    "an even kernel": (
        ("CoTAttention", {"key_embed__0": conv(16, 16, 2, groups=4)}),
        "kernel_size must be a positive odd number, got 2",
    ),
    "odd channels": (
        ("CotLayer", {"key_embed__0": conv(12, 12, 3)}),
        "dim must be a positive multiple of 8, got 12",
    ),
    "groups": (
        ("CoTAttention", {"key_embed__0": conv(16, 16, 3, padding=1, groups=2)}),
        "key_embed[0] has groups=2, expected 4",
    ),
    "stride": (
        ("CotLayer", {"conv1x1__0": conv(16, 16, 1, stride=2)}),
        "conv1x1[0] has stride=(2, 2), expected (1, 1)",
    ),
    "padding": (
        (
            "CotLayer",
            {"key_embed__0": conv(16, 16, 3, padding=1, groups=4, padding_mode="reflect")},
        ),
        "key_embed[0] has padding_mode=reflect, expected zeros",
    ),
    "hidden channels": (
        ("CoTAttention", {"attention_embed__0": conv(32, 4, 1)}),
        "attention_embed[0] has out_channels=4, expected 8",
    ),
    "shared by others": (
        ("CotLayer", {"embed__3": conv(8, 36, 1, bias=True)}),
        "embed[3] has out_channels=36, expected 18",
    ),
    "a bias": (
        ("CoTAttention", {"value_embed__0": conv(16, 16, 1, bias=True)}),
        "value_embed[0] has a bias, which is not so in the original",
    ),
    "no bias": (
        ("CotLayer", {"se__3": conv(32, 32, 1)}),
        "se[3] has no bias, which is not so in the original",
    ),
    "no convolution": (
        ("CotLayer", {"se__0": nn.Linear(16, 32)}),
        "se[0] is a Linear, expected a Conv2d",
    ),
    "length": (
        ("CotLayer", {"conv1x1": nn.Sequential(conv(16, 16, 1))}),
        "conv1x1 is a Sequential of 1, expected a Sequential of 2",
    ),
    "no sequence": (
        ("CotLayer", {"se": nn.Conv2d(16, 32, 1)}),
        "se is a Conv2d, expected a Sequential of 4",
    ),
    "norm channels": (
        ("CotLayer", {"bn": nn.BatchNorm2d(8)}),
        "bn has 8 channels, expected 16",
    ),
    "no norm": (
        ("CotLayer", {"embed__4": nn.Dropout(0.5)}),
        "embed[4] is a Dropout, expected a GroupNorm",
    ),
    "norm groups": (
        ("CotLayer", {"embed__4": nn.GroupNorm(1, 18)}),
        "embed[4] has num_groups=1, expected 2",
    ),
    "activation": (
        ("CotLayer", {"act": nn.PReLU(16)}),
        "act is a PReLU, expected an activation without parameters",
    ),
    "window": (
        ("CotLayer", {"local_conv": official.LocalConvolution(16, 16, 3)}),
        "local_conv has padding=0, expected 1",
    ),
    "weights of its own": (
        ("CotLayer", {"local_conv": nn.Conv2d(16, 16, 3)}),
        "local_conv is a Conv2d, expected a LocalConvolution",
    ),
    "local without its padding": (
        ("LocalConvolution", {"padding": None}),
        "it has no padding, which LocalConvolution has",
    ),
}


@pytest.mark.parametrize("what", STRUCTURES)
def test_other_structures_are_left_alone(what, caplog):
    (name, children), reason = STRUCTURES[what]
    if name == "LocalConvolution":
        layer = official.LocalConvolution(16, 16, 3)
        del layer.padding
    else:
        layer = altered(official, name, **children)
    kind, attributes = type(layer), sorted(vars(layer))
    layer, report = converted(layer)
    assert type(layer) is kind
    assert sorted(vars(layer)) == attributes
    assert report[0].replacement is None
    assert report[0].remark == reason
    assert caplog.record_tuples[0] == (
        "cotnet_ext.conversion",
        logging.WARNING,
        f"the model itself: foreign_official.{name} left alone: {report[0].remark}",
    )


class Residual(official.CoTAttention):
    def forward(self, x):
        return x + super().forward(x)


class Droplet(official.CotLayer):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Windows(official.CotLayer):
    def forward(self, x):
        k = self.key_embed(x)
        return super().forward(k.unflatten(2, (-1, 7)).flatten(2, 3))


class Two(official.CotLayer):
    def forward(self, x, mask=None):
        return super().forward(x)


class Loading(official.CotLayer):
    def train(self, mode=True):
        return super().train(False)


class Calling(official.CoTAttention):
    def __call__(self, x):
        return super().__call__(x) / 2


class Scaled(official.LocalConvolution):
    def forward(self, input, weight):
        return 2 * super().forward(input, weight)


def replaced_forward() -> nn.Module:
    layer = official.CoTAttention(16)
    layer.forward = lambda x: x
    return layer


OTHERS = {
    "another forward": (
        lambda: Residual(16),
        "its forward gives other numbers in evaluation",
    ),
    "another forward in training": (
        lambda: Droplet(16, 3),
        "its forward gives other numbers in training",
    ),
    "a failing forward": (
        lambda: Windows(16, 3),
        "its forward fails on a map [2, 16, 8, 16]: RuntimeError: ",
    ),
    "more arguments": (lambda: Two(16, 3), "its forward takes (x, mask), expected 1 argument(s)"),
    "another train": (lambda: Loading(16, 3), "class Loading overrides train of nn.Module"),
    "another call": (lambda: Calling(16), "class Calling overrides __call__ of nn.Module"),
    "a forward of the object": (
        replaced_forward,
        "its forward was replaced on the object, not in its class",
    ),
    "another aggregation": (
        lambda: Scaled(8, 8, 3),
        "its forward gives other numbers",
    ),
    "a window that cannot be": (
        lambda: official.LocalConvolution(8, 8, 0),
        "kernel_size must be from 1 to 2147483647, got 0",
    ),
    "a script": (
        lambda: torch.jit.script(Plain(16)),
        "it is a TorchScript module; convert before torch.jit.script or trace",
    ),
    "a graph": (
        lambda: torch.fx.symbolic_trace(Plain(16)),
        "it is a graph of torch.fx; convert before tracing",
    ),
}


class CoT_Attention(nn.Module):
    """What can be scripted and traced."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.key_embed = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.key_embed(x)


Plain = CoT_Attention


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("what", OTHERS)
def test_other_behaviour_is_left_alone(what):
    make, reason = OTHERS[what]
    layer = make()
    kind = type(layer)
    layer, report = converted(layer)
    assert type(layer) is kind
    assert report[0].replacement is None
    assert report[0].remark == reason or reason.endswith(": ") and reason in report[0].remark


def test_a_forward_that_cannot_begin_here():
    """Such as one that imports CuPy: the structure decides, and the report tells."""

    class CotLayer(official.CotLayer):
        def forward(self, x):
            raise ImportError("No module named 'cupy'")

    class Tokens(official.CotLayer):
        def forward(self, x):
            n, tokens, c = x.shape
            return super().forward(x.transpose(1, 2).reshape(n, c, -1, 4))

    model, report = converted(nn.ModuleList([CotLayer(8, 3), CotLayer(8, 3), Tokens(8, 3)]))
    remark = "not compared, as its forward does not run on the CPU: ImportError: No module named "
    layers = [finding for finding in report if "local_conv" not in finding.path]
    assert [finding.replacement for finding in layers] == ["cotnet_ext.CotLayer"] * 2 + [None]
    assert [finding.remark for finding in layers[:2]] == [f"{remark}'cupy'"] * 2
    assert layers[2].remark.startswith("its forward fails on a map [2, 8, 8, 16]: ValueError: too ")
    assert model[0](randn(2, 8, 5, 4, dtype=torch.float32)).shape == (2, 8, 5, 4)


def test_attributes_of_the_object_count():
    """Two layers of one class that compute different things are told apart."""

    class CoTAttention(official.CoTAttention):
        shortcut = False

        def forward(self, x):
            y = super().forward(x)
            return x + y if self.shortcut else y

    model = nn.Sequential(*(CoTAttention(8) for _ in range(4)))
    model[1].shortcut = model[3].shortcut = True
    _, report = converted(model)
    assert swapped(report) == ["0", "2"]


def test_lost_methods_are_told():
    class CoTAttention(official.CoTAttention):
        def fuse(self):
            return self

        @property
        def width(self):
            return self.dim

    _, report = converted(CoTAttention(8))
    assert str(report[0]).endswith("-> cotnet_ext.CoTAttention (without its fuse, width)")


def test_the_parts_of_a_refused_layer_are_swapped():
    layer, report = converted(Two(8, 3))
    assert type(layer) is Two
    assert type(layer.local_conv) is cotnet_ext.LocalConvolution
    assert swapped(report) == ["local_conv"]


def test_other_modules_are_not_mentioned(caplog):
    caplog.set_level(logging.DEBUG)
    _, report = converted(nn.Sequential(nn.Conv2d(8, 8, 3), nn.MultiheadAttention(8, 2)))
    assert report == []
    assert caplog.records == []


def test_swaps_are_logged(caplog):
    caplog.set_level(logging.INFO)
    convert(nn.Sequential(official.CoTAttention(8)))
    assert caplog.record_tuples == [
        (
            "cotnet_ext.conversion",
            logging.INFO,
            "0: foreign_official.CoTAttention -> cotnet_ext.CoTAttention",
        )
    ]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("yolov5s.pt",), {}, "model must be a torch.nn.Module, got str"),
        (
            ({"model": nn.ReLU()},),
            {},
            "model must be a torch.nn.Module, got dict; a checkpoint that holds a whole model "
            "usually has it under 'model' or 'ema'",
        ),
        ((nn.ReLU(),), {"dry_run": 1}, "dry_run must be a bool, got 1"),
        ((nn.ReLU(),), {"report": True}, "report must be a list to add to, got bool"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(TypeError) as refused:
        convert(*arguments, **options)
    assert str(refused.value) == message
