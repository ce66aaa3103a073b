"""PNASNet's cells for 32x32 pixels (Liu et al. 2018), as of kuangliu/pytorch-cifar:
``pnasneta-kuangliu`` and ``pnasnetb-kuangliu``. Keys and widths: models/pnasnet.py there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named
from oodcli.networks.architectures.trunk import Trunk, with_linear

_WIDTHS = {"pnasneta-kuangliu": 44, "pnasnetb-kuangliu": 32}
_CELLS = 6
"""Cells of a stage, of which there are three."""


class Depthwise(nn.Module):
    """A convolution in as many groups as channels come in, and BatchNorm."""

    def __init__(self, width_in: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            width_in, width, kernel, stride, kernel // 2, groups=width_in, bias=False
        )
        self.bn1 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x))  # type: ignore[no-any-return]


class CellA(nn.Module):
    """A 7x7 convolution and a max-pool, added. Where the stride is 2, a 1x1 convolution follows the
    pool."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.sep_conv1 = Depthwise(width_in, width, 7, stride)
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False) if stride == 2 else nn.Identity()
        self.bn1 = nn.BatchNorm2d(width) if stride == 2 else nn.Identity()

    def pooled(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(F.max_pool2d(x, 3, self.stride, 1)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.sep_conv1(x) + self.pooled(x))


class CellB(CellA):
    """The sums of a 7x7 and a 3x3 convolution, and of the pool and a 5x5 one, reduced to one."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__(width_in, width, stride)
        self.sep_conv2 = Depthwise(width_in, width, 3, stride)
        self.sep_conv3 = Depthwise(width_in, width, 5, stride)
        self.conv2 = nn.Conv2d(2 * width, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.sep_conv1(x) + self.sep_conv2(x))
        right = F.relu(self.pooled(x) + self.sep_conv3(x))
        return F.relu(self.bn2(self.conv2(torch.cat([left, right], 1))))


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    if name not in _WIDTHS:
        return None
    cell, width = CellB if name.startswith("pnasnetb") else CellA, _WIDTHS[name]
    stages: dict[str, nn.Module] = {}
    for place in range(3):
        if place:
            stages[f"layer{2 * place}"] = cell(width, 2 * width, 2)
            width *= 2
        stages[f"layer{2 * place + 1}"] = nn.Sequential(
            *(cell(width, width, 1) for _ in range(_CELLS))
        )
    return Trunk(
        nn.Conv2d(channels, _WIDTHS[name], 3, 1, 1, bias=False), stages, width, num_classes
    )


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of a Family. There is one layout, but for the name of the head."""
    return with_linear(state)


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family."""
    state = rename(state)
    if "layer2.sep_conv1.conv1.weight" not in state:
        return None
    letter = "b" if "layer2.sep_conv2.conv1.weight" in state else "a"
    return named(f"pnasnet{letter}-kuangliu", state)
