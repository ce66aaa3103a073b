"""SqueezeNet (Iandola et al. 2016) with BatchNorm and shortcuts for 32x32 pixels, as of
weiaicunzai/pytorch-cifar100: ``squeezenet-weiaicunzai``. Keys and widths: models/squeezenet.py
there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_WIDTHS = (128, 128, 256, 256, 384, 384, 512, 512)
"""Of the modules ``fire2`` to ``fire9``; an eighth of each is squeezed."""

_ADDED = (3, 5, 7)
"""Modules to whose output their input is added."""

_POOLED = (4, 8)
"""Modules after which the resolution is halved."""


def _layer(width_in: int, width: int, side: int) -> nn.Sequential:
    convolution = nn.Conv2d(width_in, width, side, 1, side // 2)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


class Fire(nn.Module):
    """(N, width_in, H, W) → (N, width, H, W): a 1x1 convolution, then 1x1 and 3x3 side by side.
    added: whether the input is added."""

    def __init__(self, width_in: int, width: int, added: bool) -> None:
        super().__init__()
        self.squeeze = _layer(width_in, width // 8, 1)
        self.expand_1x1 = _layer(width // 8, width // 2, 1)
        self.expand_3x3 = _layer(width // 8, width // 2, 3)
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        small = self.squeeze(x)
        out = torch.cat([self.expand_1x1(small), self.expand_3x3(small)], 1)
        return out + x if self.added else out


class SqueezeNet(nn.Module):
    """(N, channels, H, W) → (N, num_classes). The last convolution is the head."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_layer(channels, 96, 3), nn.MaxPool2d(2))
        width_in = 96
        for number, width in enumerate(_WIDTHS, 2):
            self.add_module(f"fire{number}", Fire(width_in, width, number in _ADDED))
            width_in = width
        self.conv10 = nn.Conv2d(width_in, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number in range(2, 10):
            x = self.get_submodule(f"fire{number}")(x)
            if number in _POOLED:
                x = nn.functional.max_pool2d(x, 2)
        return self.conv10(x).mean((2, 3))  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    return SqueezeNet(num_classes, channels) if name == "squeezenet-weiaicunzai" else None


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of a Family. There is one layout."""
    return dict(state)


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family: by the names of the first and the last layer."""
    stem, head = (state.get(key) for key in ("stem.0.weight", "conv10.weight"))
    if stem is None or head is None or (stem.ndim, head.ndim) != (4, 4):
        return None
    return "squeezenet-weiaicunzai" + "+grey" * (stem.shape[1] == 1), head.shape[0]
