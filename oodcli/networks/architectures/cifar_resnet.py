"""CIFAR ResNets of depth 6n + 2 (He et al. 2016, section 4.2), in the widespread key layout.

Names: ``resnet20-cifar`` (option A shortcuts: no weights), ``resnet20-cifar-b`` (option B: 1x1
convolution and BatchNorm), ``-w32`` where the first stage is not 16 wide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named

_NAME = re.compile(r"resnet(\d+)-cifar(-b)?(?:-w(\d+))?")


class PaddedShortcut(nn.Module):
    """Option A: every second pixel, and zeros for the new channels, half of them on either side."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        before = self.added // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.added - before))


class BasicBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int, option_b: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 and option_b:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )
        elif stride != 1:
            self.shortcut = PaddedShortcut(width - width_in)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of ``blocks`` blocks, ``width``, 2·``width`` and 4·``width`` wide."""

    def __init__(
        self, blocks: int, width: int, option_b: bool, num_classes: int, channels: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)

        def stage(width_in: int, width_out: int, stride: int) -> nn.Sequential:
            first = BasicBlock(width_in, width_out, stride, option_b)
            rest = [BasicBlock(width_out, width_out, 1, option_b) for _ in range(blocks - 1)]
            return nn.Sequential(first, *rest)

        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))  # (N, 4·width, H/4, W/4)
        return self.linear(out.mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """The network of that name; None where the name is not of this family."""
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) % 6 != 2 or int(match[1]) < 8:
        return None
    width = 16 if match[3] is None else int(match[3])
    return CifarResNet((int(match[1]) - 2) // 6, width, match[2] is not None, num_classes, channels)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This family's own keys: ``fc`` and ``classifier`` → ``linear``, ``downsample`` →
    ``shortcut``."""
    return {
        re.sub(r"^(fc|classifier)\.", "linear.", key).replace(".downsample.", ".shortcut."): value
        for key, value in state.items()
    }


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family."""
    state = rename(state)
    if "conv1.weight" not in state or "layer3.0.conv2.weight" not in state:
        return None
    blocks = len({key.split(".")[1] for key in state if key.startswith("layer1.")})
    if state["conv1.weight"].ndim != 4:
        return None
    width = state["conv1.weight"].shape[0]
    option_b = any(key.startswith("layer2.0.shortcut.") for key in state)
    name = f"resnet{6 * blocks + 2}-cifar" + "-b" * option_b
    return named(name if width == 16 else f"{name}-w{width}", state)
