"""GoogLeNet with BatchNorm for 32x32 pixels (Szegedy et al. 2015).

``googlenet-kuangliu``; ``googlenet-weiaicunzai`` has three convolutions and a max-pool before the
blocks. Keys and widths: models/googlenet.py of kuangliu/pytorch-cifar and
weiaicunzai/pytorch-cifar100.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named
from oodcli.networks.architectures.trunk import with_linear

_NAMES = ("googlenet-kuangliu", "googlenet-weiaicunzai")
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
    def __init__(self, weiaicunzai: bool, num_classes: int, channels: int) -> None:
        super().__init__()
        widths = (channels, 64, 64, 192) if weiaicunzai else (channels, 192)
        stem: list[nn.Module] = []
        for before, width in pairwise(widths):
            stem.append(nn.Conv2d(before, width, 3, 1, 1, bias=not weiaicunzai))
            stem += [nn.BatchNorm2d(width), nn.ReLU()]
        self.pre_layers = nn.Sequential(*stem)
        self.pooled = ("a3", "a4", "a5") if weiaicunzai else ("a4", "a5")
        for name, branches in _WIDTHS.items():
            self.add_module(name, Inception(width, branches))
            width = branches[0] + branches[2] + branches[4] + branches[5]
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_layers(x)
        for name in _WIDTHS:
            if name in self.pooled:
                x = F.max_pool2d(x, 3, 2, 1)
            x = self.get_submodule(name)(x)
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    return GoogLeNet(name == _NAMES[1], num_classes, channels) if name in _NAMES else None


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """kuangliu's keys: weiaicunzai's ``prelayer`` → ``pre_layers``."""
    renamed = with_linear(state)
    return {re.sub(r"^prelayer\.", "pre_layers.", key): value for key, value in renamed.items()}


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family."""
    state = rename(state)
    name = _NAMES["pre_layers.3.weight" in state]
    return named(name, state, first="pre_layers.0.weight")
