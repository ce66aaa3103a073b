"""What the families of CIFAR networks with the keys ``conv1``, ``bn1`` … ``linear`` share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

RESNET_DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Layers of a ResNet → blocks of its four stages (He et al. 2016, table 1)."""


class Trunk(nn.Module):
    """A convolution, stages under their names, and a linear layer over the mean of the last map.

    stages: in the order of the forward pass. width: channels after them. norm: whether BatchNorm
    and the activation follow the first convolution. last: channels of a 1x1 convolution, BatchNorm
    and the activation before the mean, if there are any. bias: whether that convolution has one.
    """

    def __init__(
        self,
        stem: nn.Conv2d,
        stages: Mapping[str, nn.Module],
        width: int,
        num_classes: int,
        *,
        norm: bool = True,
        last: int | None = None,
        bias: bool = False,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        self.conv1 = stem
        self.bn1 = nn.BatchNorm2d(stem.out_channels) if norm else None
        self.names = tuple(stages)
        for name, stage in stages.items():
            self.add_module(name, stage)
        self.conv2 = nn.Conv2d(width, last, 1, bias=bias) if last else None
        self.bn2 = nn.BatchNorm2d(last) if last else None
        self.linear = nn.Linear(last or width, num_classes)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.bn1 is not None:
            x = self.activation(self.bn1(x))
        for name in self.names:
            x = self.get_submodule(name)(x)
        if self.conv2 is not None and self.bn2 is not None:
            x = self.activation(self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


class SqueezeExcitation(nn.Module):
    """Each channel times a number in (0, 1) that two 1x1 convolutions compute from the means."""

    def __init__(
        self, width: int, squeezed: int, activation: Callable[[Tensor], Tensor] = F.relu
    ) -> None:
        super().__init__()
        self.se1 = nn.Conv2d(width, squeezed, 1)
        self.se2 = nn.Conv2d(squeezed, width, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        weights = self.se2(self.activation(self.se1(x.mean((2, 3), keepdim=True))))
        return x * weights.sigmoid()  # type: ignore[no-any-return]


def projection(width_in: int, width: int, stride: int, bias: bool = False) -> nn.Sequential:
    """A 1x1 convolution and BatchNorm beside a block."""
    return nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=bias), nn.BatchNorm2d(width))


def depths(state: Mapping[str, Tensor], stages: Sequence[str]) -> tuple[int, ...]:
    """How many blocks each stage of a state dict has; 0 where there is no stage of that name."""
    return tuple(
        len({key.split(".")[1] for key in state if key.startswith(f"{stage}.")}) for stage in stages
    )


def with_linear(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with its head called ``linear``, also where it is ``fc`` or ``classifier``."""
    return {
        re.sub(r"^(?:fc|classifier)\.(?=weight|bias)", "linear.", key): value
        for key, value in state.items()
    }


LAYERS = ("layer1", "layer2", "layer3", "layer4")
