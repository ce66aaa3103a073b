"""MobileNet, MobileNetV2 and EfficientNet-B0 for 32x32 pixels: blocks of depthwise convolutions.

``mobilenet-kuangliu`` (Howard et al. 2017), ``mobilenetv2-kuangliu`` (Sandler et al. 2018),
``efficientnetb0-kuangliu`` (Tan and Le 2019), and weiaicunzai's with biases: those of the 1x1
convolutions in ``mobilenet-weiaicunzai``, all in ``mobilenetv2-weiaicunzai``, which has other
strides, ReLU6 and a 1x1 convolution as head. Keys, widths and strides: models/mobilenet.py,
models/mobilenetv2.py and models/efficientnet.py of kuangliu/pytorch-cifar, models/mobilenet.py and
models/mobilenetv2.py of weiaicunzai/pytorch-cifar100.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named
from oodcli.networks.architectures.trunk import SqueezeExcitation, Trunk, projection, with_linear

_SEPARABLE = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *(((512, 1),) * 5),
    *((1024, 2), (1024, 1)),
)
"""Channels and stride of MobileNet's blocks."""

_MOBILENET_V2 = (
    *((1, 16, 1, 3, 1), (6, 24, 2, 3, 1), (6, 32, 3, 3, 2), (6, 64, 4, 3, 2)),
    *((6, 96, 3, 3, 1), (6, 160, 3, 3, 2), (6, 320, 1, 3, 1)),
)
_WEIAICUNZAI_V2 = (
    *((1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 32, 3, 3, 2), (6, 64, 4, 3, 2)),
    *((6, 96, 3, 3, 1), (6, 160, 3, 3, 1), (6, 320, 1, 3, 1)),
)
_EFFICIENTNET = (
    *((1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 40, 2, 5, 2), (6, 80, 3, 3, 2)),
    *((6, 112, 3, 5, 1), (6, 192, 4, 5, 2), (6, 320, 1, 3, 1)),
)
"""Expansion, channels, number of blocks, kernel, stride of the first block."""

_NAMES = ("mobilenet-kuangliu", "mobilenet-weiaicunzai")


class Separable(nn.Module):
    """A depthwise and a 1x1 convolution, each with BatchNorm and ReLU."""

    def __init__(self, width_in: int, width: int, stride: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_in, 3, stride, 1, groups=width_in, bias=False)
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv2 = nn.Conv2d(width_in, width, 1, bias=bias)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)))


class Inverted(nn.Module):
    """1x1 convolution to ``expansion`` times the channels, depthwise and 1x1 convolution."""

    bias = False

    def __init__(self, width_in: int, width: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = expansion * width_in
        self.stride = stride
        self.conv1 = nn.Conv2d(width_in, inner, 1, bias=self.bias)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(
            inner, inner, kernel, stride, kernel // 2, groups=inner, bias=self.bias
        )
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, width, 1, bias=self.bias)
        self.bn3 = nn.BatchNorm2d(width)


class MobileBlock(Inverted):
    """MobileNetV2's. A projection stands beside a block that changes the width only."""

    def __init__(self, width_in: int, width: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__(width_in, width, expansion, kernel, stride)
        project = stride == 1 and width_in != width
        self.shortcut = projection(width_in, width, 1) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return out + self.shortcut(x) if self.stride == 1 else out  # type: ignore[no-any-return]


class BiasedBlock(Inverted):
    """weiaicunzai's MobileNetV2's, with the identity beside it where the shapes allow that."""

    bias = True

    def __init__(self, width_in: int, width: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__(width_in, width, expansion, kernel, stride)
        self.skips = stride == 1 and width_in == width

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(F.relu6(self.bn2(self.conv2(out)))))
        return out + x if self.skips else out  # type: ignore[no-any-return]


class EfficientBlock(Inverted):
    """EfficientNet's. Where the expansion is 1, its convolution has weights that are not used."""

    def __init__(self, width_in: int, width: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__(width_in, width, expansion, kernel, stride)
        self.expands = expansion != 1
        self.skips = stride == 1 and width_in == width
        self.se = SqueezeExcitation(expansion * width_in, width_in // 4, F.silu)

    def forward(self, x: Tensor) -> Tensor:
        out = F.silu(self.bn1(self.conv1(x))) if self.expands else x
        out = self.se(F.silu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        return out + x if self.skips else out  # type: ignore[no-any-return]


def _inverted(
    kind: type[Inverted], rows: tuple[tuple[int, int, int, int, int], ...]
) -> nn.Sequential:
    blocks, width_in = [], 32
    for expansion, width, count, kernel, stride in rows:
        for number in range(count):
            blocks.append(kind(width_in, width, expansion, kernel, 1 if number else stride))
            width_in = width
    return nn.Sequential(*blocks)


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    stem = nn.Conv2d(channels, 32, 3, 1, 1, bias=False)
    if name in _NAMES:
        widths = (32, *(width for width, _ in _SEPARABLE))
        bias = name.endswith("-weiaicunzai")
        blocks = [
            Separable(width_in, width, stride, bias)
            for width_in, (width, stride) in zip(widths, _SEPARABLE, strict=False)
        ]
        return Trunk(stem, {"layers": nn.Sequential(*blocks)}, 1024, num_classes)
    if name == "mobilenetv2-kuangliu":
        body = {"layers": _inverted(MobileBlock, _MOBILENET_V2)}
        return Trunk(stem, body, 320, num_classes, last=1280)
    if name == "mobilenetv2-weiaicunzai":
        stem = nn.Conv2d(channels, 32, 1, padding=1)
        body = {"layers": _inverted(BiasedBlock, _WEIAICUNZAI_V2)}
        return Trunk(stem, body, 320, num_classes, last=1280, bias=True, activation=F.relu6)
    if name == "efficientnetb0-kuangliu":
        body = {"layers": _inverted(EfficientBlock, _EFFICIENTNET)}
        return Trunk(stem, body, 320, num_classes, activation=F.silu)
    return None


_BEFORE = {"stem": -1, "conv1": 1, "conv2": 3, "conv3": 5, "conv4": 11}
"""How many of MobileNet's blocks stand before the first one of weiaicunzai's stages."""


_PARTS = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}
"""Where weiaicunzai's ``residual`` has the layers of a block of MobileNetV2."""

_BEFORE_V2 = {"1": 0, "2": 1, "3": 3, "4": 6, "5": 10, "6": 13, "7": 16}
"""How many blocks of MobileNetV2 stand before each of its stages."""


def _from_v2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """kuangliu's keys from those of weiaicunzai's MobileNetV2. Its head becomes a linear layer."""
    outer = {"pre.0": "conv1", "pre.1": "bn1", "conv1.0": "conv2", "conv1.1": "bn2"}
    renamed = {}
    for key, value in state.items():
        layer, _, last = key.rpartition(".")
        if match := re.fullmatch(r"stage(\d)\.(?:(\d)\.)?residual\.(\d)", layer):
            place = _BEFORE_V2.get(match[1], 0) + int(match[2] or 0)
            layer = f"layers.{place}.{_PARTS.get(match[3], match[3])}"
        if layer == "conv2":
            layer, value = "linear", value.flatten(1) if last == "weight" else value
        renamed[f"{outer.get(layer, layer)}.{last}"] = value
    return renamed


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """kuangliu's keys, also from weiaicunzai's ``conv1.0.depthwise.0`` and ``stage1.residual.0``,
    whose head becomes a linear layer."""
    if "stage1.residual.0.weight" in state:
        return _from_v2(state)
    state = with_linear(state)
    if "stem.0.conv.weight" not in state:
        return state
    renamed = {}
    for key, value in state.items():
        key = key.replace("stem.0.conv.", "conv1.").replace("stem.0.bn.", "bn1.")
        if match := re.match(r"(\w+)\.(\d)\.(depth|point)wise\.([01])\.", key):
            place = _BEFORE.get(match[1], 0) + int(match[2])
            layer = ("conv", "bn")[int(match[4])] + ("1" if match[3] == "depth" else "2")
            key = f"layers.{place}.{layer}.{key[match.end() :]}"
        renamed[key] = value
    return renamed


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family."""
    state = rename(state)
    if "layers.0.conv2.weight" not in state:
        return None
    if "layers.0.se.se1.weight" in state:
        return named("efficientnetb0-kuangliu", state)
    if "layers.0.conv3.weight" in state:
        owner = "weiaicunzai" if "layers.0.conv3.bias" in state else "kuangliu"
        return named(f"mobilenetv2-{owner}", state)
    return named(_NAMES["layers.0.conv2.bias" in state], state)
