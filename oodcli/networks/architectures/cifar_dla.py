"""Deep layer aggregation for 32x32 pixels (Yu et al. 2018), as of kuangliu/pytorch-cifar:
``dla-kuangliu`` and ``simpledla-kuangliu``. Keys and widths: models/dla.py and models/dla_simple.py
there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named
from oodcli.networks.architectures.trunk import projection, with_linear

_TREES = {"layer3": (64, 1, 1), "layer4": (128, 2, 2), "layer5": (256, 2, 2), "layer6": (512, 1, 2)}
"""Channels, levels and stride."""

_NAMES = ("dla-kuangliu", "simpledla-kuangliu")


class Basic(nn.Module):
    """Two 3x3 convolutions beside the identity or a projection."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        project = stride != 1 or width_in != width
        self.shortcut = projection(width_in, width, stride) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class Root(nn.Module):
    """Several maps, (N, width, H, W) each → one."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(count * width, width, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return F.relu(self.bn(self.conv(torch.cat(maps, 1))))


class Tree(nn.Module):
    """Nodes one after another; the root sees the output of each of them, and of ``before``, which
    sees the input."""

    def __init__(
        self, nodes: Mapping[str, nn.Module], width: int, before: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.names = tuple(nodes)
        for name, node in nodes.items():
            self.add_module(name, node)
        self.prev_root = before
        self.root = Root(len(nodes) + (before is not None), width)

    def forward(self, x: Tensor) -> Tensor:
        maps = [] if self.prev_root is None else [self.prev_root(x)]
        for name in self.names:
            x = self.get_submodule(name)(x)
            maps.append(x)
        return self.root(maps)  # type: ignore[no-any-return]


def _tree(width_in: int, width: int, levels: int, stride: int, simple: bool) -> Tree:
    """A tree of one or two levels. simple: both nodes of the upper level are trees, where the
    paper's has one tree, two blocks, and another beside them."""
    names = ("left_tree", "right_tree") if simple else ("left_node", "right_node")
    if levels == 1:
        left: nn.Module = Basic(width_in, width, stride)
        return Tree(dict(zip(names, (left, Basic(width, width, 1)), strict=True)), width)
    first = _tree(width_in, width, 1, stride, simple)
    if simple:
        pair = (first, _tree(width, width, 1, 1, simple))
        return Tree(dict(zip(names, pair, strict=True)), width)
    blocks = {name: Basic(width, width, 1) for name in names}
    return Tree({"level_1": first, **blocks}, width, Basic(width_in, width, stride))


class DLA(nn.Module):
    def __init__(self, simple: bool, num_classes: int, channels: int) -> None:
        super().__init__()
        width = channels
        for name, out in (("base", 16), ("layer1", 16), ("layer2", 32)):
            conv = nn.Conv2d(width, out, 3, 1, 1, bias=False)
            self.add_module(name, nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU()))
            width = out
        for name, (out, levels, stride) in _TREES.items():
            self.add_module(name, _tree(width, out, levels, stride, simple))
            width = out
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for name in ("base", "layer1", "layer2", *_TREES):
            x = self.get_submodule(name)(x)
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    return DLA(name.startswith("simple"), num_classes, channels) if name in _NAMES else None


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of a Family. There is one layout, but for the name of the head."""
    return with_linear(state)


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family."""
    state = rename(state)
    simple = "layer3.left_tree.conv1.weight" in state
    return named(_NAMES[simple], state, first="base.0.weight")
