"""What the tests of `optimize_for_inference` share."""

from __future__ import annotations

import torch
import torch._inductor.config
from torch import Tensor, nn

from cotnet_ext import modules
from cotnet_ext.models.blocks import DropPath

CL = torch.channels_last


def calibrate(model: nn.Module, images: Tensor) -> nn.Module:
    """Norms that are not the identity they start as, with the statistics of some images."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if value.dim() == 1:
            noise = torch.rand(value.shape, generator=generator).to(value) - 0.5
            value.data.copy_(noise + name.endswith("weight"))
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = None
    model.train()
    model(images)
    return model.eval()


@torch.no_grad()
def assert_same(model: nn.Module, fast: nn.Module, *inputs: Tensor) -> None:
    """Equal up to float64 rounding."""
    torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=1e-9, atol=1e-9)


def count(model: nn.Module, *kinds: type[nn.Module]) -> int:
    return sum(type(module) in kinds for module in model.modules())


class Residual(nn.Module):
    """As in torchvision: one ReLU for all places."""

    def __init__(self, channels: int = 16, conv: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.stride = 1
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = modules.CotLayer(channels, 3)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.drop_path = DropPath(0.3)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.drop_path(self.bn3(self.conv3(self.conv2(y))))
        y += x
        return self.relu(y)


def small_network() -> tuple[nn.Module, Tensor]:
    x = torch.randn(4, 3, 12, 12)
    stem = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()
    network = nn.Sequential(*stem, Residual(), modules.CoXtLayer(16, 3))
    return calibrate(network, x), x
