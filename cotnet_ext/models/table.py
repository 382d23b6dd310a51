"""The networks as data: what each is built of, what it costs, what was published about it.

`blocks`, `cardinality`, `base_width`, `stem_width`, `split_attention` and `blur_pooling` say how to
build a network and are those of `models/cotnet.py` and `models/cotnet_hybrid.py` of JDAI-CV/CoTNet.
`input_size`, `crop_pct`, `interpolation`, `mean` and `std` are its `default_cfgs`: how an image is
prepared in evaluation. `top1`, `top5` and `published_size` are the table of its README (ImageNet,
in percent, and the size of the images); None where nothing was published. `params` and `gmacs` are
counted, the latter at `input_size`: convolutions, classifier and aggregations (9 per channel and
pixel), without norms, activations and pooling. `tests/test_models_table.py` counts again.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One network; see the top of this file."""

    name: str
    title: str
    blocks: tuple[int, int, int, int]
    params: int
    gmacs: float
    cardinality: int = 1
    base_width: int = 64
    # SE-CoTNetD: a stem of three 3x3 convolutions with this width, no max pooling after it, average
    # pooling in the shortcuts, and split attention in stages 1 and 2 and every other block of 3.
    stem_width: int | None = None
    # Blur pooling after the attention where the others average before it.
    blur_pooling: bool = False
    input_size: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    published_size: int | None = None
    top1: float | None = None
    top5: float | None = None

    @property
    def split_attention(self) -> bool:
        """Whether this is an SE-CoTNetD, in which two kinds of attention take turns."""
        return self.stem_width is not None

    @property
    def first_conv(self) -> str:
        """The name of the convolution that sees the image."""
        return "conv1.0" if self.split_attention else "conv1"

    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm's data configuration reads; no weights are published under an address."""
        side = self.input_size[1] // 32
        return {
            "architecture": self.name,
            "url": "",
            "num_classes": 1000,
            "input_size": self.input_size,
            "pool_size": (side, side),
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
            "mean": self.mean,
            "std": self.std,
            "first_conv": self.first_conv,
            "classifier": "fc",
        }


_SE_152 = {
    "blocks": (3, 8, 36, 3),
    "stem_width": 64,
    "blur_pooling": True,
    "params": 55_783_688,
}
_AT_256 = {"input_size": (3, 256, 256), "crop_pct": 0.888}

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            "cotnet50",
            "CoTNet-50",
            (3, 4, 6, 3),
            params=22_222_416,
            gmacs=3.243,
            published_size=224,
            top1=81.3,
            top5=95.6,
        ),
        Variant(
            "cotnet101",
            "CoTNet-101",
            (3, 4, 23, 3),
            params=38_272_048,
            gmacs=6.050,
            published_size=224,
            top1=82.8,
            top5=96.2,
        ),
        Variant(
            "cotnext50_2x48d",
            "CoTNeXt-50",
            (3, 4, 6, 3),
            cardinality=2,
            base_width=48,
            params=30_046_276,
            gmacs=4.255,
            published_size=224,
            top1=82.1,
            top5=95.9,
        ),
        Variant(
            "cotnext101_2x48d",
            "CoTNeXt-101",
            (3, 4, 23, 3),
            cardinality=2,
            base_width=48,
            params=53_346_068,
            gmacs=8.073,
            published_size=224,
            top1=83.2,
            top5=96.4,
        ),
        Variant(
            "se_cotnetd_50",
            "SE-CoTNetD-50",
            (3, 4, 6, 3),
            stem_width=32,
            params=23_107_784,
            gmacs=4.048,
            published_size=224,
            top1=81.6,
            top5=95.8,
        ),
        Variant(
            "se_cotnetd_101",
            "SE-CoTNetD-101",
            (3, 4, 23, 3),
            stem_width=64,
            params=40_912_392,
            gmacs=8.436,
            published_size=224,
            top1=83.2,
            top5=96.5,
        ),
        # The README says 224 and 17.0 GMACs, which are those of the 256 of its configuration.
        Variant(
            "se_cotnetd_152",
            "SE-CoTNetD-152",
            gmacs=16.84,
            published_size=224,
            top1=84.0,
            top5=97.0,
            **_SE_152,
            **_AT_256,
        ),
        Variant(
            "se_cotnetd_152_L",
            "SE-CoTNetD-152-L",
            gmacs=26.31,
            input_size=(3, 320, 320),
            crop_pct=0.909,
            published_size=320,
            top1=84.6,
            top5=97.1,
            **_SE_152,
        ),
        Variant(
            "se_cotnetd_200",
            "SE-CoTNetD-200",
            (3, 24, 36, 3),
            stem_width=64,
            blur_pooling=True,
            params=60_399_368,
            gmacs=21.4,
            **_AT_256,
        ),
        Variant(
            "se_cotnetd_270",
            "SE-CoTNetD-270",
            (4, 29, 53, 4),
            stem_width=64,
            blur_pooling=True,
            params=83_380_648,
            gmacs=27.55,
            **_AT_256,
        ),
    )
}


def list_models() -> list[str]:
    """The names that `create_model` takes."""
    return list(VARIANTS)


def get_variant(name: str) -> Variant:
    """The row of that name in the table; a `ValueError` that suggests the nearest if none is."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if name in VARIANTS:
        return VARIANTS[name]
    known = {v.title.lower(): key for key, v in VARIANTS.items()}
    known |= {key.lower(): key for key in VARIANTS}
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)
    raise ValueError(
        f"no model is named {name!r}; did you mean {known[near[0]]!r}? "
        "cotnet_ext.models.list_models() has all names"
    )
