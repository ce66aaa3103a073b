"""Wide ResNets for CIFAR (Zagoruyko and Komodakis 2016), depth 6n + 4, widening factor k.

Two forward passes are widespread, and their key layouts tell them apart. ``wrn-28-10`` is the one
with ``block1.layer.0.bn1`` and ``convShortcut``: no biases, the first convolution of a block has
the stride, and a projection sees the activated input. ``wrn-28-10-meliketoy`` is the one with
``layer1.0.bn1`` and ``shortcut.0``: convolutions with biases, the second has the stride, and the
projection sees the raw input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named

_NAME = re.compile(r"wrn-(\d+)-(\d+)(-meliketoy)?")


class WideBlock(nn.Module):
    """BatchNorm, ReLU and convolution, twice, beside the identity or a projection."""

    def __init__(self, width_in: int, width: int, stride: int, meliketoy: bool) -> None:
        super().__init__()
        strides = (1, stride) if meliketoy else (stride, 1)
        self.meliketoy = meliketoy
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, strides[0], 1, bias=meliketoy)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, strides[1], 1, bias=meliketoy)
        self.shortcut = (
            nn.Conv2d(width_in, width, 1, stride, bias=meliketoy)
            if width_in != width or (meliketoy and stride != 1)
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        if self.shortcut is None:
            return x + out
        return out + self.shortcut(x if self.meliketoy else active)  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    def __init__(
        self, blocks: int, widen: int, meliketoy: bool, num_classes: int, channels: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=meliketoy)

        def stage(width_in: int, width: int, stride: int) -> nn.Sequential:
            first = WideBlock(width_in, width, stride, meliketoy)
            rest = [WideBlock(width, width, 1, meliketoy) for _ in range(blocks - 1)]
            return nn.Sequential(first, *rest)

        self.block1 = stage(16, 16 * widen, 1)
        self.block2 = stage(16 * widen, 32 * widen, 2)
        self.block3 = stage(32 * widen, 64 * widen, 2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.linear = nn.Linear(64 * widen, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = F.relu(self.bn1(out))  # (N, 64k, H/4, W/4)
        return self.linear(out.mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """The network of that name; None where the name is not of this family."""
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) % 6 != 4 or int(match[1]) < 10 or int(match[2]) < 1:
        return None
    blocks = (int(match[1]) - 4) // 6
    return WideResNet(blocks, int(match[2]), match[3] is not None, num_classes, channels)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This family's own keys, from either layout."""
    rules = (
        (r"^(fc|classifier)\.", "linear."),
        (r"^(?:block|layer)(\d)\.(?:layer\.)?", r"block\1."),
        (r"\.(?:convShortcut|shortcut\.0)\.", ".shortcut."),
    )
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family."""
    state = rename(state)
    if "block3.0.conv2.weight" not in state or "trans1.conv1.weight" in state:
        return None
    blocks = len({key.split(".")[1] for key in state if key.startswith("block1.")})
    if state["block3.0.conv2.weight"].ndim != 4:
        return None
    widen = state["block3.0.conv2.weight"].shape[0] // 64
    name = f"wrn-{6 * blocks + 4}-{widen}" + "-meliketoy" * ("conv1.bias" in state)
    return named(name, state)
