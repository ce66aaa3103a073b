"""VGG for 32x32 pixels (Simonyan and Zisserman 2015), which differs in its head by the repository.

``vgg16-kuangliu``: BatchNorm and one linear layer. ``vgg16_bn-chenyaofo``: BatchNorm and linear
layers 512 and 512 wide before the last. ``vgg16_bn-chengyangfu``: the same behind a dropout.
``vgg16_bn-weiaicunzai``: 4096 and 4096, which is also huyvnphan's. Without ``_bn`` there is no
BatchNorm. Widths and keys: models/vgg.py of kuangliu/pytorch-cifar and of
weiaicunzai/pytorch-cifar100, pytorch_cifar_models/vgg.py of chenyaofo/pytorch-cifar-models, vgg.py
of chengyangfu/pytorch-vgg-cifar10.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from oodcli.networks.architectures.family import named

_PER_STAGE = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Convolutions before each of the five max-pools, by the number of layers in the name."""

_WIDTHS = (64, 128, 256, 512, 512)
_HIDDEN = {"chenyaofo": 512, "weiaicunzai": 4096, "chengyangfu": 512}
"""Width of the two linear layers before the last one."""

_NAME = re.compile(r"vgg(11|13|16|19)(?:-(kuangliu)|(_bn)?-(chenyaofo|weiaicunzai|chengyangfu))")


class VGG(nn.Module):
    """(N, channels, H, W) → (N, num_classes). owner: whose head."""

    def __init__(
        self, layers: int, batchnorm: bool, owner: str, num_classes: int, channels: int
    ) -> None:
        super().__init__()
        found: list[nn.Module] = []
        for count, width in zip(_PER_STAGE[layers], _WIDTHS, strict=True):
            for _ in range(count):
                found.append(nn.Conv2d(channels, width, 3, 1, 1))
                found += [nn.BatchNorm2d(width)] if batchnorm else []
                found.append(nn.ReLU())
                channels = width
            found.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*found)
        if owner not in _HIDDEN:
            self.classifier: nn.Module = nn.Linear(channels, num_classes)
            return
        width = _HIDDEN[owner]
        hidden: list[nn.Module] = []
        for before in (channels, width):
            hidden += [nn.Linear(before, width), nn.ReLU(), nn.Dropout()]
        if owner == "chengyangfu":
            hidden = [nn.Dropout(), *hidden[:-1]]
        self.classifier = nn.Sequential(*hidden, nn.Linear(width, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    batchnorm = match[2] is not None or match[3] is not None
    return VGG(int(match[1]), batchnorm, match[2] or match[4], num_classes, channels)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of a Family: a lone linear layer → ``classifier``, and no ``module`` inside."""
    renamed = {key.replace("features.module.", "features."): value for key, value in state.items()}
    heads = [key for key, value in renamed.items() if value.ndim == 2 and key.endswith(".weight")]
    if len(heads) == 1:
        head = heads[0].removesuffix("weight")
        renamed = {
            f"classifier.{key[len(head) :]}" if key.startswith(head) else key: value
            for key, value in renamed.items()
        }
    return renamed


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family: by the number of convolutions and the width of the head."""
    state = rename(state)
    layers = 3 + sum(key.startswith("features.") and t.ndim == 4 for key, t in state.items())
    bn = "_bn" if "features.1.running_mean" in state else ""
    if "classifier.weight" in state:
        return named(f"vgg{layers}-kuangliu", state, "features.0.weight", "classifier.weight")
    for owner, width in _HIDDEN.items():
        hidden = state.get(f"classifier.{4 if owner == 'chengyangfu' else 3}.weight")
        if hidden is not None and hidden.shape == (width, width):
            name = f"vgg{layers}{bn}-{owner}"
            return named(name, state, "features.0.weight", "classifier.6.weight")
    return None
