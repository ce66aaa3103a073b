"""Residual Attention Networks (Wang et al. 2017) for 32x32 pixels, as of
weiaicunzai/pytorch-cifar100: ``attention56-weiaicunzai`` and ``attention92-weiaicunzai``.

That code leaves the paper: every pooling of a mask sees the module's input, so a mask has one
resolution, and some shortcuts have weights that are not used. Keys and widths: models/attention.py
there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named
from oodcli.networks.architectures.trunk import depths

_MODULES = {"attention56-weiaicunzai": (1, 1, 1), "attention92-weiaicunzai": (1, 2, 3)}
"""Attention modules in the first three stages."""

_STAGES = ("stage1", "stage2", "stage3", "stage4")


class Unit(nn.Module):
    """BatchNorm, ReLU and convolution, three times, beside a projection of the raw input."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        inner = width // 4
        self.residual_function = nn.Sequential(
            *(nn.BatchNorm2d(width_in), nn.ReLU(), nn.Conv2d(width_in, inner, 1, stride)),
            *(nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, inner, 3, 1, 1)),
            *(nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, width, 1)),
        )
        self.shortcut = nn.Conv2d(width_in, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_function(x) + self.shortcut(x)  # type: ignore[no-any-return]


def _units(width: int, count: int = 1) -> nn.Sequential:
    return nn.Sequential(*(Unit(width, width) for _ in range(count)))


class Attention(nn.Module):
    """A trunk of two units, times 1 + a mask in (0, 1). depth: units on the mask's way down, which
    are as many on its way up."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.pre = _units(width)
        self.trunk = _units(width, 2)
        for number in range(1, depth + 1):
            self.add_module(f"soft_resdown{number}", _units(width))
            self.add_module(f"soft_resup{number}", _units(width))
        for name in ("shortcut_short", "shortcut_long") if depth == 4 else ("shortcut",):
            self.add_module(name, Unit(width, width))
        self.sigmoid = nn.Sequential(
            *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1)),
            *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1)),
            nn.Sigmoid(),
        )
        self.last = _units(width)

    def mask(self, x: Tensor) -> Tensor:
        """At half of the input's sides, before it is activated."""
        pooled = F.max_pool2d(x, 3, 2, 1)

        def through(x: Tensor, *parts: str) -> Tensor:
            for part in parts:
                x = self.get_submodule(part)(x)
            return x

        down, up = "soft_resdown{}".format, "soft_resup{}".format
        out = through(pooled, down(self.depth - 1), down(self.depth), up(1), up(2))
        if self.depth == 4:
            out = through(out + through(pooled, down(2), down(3)), up(3))
        if self.depth > 2:
            beside = "shortcut_long" if self.depth == 4 else "shortcut"
            out = through(out + through(pooled, down(1), beside), up(self.depth))
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        mask = self.sigmoid(F.interpolate(self.mask(x), size=x.shape[2:]))
        return self.last((1 + mask) * self.trunk(x))  # type: ignore[no-any-return]


class ResidualAttention(nn.Module):
    """(N, channels, H, W) → (N, num_classes)."""

    def __init__(self, counts: tuple[int, ...], num_classes: int, channels: int) -> None:
        super().__init__()
        stem = nn.Conv2d(channels, 64, 3, 1, 1)
        self.pre_conv = nn.Sequential(stem, nn.BatchNorm2d(64), nn.ReLU())
        width_in = 64
        for place, (stage, count) in enumerate(zip(_STAGES, counts, strict=False)):
            width = 256 << place
            modules = (Attention(width, 4 - place) for _ in range(count))
            self.add_module(stage, nn.Sequential(Unit(width_in, width, 2), *modules))
            width_in = width
        self.stage4 = nn.Sequential(Unit(width_in, 2048, 2), Unit(2048, 2048), Unit(2048, 2048))
        self.linear = nn.Linear(2048, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_conv(x)
        for stage in _STAGES:
            x = self.get_submodule(stage)(x)
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    counts = _MODULES.get(name)
    return None if counts is None else ResidualAttention(counts, num_classes, channels)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of a Family. There is one layout."""
    return dict(state)


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family: by the number of attention modules."""
    if "stage1.1.soft_resdown1.0.shortcut.weight" not in state:
        return None
    for name, counts in _MODULES.items():
        if depths(state, _STAGES[:3]) == tuple(count + 1 for count in counts):
            return named(name, state, first="pre_conv.0.weight")
    return None
