"""GoogLeNet with BatchNorm for 32x32 pixels (Szegedy et al. 2015), as of kuangliu/pytorch-cifar:
``googlenet-kuangliu``. Keys and widths: models/googlenet.py there."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named

_WIDTHS = {
    "a3": (64, 96, 128, 16, 32, 32),
    "b3": (128, 128, 192, 32, 96, 64),
    "a4": (192, 96, 208, 16, 48, 64),
    "b4": (160, 112, 224, 24, 64, 64),
    "c4": (128, 128, 256, 24, 64, 64),
    "d4": (112, 144, 288, 32, 64, 64),
    "e4": (256, 160, 320, 32, 128, 128),
    "a5": (256, 160, 320, 32, 128, 128),
    "b5": (384, 192, 384, 48, 128, 128),
}
"""Of each block: 1x1; before the 3x3, 3x3; before the two 3x3, two 3x3; after the max-pool."""


def convolutions(*widths: int) -> list[nn.Module]:
    """Convolutions with BatchNorm and ReLU: 1x1, then 3x3."""
    found: list[nn.Module] = []
    for place, (before, width) in enumerate(pairwise(widths)):
        kernel = 3 if place else 1
        found.append(nn.Conv2d(before, width, kernel, 1, kernel // 2))
        found += [nn.BatchNorm2d(width), nn.ReLU()]
    return found


class Inception(nn.Module):
    """Four branches beside each other. widths: as in ``_WIDTHS``."""

    def __init__(self, width_in: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        one, before_three, three, before_five, five, pooled = widths
        self.b1 = nn.Sequential(*convolutions(width_in, one))
        self.b2 = nn.Sequential(*convolutions(width_in, before_three, three))
        self.b3 = nn.Sequential(*convolutions(width_in, before_five, five, five))
        self.b4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), *convolutions(width_in, pooled))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], 1)


class GoogLeNet(nn.Module):
    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        width = 192
        self.pre_layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()
        )
        for name, widths in _WIDTHS.items():
            self.add_module(name, Inception(width, widths))
            width = widths[0] + widths[2] + widths[4] + widths[5]
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_layers(x)
        for name in _WIDTHS:
            if name in ("a4", "a5"):
                x = F.max_pool2d(x, 3, 2, 1)
            x = self.get_submodule(name)(x)
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    return GoogLeNet(num_classes, channels) if name == "googlenet-kuangliu" else None


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of a Family. There is one layout."""
    return dict(state)


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family."""
    return named("googlenet-kuangliu", state, first="pre_layers.0.weight")
