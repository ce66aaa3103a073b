"""ShuffleNet (Zhang et al. 2018) and ShuffleNetV2 (Ma et al. 2018) for 32x32 pixels, as of
kuangliu/pytorch-cifar.

``shufflenetg2-kuangliu`` and ``g3``: the number of groups. ``shufflenetv2_x1_0-kuangliu``, also
x0_5, x1_5 and x2_0: the width. Keys and widths: models/shufflenet.py and models/shufflenetv2.py
there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named
from oodcli.networks.architectures.trunk import LAYERS, Trunk, with_linear

_GROUPS = {"shufflenetg2-kuangliu": 2, "shufflenetg3-kuangliu": 3}
_WIDTHS = {
    "shufflenetv2_x0_5-kuangliu": (48, 96, 192, 1024),
    "shufflenetv2_x1_0-kuangliu": (116, 232, 464, 1024),
    "shufflenetv2_x1_5-kuangliu": (176, 352, 704, 1024),
    "shufflenetv2_x2_0-kuangliu": (224, 488, 976, 2048),
}
_COUNTS = (4, 8, 4)
"""Blocks of the three stages, of either version."""


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels in the order first of every group, second of every group …"""
    count, width, height, breadth = x.shape
    grouped = x.view(count, groups, width // groups, height, breadth)
    return grouped.transpose(1, 2).reshape(x.shape)


class ShuffleBlock(nn.Module):
    """Grouped 1x1, depthwise 3x3 and grouped 1x1 convolution, ``out`` channels: added to the input,
    or appended to the input's averages where the stride is 2."""

    def __init__(self, width_in: int, out: int, stride: int, groups: int, first: bool) -> None:
        super().__init__()
        width = out // 4
        self.stride = stride
        self.groups = 1 if first else groups
        self.conv1 = nn.Conv2d(width_in, width, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        out = shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        if self.stride == 1:
            return F.relu(out + x)
        return F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1))


class Half(nn.Module):
    """1x1, depthwise 3x3 and 1x1 convolution of the second half of the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        rest, x = x.chunk(2, 1)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out = F.relu(self.bn3(self.conv3(out)))
        return shuffle(torch.cat([rest, out], 1), 2)


class Down(nn.Module):
    """(N, width_in, H, W) → (N, width, H/2, W/2) by two branches."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(width_in, width_in, 3, 2, 1, groups=width_in, bias=False)
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv2 = nn.Conv2d(width_in, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(width_in, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        right = F.relu(self.bn5(self.conv5(right)))
        return shuffle(torch.cat([left, right], 1), 2)


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    width_in = 24
    stages: dict[str, nn.Module] = {}
    if name in _GROUPS:
        groups = _GROUPS[name]
        width = {2: 200, 3: 240}[groups]
        for layer, count in zip(LAYERS, _COUNTS, strict=False):
            first = ShuffleBlock(width_in, width - width_in, 2, groups, layer == "layer1")
            rest = [ShuffleBlock(width, width, 1, groups, False) for _ in range(count - 1)]
            stages[layer] = nn.Sequential(first, *rest)
            width_in, width = width, 2 * width
        return Trunk(nn.Conv2d(channels, 24, 1, bias=False), stages, width_in, num_classes)
    if name not in _WIDTHS:
        return None
    *widths, last = _WIDTHS[name]
    for layer, count, width in zip(LAYERS, _COUNTS, widths, strict=False):
        stages[layer] = nn.Sequential(
            Down(width_in, width), *(Half(width) for _ in range(count - 1))
        )
        width_in = width
    stem = nn.Conv2d(channels, 24, 3, 1, 1, bias=False)
    return Trunk(stem, stages, width_in, num_classes, last=last)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of a Family. There is one layout, but for the name of the head."""
    return with_linear(state)


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family: by the width of the last stage."""
    state = rename(state)
    if "layer1.0.bn5.weight" in state and "conv2.weight" in state:
        for name, widths in _WIDTHS.items():
            if state["conv2.weight"].shape[1:2] == (widths[2],):
                return named(name, state)
    elif "layer3.3.bn3.weight" in state:
        for name, groups in _GROUPS.items():
            if state["layer3.3.bn3.weight"].shape == ({2: 800, 3: 960}[groups],):
                return named(name, state)
    return None
