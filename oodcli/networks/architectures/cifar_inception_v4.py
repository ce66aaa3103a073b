"""Inception v3 (Szegedy et al. 2016), Inception v4 and Inception-ResNet v2 (Szegedy et al. 2017)
for 32x32 pixels, as of weiaicunzai/pytorch-cifar100: ``inceptionv3-weiaicunzai``,
``inceptionv4-weiaicunzai`` and ``inceptionresnetv2-weiaicunzai``. Keys and widths:
models/inceptionv3.py and models/inceptionv4.py there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.networks.architectures.family import named

_Parts = Mapping[str, str]
"""Names of a block's parts → where their input is from, if that is not the block's, and their
layers: ``"stem: 64 96@3"`` is a 1x1 convolution to 64 channels and a 3x3 one to 96 on the output of
``stem``. ``7x1`` is 7 high; ``/2`` has stride 2; ``!`` has no padding."""

_LAYER = re.compile(r"(\w+?)(?:@(\d)(?:x(\d))?)?(/2)?(!)?")
_POOLS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


class Conv(nn.Module):
    """A convolution, BatchNorm and ReLU."""

    def __init__(
        self,
        width_in: int,
        width: int,
        kernel: tuple[int, int],
        stride: int,
        padding: tuple[int, int],
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _layers(width: int, spec: str) -> tuple[nn.Module, int]:
    """The layers of a part, and the channels after them. A single layer is no Sequential."""
    found: list[nn.Module] = []
    for each in spec.split():
        match = _LAYER.fullmatch(each)
        assert match is not None
        kind, high, wide, halved, bare = match.groups()
        kernel = (int(high or 1), int(wide or high or 1))
        padding = (0, 0) if bare else (kernel[0] // 2, kernel[1] // 2)
        stride = 2 if halved else 1
        if kind in _POOLS:
            found.append(_POOLS[kind](kernel, stride, padding))
        else:
            found.append(Conv(width, int(kind), kernel, stride, padding))
            width = int(kind)
    return (found[0] if len(found) == 1 else nn.Sequential(*found)), width


class Mixed(nn.Module):
    """Parts, and the concatenation of those on which no other part stands."""

    def __init__(self, width_in: int, parts: _Parts) -> None:
        super().__init__()
        widths = {"": width_in}
        self.sources: dict[str, list[str]] = {}
        for name, spec in parts.items():
            sources, _, layers = spec.rpartition(":")
            self.sources[name] = sources.split() or [""]
            layer, widths[name] = _layers(sum(widths[each] for each in self.sources[name]), layers)
            self.add_module(name, layer)
        inner = {each for sources in self.sources.values() for each in sources}
        self.last = [name for name in parts if name not in inner]
        self.width = sum(widths[name] for name in self.last)

    def forward(self, x: Tensor) -> Tensor:
        maps = {"": x}
        for name, sources in self.sources.items():
            given = torch.cat([maps[each] for each in sources], 1)
            maps[name] = self.get_submodule(name)(given)
        return torch.cat([maps[name] for name in self.last], 1)


class Residual(Mixed):
    """Parts that a 1x1 convolution projects, times ``scale``, beside a projection of the input."""

    def __init__(
        self, width_in: int, parts: _Parts, width: int, scale: float, shortcut: str
    ) -> None:
        super().__init__(width_in, parts)
        self.reduction1x1 = nn.Conv2d(self.width, width, 1)
        self.width, self.scale, self.beside = width, scale, shortcut
        self.add_module(shortcut, nn.Conv2d(width_in, width, 1))
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.reduction1x1(super().forward(x)) * self.scale
        return F.relu(self.bn(out + self.get_submodule(self.beside)(x)))


# ------------------------------------------------------------------------------- the networks


def _a3(pooled: int) -> _Parts:
    return {
        "branch1x1": "64",
        "branch5x5": "48 64@5",
        "branch3x3": "64 96@3 96@3",
        "branchpool": f"avg@3 {pooled}@3",
    }


def _c3(width: int) -> _Parts:
    return {
        "branch1x1": "192",
        "branch7x7": f"{width} {width}@7x1 192@1x7",
        "branch7x7stack": f"{width} {width}@7x1 {width}@1x7 {width}@7x1 192@1x7",
        "branch_pool": "avg@3 192",
    }


_E3 = {
    "branch1x1": "320",
    "branch3x3_1": "384",
    "branch3x3_2a": "branch3x3_1: 384@1x3",
    "branch3x3_2b": "branch3x3_1: 384@3x1",
    "branch3x3stack_1": "448",
    "branch3x3stack_2": "branch3x3stack_1: 384@3",
    "branch3x3stack_3a": "branch3x3stack_2: 384@1x3",
    "branch3x3stack_3b": "branch3x3stack_2: 384@3x1",
    "branch_pool": "avg@3 192",
}
_V3: Mapping[str, str | _Parts] = {
    "Conv2d_1a_3x3": "32@3",
    "Conv2d_2a_3x3": "32@3",
    "Conv2d_2b_3x3": "64@3",
    "Conv2d_3b_1x1": "80",
    "Conv2d_4a_3x3": "192@3!",
    "Mixed_5b": _a3(32),
    "Mixed_5c": _a3(64),
    "Mixed_5d": _a3(64),
    "Mixed_6a": {
        "branch3x3": "384@3/2!",
        "branch3x3stack": "64 96@3 96@3/2!",
        "branchpool": "max@3/2!",
    },
    "Mixed_6b": _c3(128),
    "Mixed_6c": _c3(160),
    "Mixed_6d": _c3(160),
    "Mixed_6e": _c3(192),
    "Mixed_7a": {
        "branch3x3": "192 320@3/2!",
        "branch7x7": "192 192@1x7 192@7x1 192@3/2!",
        "branchpool": "avg@3/2!",
    },
    "Mixed_7b": _E3,
    "Mixed_7c": _E3,
}

_STEM = {
    "conv1": "32@3! 32@3 64@3",
    "branch3x3_conv": "conv1: 96@3",
    "branch3x3_pool": "conv1: max@3",
    "branch7x7a": "branch3x3_conv branch3x3_pool: 64 64@7x1 64@1x7 96@3",
    "branch7x7b": "branch3x3_conv branch3x3_pool: 64 96@3",
    "branchpoola": "branch7x7a branch7x7b: max@3",
    "branchpoolb": "branch7x7a branch7x7b: 192@3",
}
_A4 = {
    "branch3x3stack": "64 96@3 96@3",
    "branch3x3": "64 96@3",
    "branch1x1": "96",
    "branchpool": "avg@3 96",
}
_B4 = {
    "branch1x1": "384",
    "branch7x7": "192 224@1x7 256@7x1",
    "branch7x7stack": "192 192@1x7 224@7x1 224@1x7 256@7x1",
    "branchpool": "avg@3 128",
}
_C4 = {
    "branch1x1": "256",
    "branch3x3": "384",
    "branch3x3a": "branch3x3: 256@3x1",
    "branch3x3b": "branch3x3: 256@1x3",
    "branch3x3stack": "384 448@1x3 512@3x1",
    "branch3x3stacka": "branch3x3stack: 256@1x3",
    "branch3x3stackb": "branch3x3stack: 256@3x1",
    "branchpool": "avg@3 256",
}
_REDUCTION_B4 = {
    "branch3x3": "192 192@3/2",
    "branch7x7": "256 256@1x7 320@7x1 320@3/2",
    "branchpool": "max@3/2",
}
_RESIDUAL_A = {"branch1x1": "32", "branch3x3": "32 32@3", "branch3x3stack": "32 48@3 64@3"}
_RESIDUAL_B = {"branch1x1": "192", "branch7x7": "128 160@1x7 192@7x1"}
_RESIDUAL_C = {"branch1x1": "192", "branch3x3": "192 224@1x3 256@3x1"}
_REDUCTION_B = {
    "branch3x3a": "256 384@3/2!",
    "branch3x3b": "256 288@3/2!",
    "branch3x3stack": "256 288@3 320@3/2!",
    "branchpool": "max@3/2!",
}


def _reduction_a(k: int, l: int, m: int, n: int) -> _Parts:  # noqa: E741  the paper's names
    return {
        "branch3x3stack": f"{k} {l}@3 {m}@3/2!",
        "branch3x3": f"{n}@3/2!",
        "branchpool": "max@3/2!",
    }


def _v3(width: int) -> Iterator[tuple[str, nn.Module]]:
    for name, spec in _V3.items():
        if isinstance(spec, str):
            layer, width = _layers(width, spec)
            yield name, layer
        else:
            block = Mixed(width, spec)
            width = block.width
            yield name, block


def _v4(width: int) -> Iterator[tuple[str, nn.Module]]:
    yield "stem", Mixed(width, _STEM)
    yield "inception_a", _repeated("InceptionA", [Mixed(384, _A4) for _ in range(4)])
    yield "reduction_a", Mixed(384, _reduction_a(192, 224, 256, 384))
    yield "inception_b", _repeated("InceptionB", [Mixed(1024, _B4) for _ in range(7)])
    yield "reduction_b", Mixed(1024, _REDUCTION_B4)
    yield "inception_c", _repeated("InceptionC", [Mixed(1536, _C4) for _ in range(3)])


def _resnet(width: int) -> Iterator[tuple[str, nn.Module]]:
    def blocks(
        count: int, before: int, parts: _Parts, after: int, scale: float, beside: str = "shortcut"
    ) -> list[nn.Module]:
        widths = [before, *[after] * (count - 1)]
        return [Residual(each, parts, after, scale, beside) for each in widths]

    a = blocks(5, 384, _RESIDUAL_A, 384, 1.0)
    b = blocks(10, 1152, _RESIDUAL_B, 1154, 0.1)
    c = blocks(5, 2146, _RESIDUAL_C, 2048, 0.1, "shorcut")
    yield "stem", Mixed(width, _STEM)
    yield "inception_resnet_a", _repeated("InceptionResNetA", a)
    yield "reduction_a", Mixed(384, _reduction_a(256, 256, 384, 384))
    yield "inception_resnet_b", _repeated("InceptionResNetB", b)
    yield "reduction_b", Mixed(1154, _REDUCTION_B)
    yield "inception_resnet_c", _repeated("InceptionResNetC", c)


def _repeated(name: str, blocks: list[nn.Module]) -> nn.Sequential:
    found = nn.Sequential()
    for number, block in enumerate(blocks):
        found.add_module(f"{name}_{number}", block)
    return found


_NETWORKS = {
    "inceptionv3-weiaicunzai": (_v3, 2048, "Conv2d_1a_3x3"),
    "inceptionv4-weiaicunzai": (_v4, 1536, "stem.conv1.0"),
    "inceptionresnetv2-weiaicunzai": (_resnet, 2048, "stem.conv1.0"),
}
"""The stages, the channels after them, and the first layer."""


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    if name not in _NETWORKS:
        return None
    stages, width, _ = _NETWORKS[name]
    network = nn.Sequential()
    for stage, layers in stages(channels):
        network.add_module(stage, layers)
    network.add_module("avgpool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten", nn.Flatten())
    network.add_module("linear", nn.Linear(width, num_classes))
    return network


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of a Family. There is one layout."""
    return dict(state)


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family: by the names of the stages."""
    for name, stage in zip(
        _NETWORKS, ("Mixed_7c", "inception_c", "inception_resnet_c"), strict=True
    ):
        if any(key.startswith(f"{stage}.") for key in state):
            return named(name, state, f"{_NETWORKS[name][2]}.conv.weight")
    return None
