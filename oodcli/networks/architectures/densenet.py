"""DenseNets for 32x32 images (Huang et al. 2017).

``densenet-bc-100-12``: depth L and growth k, three blocks, bottlenecks, compression 0.5.
``densenet121-kuangliu``: the four blocks of the ImageNet network behind a 3x3 stem; ``-k12`` where
the growth is not the usual one. That implementation puts a layer's new channels before the old
ones, so its weights need that order. ``densenet121-weiaicunzai``: the same blocks with the new
channels behind, and no ReLU between them (models/densenet.py of weiaicunzai/pytorch-cifar100).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named

_FOUR_BLOCKS = {
    121: (32, (6, 12, 24, 16)),
    161: (48, (6, 12, 36, 24)),
    169: (32, (6, 12, 32, 32)),
    201: (32, (6, 12, 48, 32)),
}
_BC = re.compile(r"densenet-bc-(\d+)-(\d+)")
_FOUR = re.compile(r"densenet(\d+)-(kuangliu|weiaicunzai)(?:-k(\d+))?")


class DenseLayer(nn.Module):
    """(N, C, H, W) → (N, C + growth, H, W)."""

    def __init__(self, width: int, growth: int, new_first: bool) -> None:
        super().__init__()
        self.new_first = new_first
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat([new, x] if self.new_first else [x, new], 1)


class Transition(nn.Module):
    """(N, C, H, W) → (N, C/2, H/2, W/2)."""

    def __init__(self, width: int, relu: bool) -> None:
        super().__init__()
        self.relu = relu
        self.bn = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        return F.avg_pool2d(self.conv(F.relu(x) if self.relu else x), 2)


class DenseNet(nn.Module):
    def __init__(
        self,
        growth: int,
        blocks: Sequence[int],
        new_first: bool,
        num_classes: int,
        channels: int,
        relu: bool = True,
    ) -> None:
        super().__init__()
        width = 2 * growth
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        for number, count in enumerate(blocks, 1):
            if number > 1:
                self.add_module(f"trans{number - 1}", Transition(width, relu))
                width //= 2
            layers = [DenseLayer(width + i * growth, growth, new_first) for i in range(count)]
            self.add_module(f"block{number}", nn.Sequential(*layers))
            width += count * growth
        self.bn = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for name, module in self.named_children():  # in the order of the forward pass
            if name not in ("bn", "linear"):
                x = module(x)
        return self.linear(F.relu(self.bn(x)).mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """The network of that name; None where the name is not of this family."""
    if match := _BC.fullmatch(name):
        depth, growth = int(match[1]), int(match[2])
        if depth % 6 != 4 or depth < 10 or growth < 1:
            return None
        return DenseNet(growth, [(depth - 4) // 6] * 3, False, num_classes, channels)
    match = _FOUR.fullmatch(name)
    if match is None or int(match[1]) not in _FOUR_BLOCKS:
        return None
    growth, blocks = _FOUR_BLOCKS[int(match[1])]
    kuangliu = match[2] == "kuangliu"
    return DenseNet(int(match[3] or growth), blocks, kuangliu, num_classes, channels, kuangliu)


_LAYER = re.compile(r"^features\.denseblock(\d+)\.denselayer(\d+)\.(norm|conv)\.?([12])\.")
_INNER = re.compile(
    r"^features\.dense_block(?:_layer_)?(\d)\.bottle_neck_layer_(\d+)\.bottle_neck\."
)
_PARTS = {"0": "bn1", "2": "conv1", "3": "bn2", "5": "conv2"}
_RULES = (
    (re.compile(r"^features\.bn\."), "bn."),
    (re.compile(r"^(?:block|dense)(\d+)\.(?:layer\.)?"), r"block\1."),
    (re.compile(r"^trans(\d+)\.(bn|conv)1\."), r"trans\1.\2."),
    (re.compile(r"^bn1\."), "bn."),
    (re.compile(r"^(fc|classifier)\."), "linear."),
    (re.compile(r"^features\.conv0\."), "conv1."),
    (re.compile(r"^features\.transition(\d+)\.norm\."), r"trans\1.bn."),
    (re.compile(r"^features\.transition(\d+)\.conv\."), r"trans\1.conv."),
    (re.compile(r"^features\.norm(?:_final|\d)\."), "bn."),
)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This family's own keys, from the four widespread layouts: ``block1.layer.0.bn1``,
    ``dense1.0.bn1``, ``features.denseblock1.denselayer1.norm1`` and
    ``features.dense_block_layer_0.bottle_neck_layer_0.bottle_neck.0``."""
    renamed = {}
    for key, value in state.items():
        if match := _LAYER.match(key):
            kind = "bn" if match[3] == "norm" else "conv"
            key = f"block{match[1]}.{int(match[2]) - 1}.{kind}{match[4]}.{key[match.end() :]}"
        elif match := _INNER.match(key):
            part, _, rest = key[match.end() :].partition(".")
            key = f"block{int(match[1]) + 1}.{match[2]}.{_PARTS.get(part, part)}.{rest}"
        elif match := re.match(r"features\.transition_layer_(\d)\.down_sample\.([01])\.", key):
            part = ("bn", "conv")[int(match[2])]
            key = f"trans{int(match[1]) + 1}.{part}.{key[match.end() :]}"
        for pattern, replacement in _RULES:
            key = pattern.sub(replacement, key)
        renamed[key] = value
    return renamed


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family."""
    owner = ""
    if "dense1.0.conv1.weight" in state and "trans1.conv.weight" in state:
        owner = "kuangliu"
    elif "features.transition_layer_0.down_sample.0.weight" in state:
        owner = "weiaicunzai"
    state = rename(state)
    if "trans1.conv.weight" not in state or "block1.0.conv2.weight" not in state:
        return None
    if state["block1.0.conv2.weight"].ndim != 4:
        return None
    growth = state["block1.0.conv2.weight"].shape[0]
    counts: dict[str, int] = {}
    for key in state:
        if match := re.fullmatch(r"(block\d+)\.\d+\.conv2\.weight", key):
            counts[match[1]] = counts.get(match[1], 0) + 1
    blocks = tuple(counts.values())
    if len(blocks) == 3:
        return named(f"densenet-bc-{6 * blocks[0] + 4}-{growth}", state)
    for depth, (usual, layout) in _FOUR_BLOCKS.items():
        if owner and blocks == layout:
            other = f"-k{growth}" if growth != usual else ""
            return named(f"densenet{depth}-{owner}{other}", state)
    return None
