"""Wide ResNets for CIFAR (Zagoruyko and Komodakis 2016), depth 6n + 4, widening factor k.

Three forward passes are widespread, and their key layouts tell them apart. ``wrn-28-10`` is the one
with ``block1.layer.0.bn1`` and ``convShortcut``: no biases, the first convolution of a block has
the stride, and a projection sees the activated input. ``wrn-28-10-meliketoy`` is the one with
``layer1.0.bn1`` and ``shortcut.0``: convolutions with biases, the second has the stride, and the
projection sees the raw input. ``wrn-40-10-weiaicunzai`` is the one with ``conv2.0.residual.0`` (
models/wideresidual.py of weiaicunzai/pytorch-cifar100): the same, but the first has the stride.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named

_NAME = re.compile(r"wrn-(\d+)-(\d+)(?:-(meliketoy|weiaicunzai))?")


class WideBlock(nn.Module):
    """BatchNorm, ReLU and convolution, twice, beside the identity or a projection. owner: in whose
    repository, empty for the authors'."""

    def __init__(self, width_in: int, width: int, stride: int, owner: str) -> None:
        super().__init__()
        strides = (1, stride) if owner == "meliketoy" else (stride, 1)
        bias = self.raw = owner != ""
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, strides[0], 1, bias=bias)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, strides[1], 1, bias=bias)
        self.shortcut = (
            nn.Conv2d(width_in, width, 1, stride, bias=bias)
            if width_in != width or (self.raw and stride != 1)
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        if self.shortcut is None:
            return x + out
        return out + self.shortcut(x if self.raw else active)  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    def __init__(
        self, blocks: int, widen: int, owner: str, num_classes: int, channels: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=owner != "")

        def stage(width_in: int, width: int, stride: int) -> nn.Sequential:
            first = WideBlock(width_in, width, stride, owner)
            rest = [WideBlock(width, width, 1, owner) for _ in range(blocks - 1)]
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
    return WideResNet(blocks, int(match[2]), match[3] or "", num_classes, channels)


_WEIAICUNZAI = (
    (r"^init_conv\.", "conv1."),
    (r"^bn\.", "bn1."),
    (r"^conv([234])\.(?=\d)", lambda match: f"block{int(match[1]) - 1}."),
    (r"\.residual\.0\.", ".bn1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".bn2."),
    (r"\.residual\.6\.", ".conv2."),
)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This family's own keys, from each layout."""
    rules = (
        (r"^(fc|classifier)\.", "linear."),
        (r"^(?:block|layer)(\d)\.(?:layer\.)?", r"block\1."),
        (r"\.(?:convShortcut|shortcut\.0)\.", ".shortcut."),
    )
    weiaicunzai = "init_conv.weight" in state
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in (*_WEIAICUNZAI, *rules) if weiaicunzai else rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family."""
    weiaicunzai = "init_conv.weight" in state
    state = rename(state)
    if "block3.0.conv2.weight" not in state or "trans1.conv1.weight" in state:
        return None
    blocks = len({key.split(".")[1] for key in state if key.startswith("block1.")})
    if state["block3.0.conv2.weight"].ndim != 4:
        return None
    widen = state["block3.0.conv2.weight"].shape[0] // 64
    owner = "-weiaicunzai" if weiaicunzai else "-meliketoy" if "conv1.bias" in state else ""
    return named(f"wrn-{6 * blocks + 4}-{widen}{owner}", state)
