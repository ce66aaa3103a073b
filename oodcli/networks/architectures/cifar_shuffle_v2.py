"""ShuffleNetV2 (Ma et al. 2018) for 32x32 pixels, as of weiaicunzai/pytorch-cifar100, whose
convolutions have biases: ``shufflenetv2_x1_0-weiaicunzai``, also x0_5, x1_5 and x2_0. Keys and
widths: models/shufflenetv2.py there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from oodcli.networks.architectures.cifar_shuffle import shuffle
from oodcli.networks.architectures.family import named

_WIDTHS = {
    "x0_5": (48, 96, 192, 1024),
    "x1_0": (116, 232, 464, 1024),
    "x1_5": (176, 352, 704, 1024),
    "x2_0": (244, 488, 976, 2048),
}
_COUNTS = (4, 8, 4)
"""Units of the three stages."""

_NAME = "shufflenetv2_%s-weiaicunzai"


def _depthwise(width: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(width, width, 3, stride, 1, groups=width), nn.BatchNorm2d(width)]


def _pointwise(width_in: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(width_in, width, 1), nn.BatchNorm2d(width), nn.ReLU()]


class Unit(nn.Module):
    """Two branches side by side, shuffled. With stride 1 the first is half of the input, and the
    second computes on the other half."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.halved = stride == 1
        inner = width_in // 2 if self.halved else width_in
        self.residual = nn.Sequential(
            *_pointwise(inner, inner), *_depthwise(inner, stride), *_pointwise(inner, width // 2)
        )
        self.shortcut = nn.Sequential()
        if not self.halved:
            self.shortcut.extend([*_depthwise(inner, stride), *_pointwise(inner, width // 2)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1) if self.halved else (x, x)
        return shuffle(torch.cat([self.shortcut(first), self.residual(second)], 1), 2)


class ShuffleNetV2(nn.Module):
    """(N, channels, H, W) → (N, num_classes)."""

    def __init__(self, widths: tuple[int, ...], num_classes: int, channels: int) -> None:
        super().__init__()
        self.pre = nn.Sequential(nn.Conv2d(channels, 24, 3, 1, 1), nn.BatchNorm2d(24))
        width_in = 24
        for stage, (count, width) in enumerate(zip(_COUNTS, widths, strict=False), 2):
            units = [Unit(width_in, width, 2), *(Unit(width, width, 1) for _ in range(count - 1))]
            self.add_module(f"stage{stage}", nn.Sequential(*units))
            width_in = width
        self.conv5 = nn.Sequential(*_pointwise(width_in, widths[3]))
        self.fc = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        for stage in (2, 3, 4):
            x = self.get_submodule(f"stage{stage}")(x)
        return self.fc(self.conv5(x).mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    widths = {_NAME % size: each for size, each in _WIDTHS.items()}.get(name)
    return None if widths is None else ShuffleNetV2(widths, num_classes, channels)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of a Family. There is one layout."""
    return dict(state)


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family: by the width of the last stage."""
    last = state.get("conv5.0.weight")
    for size, widths in _WIDTHS.items():
        if last is not None and tuple(last.shape[:2]) == (widths[3], widths[2]):
            return named(_NAME % size, state, "pre.0.weight", "fc.weight")
    return None
