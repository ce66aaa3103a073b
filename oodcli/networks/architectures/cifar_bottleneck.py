"""Networks of 1x1, grouped 3x3 and 1x1 convolutions for 32x32 pixels.

``resnext29_2x64d-kuangliu`` (Xie et al. 2017), ``regnetx_200mf-kuangliu`` (Radosavovic et al.
2020), ``dpn26-kuangliu`` (Chen et al. 2017), and ``resnext50-weiaicunzai``, whose first 1x1
convolutions are grouped as well. Keys and widths: models/resnext.py, models/regnet.py and
models/dpn.py of kuangliu/pytorch-cifar, models/resnext.py of weiaicunzai/pytorch-cifar100.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named
from oodcli.networks.architectures.trunk import (
    LAYERS,
    SqueezeExcitation,
    Trunk,
    depths,
    projection,
    with_linear,
)


class Stage(NamedTuple):
    """blocks: how many. width: of the grouped convolution; out: after the block; dense: channels
    that each block of a dual path adds. first: groups of the first 1x1 convolution."""

    blocks: int
    width: int
    out: int
    stride: int
    groups: int
    dense: int = 0
    first: int = 1


class Config(NamedTuple):
    stages: tuple[Stage, ...]
    squeeze: bool = False
    kernel: int = 3
    """Of the first convolution."""


def _resnext(groups: int, width: int) -> Config:
    widths = [groups * width * scale for scale in (1, 2, 4)]
    rows = zip(widths, (1, 2, 2), strict=True)
    return Config(tuple(Stage(3, w, 2 * w, stride, groups) for w, stride in rows), kernel=1)


def _grouped(*counts: int) -> Config:
    rows = zip(counts, (128, 256, 512, 1024), (1, 2, 2, 2), strict=True)
    return Config(tuple(Stage(count, w, 2 * w, stride, 32, first=32) for count, w, stride in rows))


def _regnet(
    counts: tuple[int, ...], widths: tuple[int, ...], group: int, squeeze: bool = False
) -> Config:
    rows = zip(counts, widths, (1, 1, 2, 2), strict=True)
    return Config(
        tuple(Stage(count, width, width, stride, width // group) for count, width, stride in rows),
        squeeze,
    )


def _dpn(*counts: int) -> Config:
    return Config(
        tuple(
            Stage(count, 96 << place, 256 << place, 1 + (place > 0), 32, (16, 32, 24, 128)[place])
            for place, count in enumerate(counts)
        )
    )


_CONFIGS = {
    "resnext29_2x64d-kuangliu": _resnext(2, 64),
    "resnext29_4x64d-kuangliu": _resnext(4, 64),
    "resnext29_8x64d-kuangliu": _resnext(8, 64),
    "resnext29_32x4d-kuangliu": _resnext(32, 4),
    "regnetx_200mf-kuangliu": _regnet((1, 1, 4, 7), (24, 56, 152, 368), 8),
    "regnetx_400mf-kuangliu": _regnet((1, 2, 7, 12), (32, 64, 160, 384), 16),
    "regnety_400mf-kuangliu": _regnet((1, 2, 7, 12), (32, 64, 160, 384), 16, squeeze=True),
    "dpn26-kuangliu": _dpn(2, 2, 2, 2),
    "dpn92-kuangliu": _dpn(3, 4, 20, 3),
    "resnext50-weiaicunzai": _grouped(3, 4, 6, 3),
    "resnext101-weiaicunzai": _grouped(3, 4, 23, 3),
    "resnext152-weiaicunzai": _grouped(3, 4, 36, 3),
}


class Bottleneck(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolution, each with BatchNorm. squeezed: channels between squeeze
    and excitation, 0 where there is none."""

    def __init__(
        self, width_in: int, stage: Stage, stride: int, out: int, project: bool, squeezed: int = 0
    ) -> None:
        super().__init__()
        width = stage.width
        self.conv1 = nn.Conv2d(width_in, width, 1, groups=stage.first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=stage.groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.se = SqueezeExcitation(width, squeezed) if squeezed else nn.Identity()
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut = projection(width_in, out, stride) if project else nn.Identity()

    def inner(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.se(F.relu(self.bn2(self.conv2(out))))
        return self.bn3(self.conv3(out))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x) + self.shortcut(x))


class DualPath(Bottleneck):
    """The first ``kept`` channels are added, the others appended to those that came before."""

    def __init__(self, width_in: int, stage: Stage, stride: int, first: bool) -> None:
        super().__init__(width_in, stage, stride, stage.out + stage.dense, first)
        self.kept = stage.out

    def forward(self, x: Tensor) -> Tensor:
        out, x = self.inner(x), self.shortcut(x)
        kept = self.kept
        parts = [x[:, :kept] + out[:, :kept], x[:, kept:], out[:, kept:]]
        return F.relu(torch.cat(parts, 1))


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    config = _CONFIGS.get(name)
    if config is None:
        return None
    width_in = 64
    stages: dict[str, nn.Module] = {}
    for layer, stage in zip(LAYERS, config.stages, strict=False):
        blocks: list[nn.Module] = []
        for number in range(stage.blocks):
            stride = stage.stride if number == 0 else 1
            if stage.dense:
                blocks.append(DualPath(width_in, stage, stride, number == 0))
                width_in = stage.out + (number + 2) * stage.dense
                continue
            project = stride != 1 or width_in != stage.out
            squeezed = round(width_in / 4) if config.squeeze else 0
            blocks.append(Bottleneck(width_in, stage, stride, stage.out, project, squeezed))
            width_in = stage.out
        stages[layer] = nn.Sequential(*blocks)
    stem = nn.Conv2d(channels, 64, config.kernel, 1, config.kernel // 2, bias=False)
    return Trunk(stem, stages, width_in, num_classes)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """kuangliu's keys, also from weiaicunzai's ``conv2.0.split_transforms.0``."""
    renamed = with_linear(state)
    if "conv2.0.split_transforms.0.weight" not in state:
        return renamed
    rules = (
        (r"^conv1\.0\.", "conv1."),
        (r"^conv1\.1\.", "bn1."),
        *((rf"^conv{number + 1}\.(?=\d+\.)", f"layer{number}.") for number in (1, 2, 3, 4)),
        *((rf"\.split_transforms\.{3 * n}\.", f".conv{n + 1}.") for n in range(3)),
        *((rf"\.split_transforms\.{3 * n + 1}\.", f".bn{n + 1}.") for n in range(3)),
    )
    for pattern, replacement in rules:
        renamed = {re.sub(pattern, replacement, key): value for key, value in renamed.items()}
    return renamed


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family: by the blocks of each stage and the first grouped convolution."""
    state = rename(state)
    grouped = state.get("layer1.0.conv2.weight")
    if grouped is None or grouped.ndim != 4 or "layer1.0.conv3.weight" not in state:
        return None
    found = depths(state, LAYERS)
    squeeze = "layer1.0.se.se1.weight" in state
    for name, config in _CONFIGS.items():
        first = config.stages[0]
        counts = tuple(stage.blocks for stage in config.stages)
        if (
            found == (*counts, 0)[:4]
            and squeeze == config.squeeze
            and grouped.shape[:2] == (first.width, first.width // first.groups)
        ):
            return named(name, state)
    return None
