"""The networks: stem, four stages of bottlenecks, and a classifier or the maps of the stages.

One definition for all variants; what differs between them is in `table.py`. Parameters have the
names, the shapes and the order of the official code, and the same seed initialises them alike.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .. import modules
from .blocks import EXPANSION, BlurPool, Bottleneck, SplitAttention, follow, shortcut
from .features import FeatureInfo
from .recompute import recompute
from .table import Variant

PLANES = (64, 128, 256, 512)  # of the four stages
POOLS = ("avg", "max", "")


class _Backbone(nn.Module):
    """What classifier and feature extractor share: the stem and the first `stages` stages.

    Args:
        variant: what to build.
        layers: `cotnet_ext.modules`, or `cotnet_ext.reference` for the network in plain PyTorch,
            module by module.
        in_chans: channels of the image.
        drop_path_rate: of the last block; it grows linearly from 0 at the first.
        output_stride: 8, 16 or 32. Stages that would go beyond it keep the size of their maps:
            3x3 convolutions are dilated instead, contextual layers stay as they are.
        stages: how many of them are built.
    """

    def __init__(
        self,
        variant: Variant,
        layers: ModuleType,
        in_chans: int,
        drop_path_rate: float,
        output_stride: int,
        stages: int = len(PLANES),
    ) -> None:
        super().__init__()
        self.variant = variant
        self.pretrained_cfg = self.default_cfg = variant.pretrained_cfg()
        self.in_chans = in_chans
        self.fused = layers is modules
        self.grad_checkpointing = False
        self.conv1, channels = _stem(variant, in_chans)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        deep = variant.split_attention
        self.maxpool = nn.Identity() if deep else nn.MaxPool2d(3, stride=2, padding=1)
        self.feature_info: Any = [{"num_chs": channels, "reduction": 2, "module": "act1"}]
        reduction, dilation = 2 if deep else 4, 1
        for index, planes in enumerate(PLANES):
            stride = 1 if index == 0 and not deep else 2
            dilations = dilation, dilation
            if reduction >= output_stride:
                stride, dilations = 1, (dilation, dilation * stride)
            dilation, reduction, name = dilations[1], reduction * stride, f"layer{index + 1}"
            if index < stages:
                rates = _drop_path_rates(variant, drop_path_rate, index)
                stage = _stage(variant, layers, index, channels, stride, dilations, rates)
                self.add_module(name, stage)
            channels = planes * EXPANSION
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": name})
        self.stage_names = tuple(f"layer{index + 1}" for index in range(stages))

    def _initialise(self) -> None:
        """He's initialisation; each block starts as its shortcut."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def _run(self, images: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """The map of the last stage; to `maps` go that after the stem and those of the stages.

        Where nobody asks for them they are not kept: after the stem of some variants the map is
        the largest of all.
        """
        x = follow(self.fused, images, self.conv1, self.bn1, self.act1)
        if maps is not None:
            maps.append(x)
        x = self.maxpool(x)
        for name in self.stage_names:
            for block in getattr(self, name):
                x = recompute(block, x) if self.grad_checkpointing and self.training else block(x)
            if maps is not None:
                maps.append(x)
        return x

    def _maps(self, images: Tensor) -> list[Tensor]:
        """The map after the stem, and that of each stage."""
        maps: list[Tensor] = []
        self._run(images, maps)
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep the inputs of the blocks only, and compute the rest twice."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: biases and those of norms."""
        return {name for name, value in self.named_parameters() if value.dim() <= 1}

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """What timm groups parameters by, for learning rates that differ along the depth."""
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^conv1|bn1|maxpool", "blocks": blocks}


class CoTNet(_Backbone):
    """A classifier: `forward(images [N, in_chans, H, W]) -> logits [N, num_classes]`.

    With `num_classes=0` there is no classifier: `[N, 2048]`, and with `global_pool=""` beside it
    the map `[N, 2048, H/32, W/32]`. `cotnet_ext.models.create_model` builds it and says more.

    Attributes:
        variant: the row of the table, also as timm's `pretrained_cfg`.
        feature_info: for each map a dict of channels, stride and name of the module.
    """

    def __init__(
        self,
        variant: Variant,
        layers: ModuleType,
        *,
        num_classes: int,
        in_chans: int,
        drop_rate: float,
        drop_path_rate: float,
        output_stride: int,
        global_pool: str,
    ) -> None:
        super().__init__(variant, layers, in_chans, drop_path_rate, output_stride)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = PLANES[-1] * EXPANSION
        self.drop_rate = drop_rate
        self.global_pool = global_pool
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self._initialise()

    def forward_features(self, images: Tensor) -> Tensor:
        """The map of the last stage, `[N, 2048, H/32, W/32]`."""
        return self._run(images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the map of the last stage; what the classifier would see if `pre_logits`."""
        x = features
        if self.global_pool:
            x = x.mean((2, 3)) if self.global_pool == "avg" else x.amax((2, 3))
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """The last layer: `nn.Linear`, or `nn.Identity` if there are no classes."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new, random classifier where the old one is, of its dtype and on its device."""
        global_pool = self.global_pool if global_pool is None else global_pool
        check_head(num_classes, global_pool)
        like = self.layer4[-1].conv3.weight
        self.num_classes, self.global_pool = num_classes, global_pool
        self.fc = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(
                self.num_features, num_classes, device=like.device, dtype=like.dtype
            )


class CoTNetFeatures(_Backbone):
    """A backbone: `forward(images [N, in_chans, H, W])` is a list of maps, the largest first.

    Map 0 is that of the stem at half the size of the image, 1 to 4 are those of the stages. Stages
    after the last map that is asked for are not built.

    Attributes:
        feature_info: `channels()` and `reduction()` are lists of one number for each map.
    """

    def __init__(
        self,
        variant: Variant,
        layers: ModuleType,
        *,
        in_chans: int,
        drop_path_rate: float,
        output_stride: int,
        out_indices: tuple[int, ...],
    ) -> None:
        stages = max(out_indices)
        super().__init__(variant, layers, in_chans, drop_path_rate, output_stride, stages)
        self.out_indices = out_indices
        self.feature_info = FeatureInfo(self.feature_info, out_indices)
        self._initialise()

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self._maps(images)
        return [maps[index] for index in self.out_indices]


def check_head(num_classes: int, global_pool: str) -> None:
    """Raises unless a classifier for so many classes can follow this pooling."""
    if not isinstance(num_classes, int) or isinstance(num_classes, bool):
        raise TypeError(f"num_classes must be an int, got {num_classes!r}")
    if num_classes < 0:
        raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
    if global_pool not in POOLS:
        raise ValueError(f"global_pool must be 'avg', 'max' or '' (none), got {global_pool!r}")
    if num_classes and not global_pool:
        raise ValueError(f"global_pool='' needs num_classes=0, got {num_classes}")


def _stem(variant: Variant, in_chans: int) -> tuple[nn.Module, int]:
    """What halves the image before the first norm, and the channels of its result."""
    width = variant.stem_width
    if width is None:
        return nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False), 64
    layers = nn.Sequential(
        nn.Conv2d(in_chans, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
    )
    return layers, 2 * width


def _drop_path_rates(variant: Variant, last: float, stage: int) -> list[float]:
    """Those of the blocks of a stage, on the line from 0 at the first block of all to `last`."""
    first, total = sum(variant.blocks[:stage]), sum(variant.blocks)
    return [last * (first + block) / (total - 1) for block in range(variant.blocks[stage])]


def _stage(
    variant: Variant,
    layers: ModuleType,
    index: int,
    channels: int,
    stride: int,
    dilations: tuple[int, int],
    rates: list[float],
) -> nn.Sequential:
    """The blocks of a stage; the first one brings the map to the size and the channels of it.

    `dilations` are those before this stage, for the first block, and within it.
    """
    planes = PLANES[index]
    width = planes * variant.base_width // 64 * variant.cardinality
    result, fused = planes * EXPANSION, layers is modules
    # Modules draw their random numbers in the order in which they are made: the shortcut is first.
    projection = shortcut(channels, result, stride, dilations[1], variant.split_attention)
    first = _attention(variant, layers, index, 0, width, stride, dilations[0])
    blocks = [Bottleneck(channels, planes, width, *first, projection, rates[0], fused)]
    for block, rate in enumerate(rates[1:], 1):
        attention = _attention(variant, layers, index, block, width, 1, dilations[1])
        blocks.append(Bottleneck(result, planes, width, *attention, None, rate, fused))
    return nn.Sequential(*blocks)


def _attention(
    variant: Variant,
    layers: ModuleType,
    index: int,
    block: int,
    width: int,
    stride: int,
    dilation: int,
) -> tuple[Callable[[], nn.Module], nn.Module | None, nn.Module | None]:
    """What makes the attention of a block, and the pooling before and after it."""
    blurs = stride > 1 and variant.blur_pooling
    after = BlurPool(width) if blurs else None
    if variant.split_attention and (index < 2 or (index == 2 and block % 2 == 1)):
        steps = 1 if blurs else stride
        fused = layers is modules
        return lambda: SplitAttention(width, steps, dilation, fused), None, after
    before = nn.AvgPool2d(3, stride, padding=1) if stride > 1 and not blurs else None
    layer = layers.CotLayer if variant.cardinality == 1 else layers.CoXtLayer
    return lambda: layer(width, kernel_size=3), before, after
