"""SE-ResNets for 32x32 pixels (Hu et al. 2018), as of weiaicunzai/pytorch-cifar100:
``seresnet18-weiaicunzai``, 34, 50, 101 and 152. Convolutions have biases, and a ReLU stands before
the squeeze. Keys and widths: models/senet.py there."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named
from oodcli.networks.architectures.trunk import RESNET_DEPTHS, depths, projection, with_linear

_STAGES = ("stage1", "stage2", "stage3", "stage4")
_NAME = re.compile(r"seresnet(18|34|50|101|152)-weiaicunzai")


def _layers(*rows: tuple[int, int, int, int]) -> nn.Sequential:
    """Convolutions with BatchNorm and ReLU. rows: channels in and out, kernel, stride."""
    found: list[nn.Module] = []
    for before, width, kernel, stride in rows:
        conv = nn.Conv2d(before, width, kernel, stride, kernel // 2)
        found += [conv, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*found)


class SEBlock(nn.Module):
    """Two 3x3 convolutions or a bottleneck, each channel times a number in (0, 1)."""

    def __init__(self, width_in: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width
        if bottleneck:
            rows = [(width_in, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        else:
            rows = [(width_in, width, 3, stride), (width, width, 3, 1)]
        self.residual = _layers(*rows)
        project = stride != 1 or width_in != out
        self.shortcut = projection(width_in, out, stride, bias=True) if project else nn.Identity()
        self.excitation = nn.Sequential(
            nn.Linear(out, out // 16), nn.ReLU(), nn.Linear(out // 16, out), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.residual(x)
        weights = self.excitation(out.mean((2, 3)))[:, :, None, None]
        return F.relu(out * weights + self.shortcut(x))


class SEResNet(nn.Module):
    def __init__(self, layers: int, num_classes: int, channels: int) -> None:
        super().__init__()
        self.pre = _layers((channels, 64, 3, 1))
        width_in, bottleneck = 64, layers > 34
        for place, (name, count) in enumerate(zip(_STAGES, RESNET_DEPTHS[layers], strict=True)):
            blocks = []
            for number in range(count):
                stride = 2 if place and number == 0 else 1
                blocks.append(SEBlock(width_in, 64 << place, stride, bottleneck))
                width_in = (64 << place) * (4 if bottleneck else 1)
            self.add_module(name, nn.Sequential(*blocks))
        self.linear = nn.Linear(width_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        for name in _STAGES:
            x = self.get_submodule(name)(x)
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    match = _NAME.fullmatch(name)
    return SEResNet(int(match[1]), num_classes, channels) if match else None


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of a Family. There is one layout, but for the name of the head."""
    return with_linear(state)


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family."""
    state = rename(state)
    if "stage1.0.excitation.0.weight" not in state:
        return None
    bottleneck = "stage1.0.residual.6.weight" in state
    found = depths(state, _STAGES)
    for layers, expected in RESNET_DEPTHS.items():
        if found == expected and bottleneck == (layers > 34):
            return named(f"seresnet{layers}-weiaicunzai", state, first="pre.0.weight")
    return None
