"""CIFAR ResNets of depth 6n + 2 with pre-activation (He et al. 2016b), as of
bearpaw/pytorch-classification: ``preresnet20-bearpaw``, with bottlenecks from 44 layers on. Keys
and widths: models/cifar/preresnet.py there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named
from oodcli.networks.architectures.trunk import LAYERS, depths

_NAME = re.compile(r"preresnet(\d+)-bearpaw")
_BOTTLENECK = 44
"""Layers from which a block has three convolutions."""


class Block(nn.Module):
    """BatchNorm, ReLU and convolution, twice or thrice, beside the raw input or its projection."""

    def __init__(self, width_in: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width
        shapes = [(width_in, width, 3, stride), (width, width, 3, 1)]
        if bottleneck:
            shapes = [(width_in, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        self.count = len(shapes)
        for number, (before, after, side, step) in enumerate(shapes, 1):
            self.add_module(f"bn{number}", nn.BatchNorm2d(before))
            convolution = nn.Conv2d(before, after, side, step, side // 2, bias=False)
            self.add_module(f"conv{number}", convolution)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or width_in != out:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, out, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for number in range(1, self.count + 1):
            out = F.relu(self.get_submodule(f"bn{number}")(out))
            out = self.get_submodule(f"conv{number}")(out)
        return out + self.downsample(x)  # type: ignore[no-any-return]


class PreResNet(nn.Module):
    """(N, channels, H, W) → (N, num_classes)."""

    def __init__(self, layers: int, num_classes: int, channels: int) -> None:
        super().__init__()
        bottleneck = layers >= _BOTTLENECK
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        width_in = 16
        for place, width in enumerate((16, 32, 64)):
            blocks: list[nn.Module] = []
            for number in range((layers - 2) // 6):
                blocks.append(Block(width_in, width, 2 if place and not number else 1, bottleneck))
                width_in = 4 * width if bottleneck else width
            self.add_module(LAYERS[place], nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(width_in)
        self.fc = nn.Linear(width_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in LAYERS[:3]:
            x = self.get_submodule(stage)(x)
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) % 6 != 2 or int(match[1]) < 8:
        return None
    return PreResNet(int(match[1]), num_classes, channels)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of a Family. There is one layout."""
    return dict(state)


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family: by the number of blocks."""
    blocks = depths(state, LAYERS)
    if "bn.running_mean" not in state or blocks != (blocks[0],) * 3 + (0,) or not blocks[0]:
        return None
    return named(f"preresnet{6 * blocks[0] + 2}-bearpaw", state, last="fc.weight")
