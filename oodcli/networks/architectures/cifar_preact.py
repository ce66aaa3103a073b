"""ResNets with pre-activation (He et al. 2016b) and SENet (Hu et al. 2018), for 32x32 pixels.

``preactresnet18-kuangliu``: no BatchNorm after the first convolution, none before the mean, and a
projection sees the activated input. ``senet18-kuangliu``: the same blocks with squeeze and
excitation, after a BatchNorm. ``preactresnet18-weiaicunzai``: convolutions with biases, a
projection sees the raw input, and the first convolution of a bottleneck has the stride. Keys and
widths: models/preact_resnet.py and models/senet.py of kuangliu/pytorch-cifar,
models/preactresnet.py of weiaicunzai/pytorch-cifar100.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named
from oodcli.networks.architectures.trunk import LAYERS, RESNET_DEPTHS, Trunk, depths, with_linear

_NAME = re.compile(r"(preactres|se)net(18|34|50|101|152)-(kuangliu|weiaicunzai)")


class PreAct(nn.Module):
    """BatchNorm, ReLU and convolution, twice or thrice, beside the identity or a projection.

    squeeze: whether squeeze and excitation follow. weiaicunzai: whether it is that repository's.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        stride: int,
        *,
        bottleneck: bool,
        squeeze: bool,
        weiaicunzai: bool,
    ) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width
        self.raw = weiaicunzai
        self.bn1 = nn.BatchNorm2d(width_in)
        self.bn2 = nn.BatchNorm2d(width)
        if bottleneck:
            first, second = (stride, 1) if weiaicunzai else (1, stride)
            self.conv1 = nn.Conv2d(width_in, width, 1, first, bias=weiaicunzai)
            self.conv2 = nn.Conv2d(width, width, 3, second, 1, bias=weiaicunzai)
        else:
            self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=weiaicunzai)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=weiaicunzai)
        self.bn3 = nn.BatchNorm2d(width) if bottleneck else None
        self.conv3 = nn.Conv2d(width, out, 1, bias=weiaicunzai) if bottleneck else None
        self.shortcut: nn.Module | None = None
        if stride != 1 or width_in != out:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, out, 1, stride, bias=weiaicunzai))
        self.fc1 = nn.Conv2d(out, out // 16, 1) if squeeze else None
        self.fc2 = nn.Conv2d(out // 16, out, 1) if squeeze else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        if self.conv3 is not None and self.bn3 is not None:
            out = self.conv3(F.relu(self.bn3(out)))
        if self.fc1 is not None and self.fc2 is not None:
            out = out * self.fc2(F.relu(self.fc1(out.mean((2, 3), keepdim=True)))).sigmoid()
        if self.shortcut is not None:
            x = self.shortcut(x if self.raw else active)
        return out + x  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    match = _NAME.fullmatch(name)
    if match is None or (match[1] == "se" and name != "senet18-kuangliu"):
        return None
    squeeze, weiaicunzai = match[1] == "se", match[3] == "weiaicunzai"
    bottleneck = int(match[2]) > 34
    width_in = 64
    stages: dict[str, nn.Module] = {}
    for place, count in enumerate(RESNET_DEPTHS[int(match[2])]):
        blocks = []
        for number in range(count):
            stride = 2 if place and number == 0 else 1
            blocks.append(
                PreAct(
                    width_in,
                    64 << place,
                    stride,
                    bottleneck=bottleneck,
                    squeeze=squeeze,
                    weiaicunzai=weiaicunzai,
                )
            )
            width_in = (64 << place) * (4 if bottleneck else 1)
        stages[LAYERS[place]] = nn.Sequential(*blocks)
    stem = nn.Conv2d(channels, 64, 3, 1, 1, bias=weiaicunzai)
    return Trunk(stem, stages, width_in, num_classes, norm=squeeze or weiaicunzai)


_PARTS = {"0": "bn1", "2": "conv1", "3": "bn2", "5": "conv2", "6": "bn3", "8": "conv3"}
"""Where weiaicunzai's ``residual`` has the layers of a block."""


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """kuangliu's keys, also from weiaicunzai's ``stage1.0.residual.0``."""
    renamed = {}
    for key, value in with_linear(state).items():
        key = re.sub(r"^pre\.0\.", "conv1.", key)
        key = re.sub(r"^pre\.1\.", "bn1.", key)
        key = re.sub(r"^stage(\d)\.", r"layer\1.", key)
        key = re.sub(r"\.residual\.([023568])\.", lambda m: f".{_PARTS[m[1]]}.", key)
        key = re.sub(r"\.shortcut\.(weight|bias)$", r".shortcut.0.\1", key)
        renamed[key] = value
    return renamed


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family."""
    state = rename(state)
    if "layer4.0.bn2.weight" not in state or "layer2.0.shortcut.0.weight" not in state:
        return None
    bottleneck = "layer1.0.conv3.weight" in state
    found = depths(state, LAYERS)
    for layers, expected in RESNET_DEPTHS.items():
        if found == expected and bottleneck == (layers > 34):
            kind = "se" if "layer1.0.fc1.weight" in state else "preactres"
            repository = "weiaicunzai" if "layer1.0.conv1.bias" in state else "kuangliu"
            return named(f"{kind}net{layers}-{repository}", state)
    return None
