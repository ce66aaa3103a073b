"""torchvision's networks with the strides and stems of 32x32 pixels.

``mobilenetv2_x1_0-chenyaofo``, also x0_5, x0_75 and x1_4, and ``shufflenetv2_x1_0-chenyaofo``, also
x0_5, x1_5 and x2_0: the first convolution has stride 1, as has the second stage of MobileNetV2, and
ShuffleNetV2 has no max-pool (mobilenetv2.py and shufflenetv2.py of chenyaofo/pytorch-cifar-models;
huyvnphan's MobileNetV2 is x1_0). ``googlenet-huyvnphan`` and ``inception_v3-huyvnphan``: one 3x3
convolution to 192 channels is the stem (cifar10_models of huyvnphan/PyTorch_CIFAR10).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchvision import models
from torchvision.models.googlenet import BasicConv2d

from oodcli.networks.architectures.family import named

_MOBILE = {
    f"mobilenetv2_x{share}-chenyaofo": float(share.replace("_", "."))
    for share in ("0_5", "0_75", "1_0", "1_4")
}
_SHUFFLE = {
    "shufflenetv2_x0_5-chenyaofo": [24, 48, 96, 192, 1024],
    "shufflenetv2_x1_0-chenyaofo": [24, 116, 232, 464, 1024],
    "shufflenetv2_x1_5-chenyaofo": [24, 176, 352, 704, 1024],
    "shufflenetv2_x2_0-chenyaofo": [24, 244, 488, 976, 2048],
}
_LAST = {"0_5": 160, "0_75": 240, "1_0": 320, "1_4": 448}
"""Channels before the last convolution of MobileNetV2, by the share of its widths."""

_LEFT_OUT = {
    "googlenet-huyvnphan": ("maxpool1", "conv2", "conv3", "maxpool2"),
    "inception_v3-huyvnphan": (
        *("Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1"),
        *("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
    ),
}
_FIRST = {"googlenet-huyvnphan": "conv1", "inception_v3-huyvnphan": "Conv2d_1a_3x3"}


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family."""
    network: Any
    if name in _MOBILE:
        network = models.MobileNetV2(num_classes, width_mult=_MOBILE[name])
        network.features[0][0] = _stem(channels, network.features[0][0].out_channels)
        network.features[2].conv[1][0].stride = (1, 1)
    elif name in _SHUFFLE:
        network = models.ShuffleNetV2([4, 8, 4], _SHUFFLE[name], num_classes)
        network.conv1[0] = _stem(channels, 24)
        network.maxpool = nn.Identity()
    elif name in _FIRST:
        kind = models.GoogLeNet if name.startswith("googlenet") else models.Inception3
        network = kind(num_classes, aux_logits=False, init_weights=False)
        setattr(network, _FIRST[name], BasicConv2d(channels, 192, kernel_size=3, padding=1))
        for part in _LEFT_OUT[name]:
            setattr(network, part, nn.Identity())
        if name.startswith("googlenet"):
            network.maxpool3 = network.maxpool4 = nn.MaxPool2d(3, 2, 1)
    else:
        return None
    return network  # type: ignore[no-any-return]


def _stem(channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, 1, 1, bias=False)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of a Family. The keys are torchvision's."""
    return dict(state)


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family: by the width of the last stage, and the layers that are left out."""
    if "features.18.0.weight" in state and "classifier.1.weight" in state:
        for share, width in _LAST.items():
            if state["features.18.0.weight"].shape[1:2] == (width,):
                name = f"mobilenetv2_x{share}-chenyaofo"
                return named(name, state, "features.0.0.weight", "classifier.1.weight")
    elif "conv5.0.weight" in state:
        for name, widths in _SHUFFLE.items():
            if state["conv5.0.weight"].shape[1:2] == (widths[3],):
                return named(name, state, "conv1.0.weight", "fc.weight")
    elif "inception3a.branch1.conv.weight" in state and "conv2.conv.weight" not in state:
        return named("googlenet-huyvnphan", state, "conv1.conv.weight", "fc.weight")
    elif "Mixed_5b.branch1x1.conv.weight" in state and "Conv2d_2a_3x3.conv.weight" not in state:
        first = "Conv2d_1a_3x3.conv.weight"
        return named("inception_v3-huyvnphan", state, first, "fc.weight")
    return None
