"""ResNets with stochastic depth (Huang et al. 2016) for 32x32 pixels, as of
weiaicunzai/pytorch-cifar100: ``stochasticdepth18-weiaicunzai``, 34, 50, 101 and 152. After
training, a block's residual is multiplied by its probability of survival; no ReLU follows the sum.
Keys and widths: models/stochasticdepth.py there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from oodcli.networks.architectures.family import named
from oodcli.networks.architectures.trunk import RESNET_DEPTHS, depths, projection

_NAME = re.compile(r"stochasticdepth(18|34|50|101|152)-weiaicunzai")
_STAGES = ("conv2_x", "conv3_x", "conv4_x", "conv5_x")


class Block(nn.Module):
    """Two 3x3 convolutions with biases, or a bottleneck without, times ``survival``, beside the
    input or its projection."""

    def __init__(
        self, width_in: int, width: int, stride: int, bottleneck: bool, survival: float
    ) -> None:
        super().__init__()
        self.survival = survival
        out = 4 * width if bottleneck else width
        rows = [(width_in, width, 3, stride), (width, out, 3, 1)]
        if bottleneck:
            rows = [(width_in, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        layers: list[nn.Module] = []
        for before, after, side, step in rows:
            conv = nn.Conv2d(before, after, side, step, side // 2, bias=not bottleneck)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        self.residual = nn.Sequential(*layers[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != out:
            self.shortcut = projection(width_in, out, stride, bias=not bottleneck)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) * self.survival + self.shortcut(x)  # type: ignore[no-any-return]


class StochasticDepth(nn.Module):
    """(N, channels, H, W) → (N, num_classes)."""

    def __init__(self, layers: int, num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(channels, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU())
        width_in, bottleneck, number = 64, layers > 34, 0
        last = sum(RESNET_DEPTHS[layers]) - 1
        for place, (name, count) in enumerate(zip(_STAGES, RESNET_DEPTHS[layers], strict=True)):
            width, blocks = 64 << place, nn.Sequential()
            for block in range(count):
                stride = 2 if place and block == 0 else 1
                survival = 1 - 0.5 * number / last
                blocks.append(Block(width_in, width, stride, bottleneck, survival))
                width_in, number = width * (4 if bottleneck else 1), number + 1
            self.add_module(name, blocks)
        self.fc = nn.Linear(width_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for name in _STAGES:
            x = self.get_submodule(name)(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    match = _NAME.fullmatch(name)
    return StochasticDepth(int(match[1]), num_classes, channels) if match else None


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of a Family. There is one layout."""
    return dict(state)


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family: by the number of blocks."""
    if "conv2_x.0.residual.0.weight" not in state:
        return None
    bottleneck = "conv2_x.0.residual.6.weight" in state
    for layers, expected in RESNET_DEPTHS.items():
        if depths(state, _STAGES) == expected and bottleneck == (layers > 34):
            name = f"stochasticdepth{layers}-weiaicunzai"
            return named(name, state, "conv1.0.weight", "fc.weight")
    return None
