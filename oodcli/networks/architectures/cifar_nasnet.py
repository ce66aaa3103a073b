"""NASNet-A (Zoph et al. 2018) for 32x32 pixels, as of weiaicunzai/pytorch-cifar100:
``nasnet-weiaicunzai``. Each cell has the weights of both ways to fit the output before the last to
its own, and uses one or none. Keys and widths: models/nasnet.py there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named

_WIDTH = 44
"""Channels of the stem, and of each branch of the first stage."""
_CELLS = 4
"""Normal cells in each of the three stages."""


class Separable(nn.Module):
    """A depthwise and a 1x1 convolution."""

    def __init__(self, width: int, kernel: int, stride: int, bias: bool) -> None:
        super().__init__()
        padding = kernel // 2
        self.depthwise = nn.Conv2d(width, width, kernel, stride, padding, groups=width, bias=bias)
        self.pointwise = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))  # type: ignore[no-any-return]


class Branch(nn.Module):
    """ReLU, separable convolution and BatchNorm, twice. bias: of the first depthwise one."""

    def __init__(self, width: int, kernel: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        first, second = (Separable(width, kernel, *each) for each in ((stride, bias), (1, True)))
        self.block1 = nn.Sequential(nn.ReLU(), first, nn.BatchNorm2d(width))
        self.block2 = nn.Sequential(nn.ReLU(), second, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.block1(x))  # type: ignore[no-any-return]


def _reduced(width_in: int, width: int, bias: bool = True) -> nn.Sequential:
    convolution = nn.Conv2d(width_in, width, 1, bias=bias)
    return nn.Sequential(nn.ReLU(), convolution, nn.BatchNorm2d(width))


class Fit(nn.Module):
    """The output before the last, with the sides of the last and ``width`` channels."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        half = width // 2
        skipped = (nn.Identity() for _ in range(3))  # pads and pools in the repository
        self.p1 = nn.Sequential(nn.Identity(), nn.Conv2d(width_in, half, 1))
        self.p2 = nn.Sequential(*skipped, nn.Conv2d(width_in, half, 1))
        self.bn = nn.BatchNorm2d(width)
        self.dim_reduce = _reduced(width_in, width)
        self.width = width

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        if x.shape[2] != before.shape[2]:  # every second pixel, from the first and the second on
            active = F.relu(before)
            first, second = active[..., ::2, ::2], F.pad(active, (-1, 1, -1, 1))[..., ::2, ::2]
            before = self.bn(torch.cat([self.p1(first), self.p2(second)], 1))
        elif before.shape[1] != self.width:
            before = self.dim_reduce(before)
        return before


class NormalCell(nn.Module):
    """(N, width_in, H, W) → (N, 6 · width, H, W)."""

    def __init__(self, width_in: int, before: int, width: int) -> None:
        super().__init__()
        self.dem_reduce = _reduced(width_in, width, bias=False)
        self.block1_left = Branch(width, 3, bias=False)
        self.block2_left = Branch(width, 3, bias=False)
        self.block2_right = Branch(width, 5, bias=False)
        self.block5_left = Branch(width, 5, bias=False)
        self.block5_right = Branch(width, 3, bias=False)
        self.fit = Fit(before, width)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        before, h = self.fit(x, before), self.dem_reduce(x)
        found = (
            before,
            self.block1_left(h) + h,
            self.block2_left(before) + self.block2_right(h),
            F.avg_pool2d(h, 3, 1, 1) + h,
            2 * F.avg_pool2d(before, 3, 1, 1),
            self.block5_left(before) + self.block5_right(before),
        )
        return torch.cat(found, 1)


class ReductionCell(nn.Module):
    """(N, width_in, H, W) → (N, 4 · width, H/2, W/2)."""

    def __init__(self, width_in: int, before: int, width: int) -> None:
        super().__init__()
        self.dim_reduce = _reduced(width_in, width)
        self.layer1block1_left = Branch(width, 7, 2)
        self.layer1block1_right = Branch(width, 5, 2)
        self.layer1block2_right = Branch(width, 7, 2)
        self.layer1block3_right = Branch(width, 5, 2)
        self.layer2block1_right = Branch(width, 3)
        self.fit = Fit(before, width)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        before, h = self.fit(x, before), self.dim_reduce(x)
        highest = F.max_pool2d(h, 3, 2, 1)
        first = self.layer1block1_left(before) + self.layer1block1_right(h)
        second = highest + self.layer1block2_right(before)
        third = F.avg_pool2d(h, 3, 2, 1) + self.layer1block3_right(before)
        fourth = highest + self.layer2block1_right(first)
        return torch.cat([second, third, fourth, F.avg_pool2d(first, 3, 1, 1) + second], 1)


class NASNet(nn.Module):
    """(N, channels, H, W) → (N, num_classes)."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        convolution = nn.Conv2d(channels, _WIDTH, 3, 1, 1, bias=False)
        self.stem = nn.Sequential(convolution, nn.BatchNorm2d(_WIDTH))
        self.cell_layers = nn.ModuleList()
        before = last = _WIDTH
        for stage in range(3):
            width = _WIDTH << stage
            if stage:
                self.cell_layers.append(ReductionCell(last, before, width))
                before, last = last, 4 * width
            for _ in range(_CELLS):
                self.cell_layers.append(NormalCell(last, before, width))
                before, last = last, 6 * width
        self.fc = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        before = x = self.stem(x)
        for cell in self.cell_layers:
            before, x = x, cell(x, before)
        return self.fc(F.relu(x).mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    return NASNet(num_classes, channels) if name == "nasnet-weiaicunzai" else None


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of a Family. There is one layout."""
    return dict(state)


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family: by the name of a cell's layer."""
    if "cell_layers.0.dem_reduce.1.weight" not in state:
        return None
    return named("nasnet-weiaicunzai", state, "stem.0.weight", "fc.weight")
