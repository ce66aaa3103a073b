"""RepVGG for 32x32 pixels (Ding et al. 2021), as of chenyaofo/pytorch-cifar-models:
``repvgg_a0-chenyaofo``, a1 and a2, with its branches; ``repvgg_a0-chenyaofo+deployed`` has one
convolution in the place of each block's, as ``convert_to_inference_model`` makes it.

The ImageNet network has the same keys and shapes and other strides, so a checkpoint of 1000 classes
is not recognised. Keys and widths: pytorch_cifar_models/repvgg.py there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named
from oodcli.networks.architectures.trunk import with_linear

_WIDTHS = {
    "repvgg_a0-chenyaofo": (48, 48, 96, 192, 1280),
    "repvgg_a1-chenyaofo": (64, 64, 128, 256, 1280),
    "repvgg_a2-chenyaofo": (64, 96, 192, 384, 1408),
}
_DEPLOYED = "+deployed"
_COUNTS = (1, 2, 4, 14, 1)
"""Blocks of the five stages; the last three stages halve the sides."""


class RepBlock(nn.Module):
    """A 3x3 and a 1x1 convolution and, where the shapes allow it, the identity, each with
    BatchNorm, added."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        same = width_in == width and stride == 1
        self.rbr_identity = nn.BatchNorm2d(width) if same else None
        self.rbr_dense = self._branch(width_in, width, 3, stride)
        self.rbr_1x1 = self._branch(width_in, width, 1, stride)

    @staticmethod
    def _branch(width_in: int, width: int, kernel: int, stride: int) -> nn.Sequential:
        branch = nn.Sequential()
        conv = nn.Conv2d(width_in, width, kernel, stride, kernel // 2, bias=False)
        branch.add_module("conv", conv)
        branch.add_module("bn", nn.BatchNorm2d(width))
        return branch

    def forward(self, x: Tensor) -> Tensor:
        out = self.rbr_dense(x) + self.rbr_1x1(x)
        return F.relu(out if self.rbr_identity is None else out + self.rbr_identity(x))


class Deployed(nn.Module):
    """The sum of a block's branches as one convolution."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.rbr_reparam = nn.Conv2d(width_in, width, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.rbr_reparam(x))


class RepVGG(nn.Module):
    def __init__(
        self,
        block: type[RepBlock | Deployed],
        widths: tuple[int, ...],
        num_classes: int,
        channels: int,
    ) -> None:
        super().__init__()
        self.stage0 = block(channels, widths[0], 1)
        for place in range(1, 5):
            stride = 1 if place == 1 else 2
            first = block(widths[place - 1], widths[place], stride)
            rest = [block(widths[place], widths[place], 1) for _ in range(_COUNTS[place] - 1)]
            self.add_module(f"stage{place}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for place in range(5):
            x = self.get_submodule(f"stage{place}")(x)
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    base = name.removesuffix(_DEPLOYED)
    if base not in _WIDTHS:
        return None
    return RepVGG(RepBlock if name == base else Deployed, _WIDTHS[base], num_classes, channels)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of a Family. There is one layout, but for the name of the head."""
    return with_linear(state)


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family: by the width of the stages."""
    state = rename(state)
    for ending, layer in (("", "rbr_dense.conv.weight"), (_DEPLOYED, "rbr_reparam.weight")):
        last = state.get(f"stage3.0.{layer}")
        for name, widths in _WIDTHS.items():
            if last is not None and last.shape[:1] == (widths[3],):
                found = named(name + ending, state, first=f"stage0.{layer}")
                return None if found is not None and found[1] == 1000 else found
    return None
