"""Xception (Chollet 2017) for 32x32 pixels, as of weiaicunzai/pytorch-cifar100:
``xception-weiaicunzai``. Its ReLUs work in place, so in most blocks the shortcut sees the activated
input. Keys and widths: models/xception.py there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named
from oodcli.networks.architectures.trunk import projection

_WIDTH = 728
_BLOCKS = 8
"""Of the middle flow."""


class Separable(nn.Module):
    """A depthwise 3x3 and a 1x1 convolution."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width_in, width_in, 3, 1, 1, groups=width_in, bias=False)
        self.pointwise = nn.Conv2d(width_in, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))  # type: ignore[no-any-return]


def _conv(width_in: int, width: int) -> nn.Sequential:
    convolution = nn.Conv2d(width_in, width, 3, 1, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def _residual(before: int, middle: int, after: int, stride: int, first: bool) -> nn.Sequential:
    """Two separable convolutions and a max-pool. first: whether no ReLU stands before them."""
    return nn.Sequential(
        *([] if first else [nn.ReLU()]),
        *(Separable(before, middle), nn.BatchNorm2d(middle), nn.ReLU()),
        *(Separable(middle, after), nn.BatchNorm2d(after), nn.MaxPool2d(3, stride, 1)),
    )


class EntryFlow(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, 32)
        self.conv2 = _conv(32, 64)
        for number, width_in, width in ((3, 64, 128), (4, 128, 256), (5, 256, _WIDTH)):
            stride = 2 if number < 5 else 1
            residual = _residual(width_in, width, width, stride, number == 3)
            self.add_module(f"conv{number}_residual", residual)
            shortcut = projection(width_in, width, stride, bias=True)
            self.add_module(f"conv{number}_shortcut", shortcut)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        for number in (3, 4, 5):
            x = x if number == 3 else F.relu(x)
            shortcut = self.get_submodule(f"conv{number}_shortcut")(x)
            x = self.get_submodule(f"conv{number}_residual")(x) + shortcut
        return x


class MiddleBlock(nn.Module):
    """Three separable convolutions beside the activated input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (
            nn.Sequential(nn.ReLU(), Separable(_WIDTH, _WIDTH), nn.BatchNorm2d(_WIDTH))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return x + self.conv3(self.conv2(self.conv1(x)))  # type: ignore[no-any-return]


class ExitFlow(nn.Module):
    """One block, whose shortcut sees the raw input, and two separable convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.residual = _residual(_WIDTH, _WIDTH, 1024, 2, False)
        self.shortcut = projection(_WIDTH, 1024, 2, bias=True)
        self.conv = nn.Sequential(
            *(Separable(1024, 1536), nn.BatchNorm2d(1536), nn.ReLU()),
            *(Separable(1536, 2048), nn.BatchNorm2d(2048), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.residual(x) + self.shortcut(x))  # type: ignore[no-any-return]


class Xception(nn.Module):
    """(N, channels, H, W) → (N, num_classes)."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.entry_flow = EntryFlow(channels)
        self.middel_flow = nn.Sequential()
        blocks = nn.Sequential(*(MiddleBlock() for _ in range(_BLOCKS)))
        self.middel_flow.add_module("middel_block", blocks)
        self.exit_flow = ExitFlow()
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.exit_flow(self.middel_flow(self.entry_flow(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    return Xception(num_classes, channels) if name == "xception-weiaicunzai" else None


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of a Family. There is one layout."""
    return dict(state)


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family: by the names of the first and the last layer."""
    return named("xception-weiaicunzai", state, "entry_flow.conv1.0.weight", "fc.weight")
