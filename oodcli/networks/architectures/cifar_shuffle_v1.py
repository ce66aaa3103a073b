"""ShuffleNet (Zhang et al. 2018) for 32x32 pixels, as of weiaicunzai/pytorch-cifar100:
``shufflenet-weiaicunzai``. Convolutions have biases, and all 1x1 ones three groups. Keys and
widths: models/shufflenet.py there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.cifar_shuffle import shuffle
from oodcli.networks.architectures.family import named

_GROUPS = 3
_STAGES = {"stage2": (4, 240), "stage3": (8, 480), "stage4": (4, 960)}
"""Units and channels."""


def _norm(name: str, convolution: nn.Conv2d) -> nn.Sequential:
    """A convolution and BatchNorm, under the name that the repository has for them."""
    found = nn.Sequential()
    layers = nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels))
    found.add_module(name, layers)
    return found


def _pointwise(width_in: int, width: int) -> nn.Sequential:
    return _norm("pointwise", nn.Conv2d(width_in, width, 1, groups=_GROUPS))


class Unit(nn.Module):
    """Grouped 1x1, depthwise 3x3 and grouped 1x1 convolution: added to the input, or appended to
    the input's averages where the stride is 2."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        inner = width // 4
        self.stride = stride
        self.bottlneck = nn.Sequential(_pointwise(width_in, inner), nn.ReLU())
        self.depthwise = _norm("depthwise", nn.Conv2d(inner, inner, 3, stride, 1, groups=inner))
        self.expand = _pointwise(inner, width - width_in if stride == 2 else width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.expand(self.depthwise(shuffle(self.bottlneck(x), _GROUPS)))
        if self.stride == 1:
            return F.relu(x + out)
        return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), out], 1))


class ShuffleNet(nn.Module):
    """(N, channels, H, W) → (N, num_classes)."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        width_in = 24
        self.conv1 = nn.Sequential()
        self.conv1.add_module("conv", nn.Conv2d(channels, width_in, 3, 1, 1))
        self.conv1.add_module("bn", nn.BatchNorm2d(width_in))
        for stage, (count, width) in _STAGES.items():
            units = [Unit(width_in, width, 2), *(Unit(width, width, 1) for _ in range(count - 1))]
            self.add_module(stage, nn.Sequential(*units))
            width_in = width
        self.fc = nn.Linear(width_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        for stage in _STAGES:
            x = self.get_submodule(stage)(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    return ShuffleNet(num_classes, channels) if name == "shufflenet-weiaicunzai" else None


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of a Family. There is one layout."""
    return dict(state)


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family: by the name of a unit's layer."""
    if "stage2.0.bottlneck.0.pointwise.0.weight" not in state:
        return None
    return named("shufflenet-weiaicunzai", state, "conv1.conv.weight", "fc.weight")
