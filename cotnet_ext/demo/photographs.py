"""Real photographs and the feature maps the modules are run on.

scikit-learn ships two photographs, a temple and a flower, 427 x 640 pixels each. Eight crops of
224 x 224 (the size ImageNet networks see) make a batch. A convolution whose filters are the
principal components of the photographs' own patches turns it into feature maps of the sizes the
stages of CoTNet have: it needs no training and no random numbers, its channels are uncorrelated
with mean 0 and variance 1, and one can say what each of them means.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CREDIT = "Photographs: china.jpg by danielbuechele, flower.jpg by vultilion (CC BY 2.0)"
CROP = 224


@dataclass(frozen=True)
class Stage:
    """The maps of one stage: `channels` components of patches taken every `stride` pixels."""

    channels: int
    stride: int

    @property
    def patch(self) -> int:
        """Side of a patch in pixels: overlapping at stride 4, 8 or more so as to have enough
        dimensions (3 * patch**2) to keep `channels` components of."""
        return max(8, self.stride)


# The first three stages of CoTNet at 224 x 224: 64 x 56 x 56, 128 x 28 x 28, 256 x 14 x 14.
STAGES = (Stage(64, 4), Stage(128, 8), Stage(256, 16))


def load_photographs() -> dict[str, Tensor]:
    """The photographs by name (`china`, `flower`) as float32 `[3, 427, 640]` in 0..1."""
    from sklearn.datasets import load_sample_image

    photographs = {}
    for name in ("china", "flower"):
        pixels = torch.from_numpy(load_sample_image(f"{name}.jpg").copy())
        photographs[name] = pixels.permute(2, 0, 1).float() / 255
    return photographs


def crops(photographs: dict[str, Tensor], per_photograph: int = 4) -> Tensor:
    """The batch `[2 * per_photograph, 3, 224, 224]`: the first corners of each photograph."""
    batch = []
    for photo in photographs.values():
        bottom, right = photo.shape[1] - CROP, photo.shape[2] - CROP
        corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)][:per_photograph]
        batch += [photo[:, top : top + CROP, left : left + CROP] for top, left in corners]
    return torch.stack(batch)


def principal_filters(photographs: dict[str, Tensor], stage: Stage) -> tuple[Tensor, Tensor]:
    """Filters `[channels, 3, patch, patch]` and bias `[channels]` of the whitening convolution.

    The filters are the leading eigenvectors of the covariance of the photographs' patches, each
    divided by its standard deviation; the bias subtracts the mean patch.
    """
    batch = torch.stack(list(photographs.values())).double()
    patches = F.unfold(batch, stage.patch, stride=4).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    variance, components = torch.linalg.eigh((patches - mean).T.cov(correction=0))
    leading = components[:, -stage.channels :] / variance[-stage.channels :].sqrt()
    filters = leading.flip(1).T
    bias = -(filters @ mean)
    return filters.reshape(stage.channels, 3, stage.patch, stage.patch).float(), bias.float()


def feature_maps(photographs: dict[str, Tensor], stage: Stage, per_photograph: int = 4) -> Tensor:
    """Feature maps `[2 * per_photograph, channels, 224 / stride, 224 / stride]`, float32."""
    filters, bias = principal_filters(photographs, stage)
    padding = (stage.patch - stage.stride) // 2
    return F.conv2d(crops(photographs, per_photograph), filters, bias, stage.stride, padding)
