"""Published CIFAR networks against functional versions written from their repositories' sources.

Each version reads the published keys, and every key must be read: so names, shapes, strides and the
order of layers are compared at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from commands import oodcli
from networks import layout, published, randomised, rekeyed
from optional import one_in
from torch import Tensor, nn
from torchvision import models

from oodcli.errors import CheckpointError
from oodcli.networks import architectures
from oodcli.networks.architectures import build, recognise, skeleton
from oodcli.networks.card import Overrides
from oodcli.networks.load import load_classifier

POOL = 0


class Layers:
    """Layers by their keys in a state dict. ``read`` has the keys that were used."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.state

    def get(self, key: str) -> Tensor | None:
        self.read.add(key)
        return self.state.get(key)

    def conv(self, key: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        weight, bias = self.state[f"{key}.weight"], self.get(f"{key}.bias")
        self.read.add(f"{key}.weight")
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, 1, groups)

    def depthwise(self, key: str, x: Tensor, stride: int = 1) -> Tensor:
        return self.conv(key, x, stride, x.shape[1])

    def bn(self, key: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        parts = [f"{key}.{part}" for part in ("running_mean", "running_var", "weight", "bias")]
        self.read.update(parts)
        mean, var, weight, bias = (self.state[part].view(-1, 1, 1) for part in parts)
        return (x - mean) / (var + eps).sqrt() * weight + bias

    def linear(self, key: str, x: Tensor) -> Tensor:
        weight, bias = self.get(f"{key}.weight"), self.get(f"{key}.bias")
        return x @ weight.T + bias

    def blocks(self, stage: str) -> range:
        found = {
            key[len(stage) + 1 :].split(".")[0] for key in self.state if key.startswith(f"{stage}.")
        }
        return range(len(found))


def mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, x.shape[-1]).flatten(1)


def shuffled(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)


# ------------------------------------------------------------------------------- the networks


def vgg(s: Layers, x: Tensor, name: str) -> Tensor:
    plan = {
        "11": (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL),
        "13": (64, 64, POOL, 128, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL),
        "16": (64, 64, POOL, 128, 128, POOL, *((256,) * 3), POOL, *((512,) * 3, POOL) * 2),
    }[name[3:5]]
    plan = [number for each in plan for number in (each if isinstance(each, tuple) else (each,))]
    place = 0
    for width in plan:
        if width == POOL:
            x = F.max_pool2d(x, 2, 2)
            place += 1
            continue
        x = s.conv(f"features.{place}", x)
        assert x.shape[1] == width
        if f"features.{place + 1}.running_mean" in s:
            x = s.bn(f"features.{place + 1}", x)
            place += 1
        x = F.relu(x)
        place += 2
    x = x.flatten(1)
    if "classifier.weight" in s:
        return s.linear("classifier", x)
    for layer in (1, 4) if "chengyangfu" in name else (0, 3):
        x = F.relu(s.linear(f"classifier.{layer}", x))
    return s.linear("classifier.6", x)


def preact(s: Layers, x: Tensor, name: str) -> Tensor:
    x = s.conv("conv1", x)
    if name.startswith("senet"):
        x = F.relu(s.bn("bn1", x))
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for block in s.blocks(stage):
            p = f"{stage}.{block}"
            stride = 2 if block == 0 and stage != "layer1" else 1
            last = 3 if f"{p}.conv3.weight" in s else 2
            active = F.relu(s.bn(f"{p}.bn1", x))
            short = x
            if f"{p}.shortcut.0.weight" in s:
                short = s.conv(f"{p}.shortcut.0", active, stride)
            out = s.conv(f"{p}.conv1", active, stride if last == 2 else 1)
            out = s.conv(f"{p}.conv2", F.relu(s.bn(f"{p}.bn2", out)), stride if last == 3 else 1)
            if last == 3:
                out = s.conv(f"{p}.conv3", F.relu(s.bn(f"{p}.bn3", out)))
            if f"{p}.fc1.weight" in s:
                w = F.avg_pool2d(out, out.shape[2])
                out = out * torch.sigmoid(s.conv(f"{p}.fc2", F.relu(s.conv(f"{p}.fc1", w))))
            x = out + short
    return s.linear("linear", F.avg_pool2d(x, 4).flatten(1))


def preact_weiaicunzai(s: Layers, x: Tensor, name: str) -> Tensor:
    x = F.relu(s.bn("pre.1", s.conv("pre.0", x)))
    for stage in ("stage1", "stage2", "stage3", "stage4"):
        for block in s.blocks(stage):
            p = f"{stage}.{block}"
            stride = 2 if block == 0 and stage != "stage1" else 1
            out = s.conv(f"{p}.residual.2", F.relu(s.bn(f"{p}.residual.0", x)), stride)
            out = s.conv(f"{p}.residual.5", F.relu(s.bn(f"{p}.residual.3", out)))
            if f"{p}.residual.8.weight" in s:
                out = s.conv(f"{p}.residual.8", F.relu(s.bn(f"{p}.residual.6", out)))
            x = out + (s.conv(f"{p}.shortcut", x, stride) if f"{p}.shortcut.weight" in s else x)
    return s.linear("linear", mean(x))


def seresnet(s: Layers, x: Tensor, name: str) -> Tensor:
    x = F.relu(s.bn("pre.1", s.conv("pre.0", x)))
    for stage in ("stage1", "stage2", "stage3", "stage4"):
        for block in s.blocks(stage):
            p = f"{stage}.{block}"
            stride = 2 if block == 0 and stage != "stage1" else 1
            layers = (0, 3, 6) if f"{p}.residual.6.weight" in s else (0, 3)
            out = x
            for layer in layers:
                out = s.conv(
                    f"{p}.residual.{layer}", out, stride if layer == len(layers) * 3 - 6 else 1
                )
                out = F.relu(s.bn(f"{p}.residual.{layer + 1}", out))
            w = F.relu(s.linear(f"{p}.excitation.0", out.mean((2, 3))))
            w = torch.sigmoid(s.linear(f"{p}.excitation.2", w)).view(len(x), -1, 1, 1)
            if f"{p}.shortcut.0.weight" in s:
                x = s.bn(f"{p}.shortcut.1", s.conv(f"{p}.shortcut.0", x, stride))
            x = F.relu(out * w + x)
    return s.linear("linear", mean(x))


def resnet_weiaicunzai(s: Layers, x: Tensor, name: str) -> Tensor:
    x = F.relu(s.bn("conv1.1", s.conv("conv1.0", x)))
    for stage in ("conv2_x", "conv3_x", "conv4_x", "conv5_x"):
        for block in s.blocks(stage):
            p = f"{stage}.{block}"
            stride = 2 if block == 0 and stage != "conv2_x" else 1
            layers = (0, 3, 6) if f"{p}.residual_function.6.weight" in s else (0, 3)
            out = x
            for layer in layers:
                strided = layer == layers[-2]  # the 3x3 of a bottleneck, the first of two
                out = s.conv(f"{p}.residual_function.{layer}", out, stride if strided else 1)
                out = s.bn(f"{p}.residual_function.{layer + 1}", out)
                out = F.relu(out) if layer != layers[-1] else out
            if f"{p}.shortcut.0.weight" in s:
                x = s.bn(f"{p}.shortcut.1", s.conv(f"{p}.shortcut.0", x, stride))
            x = F.relu(out + x)
    return s.linear("fc", mean(x))


def densenet_weiaicunzai(s: Layers, x: Tensor, name: str) -> Tensor:
    x = s.conv("conv1", x)
    for number in range(4):
        block = f"features.dense_block{'' if number == 3 else '_layer_'}{number}"
        for layer in s.blocks(block):
            p = f"{block}.bottle_neck_layer_{layer}.bottle_neck"
            out = s.conv(f"{p}.2", F.relu(s.bn(f"{p}.0", x)))
            x = torch.cat([x, s.conv(f"{p}.5", F.relu(s.bn(f"{p}.3", out)))], 1)
        if number < 3:
            p = f"features.transition_layer_{number}.down_sample"
            x = F.avg_pool2d(s.conv(f"{p}.1", s.bn(f"{p}.0", x)), 2, 2)
    return s.linear("linear", F.avg_pool2d(F.relu(s.bn("features.bn", x)), 4).flatten(1))


def bottlenecks(s: Layers, x: Tensor, name: str) -> Tensor:
    """ResNeXt and RegNet. Groups follow from the shape of the grouped convolution."""
    halving = ("layer3", "layer4") if name.startswith("regnet") else ("layer2", "layer3")
    x = F.relu(s.bn("bn1", s.conv("conv1", x)))
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for block in s.blocks(stage):
            p = f"{stage}.{block}"
            stride = 2 if block == 0 and stage in halving else 1
            out = F.relu(s.bn(f"{p}.bn1", s.conv(f"{p}.conv1", x)))
            groups = out.shape[1] // s.state[f"{p}.conv2.weight"].shape[1]
            out = F.relu(s.bn(f"{p}.bn2", s.conv(f"{p}.conv2", out, stride, groups)))
            if f"{p}.se.se1.weight" in s:
                w = F.relu(s.conv(f"{p}.se.se1", F.adaptive_avg_pool2d(out, 1)))
                out = out * s.conv(f"{p}.se.se2", w).sigmoid()
            out = s.bn(f"{p}.bn3", s.conv(f"{p}.conv3", out))
            if f"{p}.shortcut.0.weight" in s:
                x = s.bn(f"{p}.shortcut.1", s.conv(f"{p}.shortcut.0", x, stride))
            x = F.relu(out + x)
    return s.linear("linear", F.avg_pool2d(x, 8).flatten(1))


def dpn(s: Layers, x: Tensor, name: str) -> Tensor:
    x = F.relu(s.bn("bn1", s.conv("conv1", x)))
    for stage, kept in (("layer1", 256), ("layer2", 512), ("layer3", 1024), ("layer4", 2048)):
        for block in s.blocks(stage):
            p = f"{stage}.{block}"
            stride = 2 if block == 0 and stage != "layer1" else 1
            out = F.relu(s.bn(f"{p}.bn1", s.conv(f"{p}.conv1", x)))
            out = F.relu(s.bn(f"{p}.bn2", s.conv(f"{p}.conv2", out, stride, 32)))
            out = s.bn(f"{p}.bn3", s.conv(f"{p}.conv3", out))
            if block == 0:
                x = s.bn(f"{p}.shortcut.1", s.conv(f"{p}.shortcut.0", x, stride))
            x = torch.cat([x[:, :kept] + out[:, :kept], x[:, kept:], out[:, kept:]], 1)
            x = F.relu(x)
    return s.linear("linear", F.avg_pool2d(x, 4).flatten(1))


def mobilenet(s: Layers, x: Tensor, name: str) -> Tensor:
    x = F.relu(s.bn("bn1", s.conv("conv1", x)))
    for block in range(13):
        p = f"layers.{block}"
        x = F.relu(
            s.bn(f"{p}.bn1", s.depthwise(f"{p}.conv1", x, 2 if block in (1, 3, 5, 11) else 1))
        )
        x = F.relu(s.bn(f"{p}.bn2", s.conv(f"{p}.conv2", x)))
    return s.linear("linear", F.avg_pool2d(x, 2).flatten(1))


def mobilenet_weiaicunzai(s: Layers, x: Tensor, name: str) -> Tensor:
    x = F.relu(s.bn("stem.0.bn", s.conv("stem.0.conv", x)))
    stages = {"stem": (1,), "conv1": (0, 1), "conv2": (0, 1), "conv3": range(6), "conv4": (0, 1)}
    for stage, blocks in stages.items():
        for block in blocks:
            p = f"{stage}.{block}"
            stride = 2 if block == 0 else 1
            x = s.depthwise(f"{p}.depthwise.0", x, stride)
            x = F.relu(s.bn(f"{p}.depthwise.1", x))
            x = F.relu(s.bn(f"{p}.pointwise.1", s.conv(f"{p}.pointwise.0", x)))
    return s.linear("fc", mean(x))


def mobilenetv2(s: Layers, x: Tensor, name: str) -> Tensor:
    x = F.relu(s.bn("bn1", s.conv("conv1", x)))
    halving = (3, 6, 13)  # first of the stages with 32, 64 and 160 channels
    for block in range(17):
        p = f"layers.{block}"
        out = F.relu(s.bn(f"{p}.bn1", s.conv(f"{p}.conv1", x)))
        out = F.relu(s.bn(f"{p}.bn2", s.depthwise(f"{p}.conv2", out, 2 if block in halving else 1)))
        out = s.bn(f"{p}.bn3", s.conv(f"{p}.conv3", out))
        if f"{p}.shortcut.0.weight" in s:
            x = s.bn(f"{p}.shortcut.1", s.conv(f"{p}.shortcut.0", x))
        x = out if block in halving else out + x
    x = F.relu(s.bn("bn2", s.conv("conv2", x)))
    return s.linear("linear", F.avg_pool2d(x, 4).flatten(1))


def mobilenetv2_weiaicunzai(s: Layers, x: Tensor, name: str) -> Tensor:
    def block(p: str, x: Tensor, stride: int) -> Tensor:
        out = F.relu6(s.bn(f"{p}.residual.1", s.conv(f"{p}.residual.0", x)))
        out = F.relu6(s.bn(f"{p}.residual.4", s.depthwise(f"{p}.residual.3", out, stride)))
        out = s.bn(f"{p}.residual.7", s.conv(f"{p}.residual.6", out))
        return out + x if stride == 1 and out.shape == x.shape else out

    x = F.relu6(s.bn("pre.1", s.conv("pre.0", F.pad(x, (1, 1, 1, 1)))))
    x = block("stage1", x, 1)
    for stage in (2, 3, 4, 5, 6):
        for number in s.blocks(f"stage{stage}"):
            x = block(f"stage{stage}.{number}", x, 2 if stage < 5 and number == 0 else 1)
    x = F.relu6(s.bn("conv1.1", s.conv("conv1.0", block("stage7", x, 1))))
    return s.conv("conv2", F.adaptive_avg_pool2d(x, 1)).flatten(1)


def resnext_weiaicunzai(s: Layers, x: Tensor, name: str) -> Tensor:
    x = F.relu(s.bn("conv1.1", s.conv("conv1.0", x)))
    for stage in ("conv2", "conv3", "conv4", "conv5"):
        for block in s.blocks(stage):
            p = f"{stage}.{block}.split_transforms"
            stride = 2 if block == 0 and stage != "conv2" else 1
            out = F.relu(s.bn(f"{p}.1", s.conv(f"{p}.0", x, 1, 32)))
            out = F.relu(s.bn(f"{p}.4", s.conv(f"{p}.3", out, stride, 32)))
            out = s.bn(f"{p}.7", s.conv(f"{p}.6", out))
            p = f"{stage}.{block}.shortcut"
            if f"{p}.0.weight" in s:
                x = s.bn(f"{p}.1", s.conv(f"{p}.0", x, stride))
            x = F.relu(out + x)
    return s.linear("fc", mean(x))


def efficientnet(s: Layers, x: Tensor, name: str) -> Tensor:
    def swish(x: Tensor) -> Tensor:
        return x * x.sigmoid()

    x = swish(s.bn("bn1", s.conv("conv1", x)))
    for block in range(16):
        p = f"layers.{block}"
        stride = 2 if block in (1, 3, 5, 11) else 1  # 24, 40, 80 and 192 channels begin
        out = x if block == 0 else swish(s.bn(f"{p}.bn1", s.conv(f"{p}.conv1", x)))
        out = swish(s.bn(f"{p}.bn2", s.depthwise(f"{p}.conv2", out, stride)))
        w = swish(s.conv(f"{p}.se.se1", F.adaptive_avg_pool2d(out, 1)))
        out = out * s.conv(f"{p}.se.se2", w).sigmoid()
        out = s.bn(f"{p}.bn3", s.conv(f"{p}.conv3", out))
        x = out + x if stride == 1 and out.shape == x.shape else out
    return s.linear("linear", F.adaptive_avg_pool2d(x, 1).flatten(1))


def shufflenet(s: Layers, x: Tensor, name: str) -> Tensor:
    groups = int(name[len("shufflenetg")])
    x = F.relu(s.bn("bn1", s.conv("conv1", x)))
    for stage in ("layer1", "layer2", "layer3"):
        for block in s.blocks(stage):
            p = f"{stage}.{block}"
            own = 1 if x.shape[1] == 24 else groups
            stride = 2 if block == 0 else 1
            out = shuffled(F.relu(s.bn(f"{p}.bn1", s.conv(f"{p}.conv1", x, 1, own))), own)
            out = F.relu(s.bn(f"{p}.bn2", s.depthwise(f"{p}.conv2", out, stride)))
            out = s.bn(f"{p}.bn3", s.conv(f"{p}.conv3", out, 1, groups))
            if stride == 2:
                x = F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1))
            else:
                x = F.relu(out + x)
    return s.linear("linear", F.avg_pool2d(x, 4).flatten(1))


def shufflenetv2(s: Layers, x: Tensor, name: str) -> Tensor:
    x = F.relu(s.bn("bn1", s.conv("conv1", x)))
    for stage in ("layer1", "layer2", "layer3"):
        for block in s.blocks(stage):
            p = f"{stage}.{block}"
            if block == 0:
                left = s.bn(f"{p}.bn1", s.depthwise(f"{p}.conv1", x, 2))
                left = F.relu(s.bn(f"{p}.bn2", s.conv(f"{p}.conv2", left)))
                out = F.relu(s.bn(f"{p}.bn3", s.conv(f"{p}.conv3", x)))
                out = s.bn(f"{p}.bn4", s.depthwise(f"{p}.conv4", out, 2))
                out = F.relu(s.bn(f"{p}.bn5", s.conv(f"{p}.conv5", out)))
            else:
                half = x.shape[1] // 2
                left, out = x[:, :half], x[:, half:]
                out = F.relu(s.bn(f"{p}.bn1", s.conv(f"{p}.conv1", out)))
                out = s.bn(f"{p}.bn2", s.depthwise(f"{p}.conv2", out))
                out = F.relu(s.bn(f"{p}.bn3", s.conv(f"{p}.conv3", out)))
            x = shuffled(torch.cat([left, out], 1), 2)
    x = F.relu(s.bn("bn2", s.conv("conv2", x)))
    return s.linear("linear", F.avg_pool2d(x, 4).flatten(1))


def squeezenet_weiaicunzai(s: Layers, x: Tensor, name: str) -> Tensor:
    def layer(key: str, x: Tensor) -> Tensor:
        return F.relu(s.bn(f"{key}.1", s.conv(f"{key}.0", x)))

    def fire(number: int, x: Tensor) -> Tensor:
        small = layer(f"fire{number}.squeeze", x)
        both = [layer(f"fire{number}.expand_{k}", small) for k in ("1x1", "3x3")]
        return torch.cat(both, 1)

    f2 = fire(2, F.max_pool2d(layer("stem", x), 2, 2))
    f4 = F.max_pool2d(fire(4, fire(3, f2) + f2), 2, 2)
    f6 = fire(6, fire(5, f4) + f4)
    f8 = F.max_pool2d(fire(8, fire(7, f6) + f6), 2, 2)
    return mean(s.conv("conv10", fire(9, f8)))


def shufflenetv2_weiaicunzai(s: Layers, x: Tensor, name: str) -> Tensor:
    x = s.bn("pre.1", s.conv("pre.0", x))
    for stage in ("stage2", "stage3", "stage4"):
        for block in s.blocks(stage):
            p, stride = f"{stage}.{block}", 2 if block == 0 else 1
            left, right = (x, x) if block == 0 else x.split(x.shape[1] // 2, 1)
            if block == 0:
                left = s.bn(f"{p}.shortcut.1", s.depthwise(f"{p}.shortcut.0", left, 2))
                left = F.relu(s.bn(f"{p}.shortcut.3", s.conv(f"{p}.shortcut.2", left)))
            p += ".residual"
            right = F.relu(s.bn(f"{p}.1", s.conv(f"{p}.0", right)))
            right = s.bn(f"{p}.4", s.depthwise(f"{p}.3", right, stride))
            right = F.relu(s.bn(f"{p}.6", s.conv(f"{p}.5", right)))
            x = shuffled(torch.cat([left, right], 1), 2)
    return s.linear("fc", mean(F.relu(s.bn("conv5.1", s.conv("conv5.0", x)))))


def preresnet_bearpaw(s: Layers, x: Tensor, name: str) -> Tensor:
    x = s.conv("conv1", x)
    for stage in ("layer1", "layer2", "layer3"):
        for block in s.blocks(stage):
            p = f"{stage}.{block}"
            last = 3 if f"{p}.conv3.weight" in s else 2
            stride = 2 if block == 0 and stage != "layer1" else 1
            out = x
            for k in range(1, last + 1):
                own = stride if k == last - 1 else 1
                out = s.conv(f"{p}.conv{k}", F.relu(s.bn(f"{p}.bn{k}", out)), own)
            x = out + (
                s.conv(f"{p}.downsample.0", x, stride) if f"{p}.downsample.0.weight" in s else x
            )
    return s.linear("fc", mean(F.relu(s.bn("bn", x))))


def googlenet(s: Layers, x: Tensor, name: str) -> Tensor:
    def layer(key: str, place: int, x: Tensor) -> Tensor:
        return F.relu(s.bn(f"{key}.{place + 1}", s.conv(f"{key}.{place}", x)))

    stem, places = ("prelayer", (0, 3, 6)) if "weiaicunzai" in name else ("pre_layers", (0,))
    for place in places:
        x = layer(stem, place, x)
    if "weiaicunzai" in name:
        x = F.max_pool2d(x, 3, stride=2, padding=1)
    for p in ("a3", "b3", "a4", "b4", "c4", "d4", "e4", "a5", "b5"):
        if p in ("a4", "a5"):
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        one = layer(f"{p}.b1", 0, x)
        two = layer(f"{p}.b2", 3, layer(f"{p}.b2", 0, x))
        three = layer(f"{p}.b3", 6, layer(f"{p}.b3", 3, layer(f"{p}.b3", 0, x)))
        four = layer(f"{p}.b4", 1, F.max_pool2d(x, 3, stride=1, padding=1))
        x = torch.cat([one, two, three, four], 1)
    return s.linear("linear", mean(x))


def wrn_weiaicunzai(s: Layers, x: Tensor, name: str) -> Tensor:
    x = s.conv("init_conv", x)
    for stage in ("conv2", "conv3", "conv4"):
        for block in s.blocks(stage):
            p = f"{stage}.{block}"
            stride = 2 if block == 0 and stage != "conv2" else 1
            out = s.conv(f"{p}.residual.2", F.relu(s.bn(f"{p}.residual.0", x)), stride)
            out = s.conv(f"{p}.residual.6", F.relu(s.bn(f"{p}.residual.3", out)))
            x = out + (s.conv(f"{p}.shortcut.0", x, stride) if f"{p}.shortcut.0.weight" in s else x)
    return s.linear("linear", mean(F.relu(s.bn("bn", x))))


def dla(s: Layers, x: Tensor, name: str) -> Tensor:
    def block(p: str, x: Tensor, stride: int = 1) -> Tensor:
        out = F.relu(s.bn(f"{p}.bn1", s.conv(f"{p}.conv1", x, stride)))
        out = s.bn(f"{p}.bn2", s.conv(f"{p}.conv2", out))
        if f"{p}.shortcut.0.weight" in s:
            x = s.bn(f"{p}.shortcut.1", s.conv(f"{p}.shortcut.0", x, stride))
        return F.relu(out + x)

    def root(p: str, *maps: Tensor) -> Tensor:
        return F.relu(s.bn(f"{p}.root.bn", s.conv(f"{p}.root.conv", torch.cat(maps, 1))))

    def paper(p: str, x: Tensor, stride: int, deep: bool) -> Tensor:
        maps = []
        if deep:
            maps.append(block(f"{p}.prev_root", x, stride))
            maps.append(paper(f"{p}.level_1", x, stride, False))
        maps.append(block(f"{p}.left_node", maps[-1] if deep else x, 1 if deep else stride))
        maps.append(block(f"{p}.right_node", maps[-1]))
        return root(p, *maps)

    def simple(p: str, x: Tensor, stride: int, deep: bool) -> Tensor:
        if deep:
            one = simple(f"{p}.left_tree", x, stride, False)
            return root(p, one, simple(f"{p}.right_tree", one, 1, False))
        one = block(f"{p}.left_tree", x, stride)
        return root(p, one, block(f"{p}.right_tree", one))

    for p in ("base", "layer1", "layer2"):
        x = F.relu(s.bn(f"{p}.1", s.conv(f"{p}.0", x)))
    tree = simple if name.startswith("simple") else paper
    for p, stride, deep in (("3", 1, False), ("4", 2, True), ("5", 2, True), ("6", 2, False)):
        x = tree(f"layer{p}", x, stride, deep)
    return s.linear("linear", F.avg_pool2d(x, 4).flatten(1))


def pnasnet(s: Layers, x: Tensor, name: str) -> Tensor:
    def separated(p: str, x: Tensor, stride: int) -> Tensor:
        return s.bn(f"{p}.bn1", s.depthwise(f"{p}.conv1", x, stride))

    def cell(p: str, x: Tensor, stride: int) -> Tensor:
        pooled = F.max_pool2d(x, 3, stride, 1)
        if stride == 2:
            pooled = s.bn(f"{p}.bn1", s.conv(f"{p}.conv1", pooled))
        one = separated(f"{p}.sep_conv1", x, stride)
        if name.startswith("pnasneta"):
            return F.relu(one + pooled)
        left = F.relu(one + separated(f"{p}.sep_conv2", x, stride))
        right = F.relu(pooled + separated(f"{p}.sep_conv3", x, stride))
        return F.relu(s.bn(f"{p}.bn2", s.conv(f"{p}.conv2", torch.cat([left, right], 1))))

    x = F.relu(s.bn("bn1", s.conv("conv1", x)))
    for stage in range(1, 6):
        if stage in (2, 4):
            x = cell(f"layer{stage}", x, 2)
            continue
        for block in range(6):
            x = cell(f"layer{stage}.{block}", x, 1)
    return s.linear("linear", F.avg_pool2d(x, 8).flatten(1))


def repvgg(s: Layers, x: Tensor, name: str) -> Tensor:
    def block(p: str, x: Tensor, stride: int) -> Tensor:
        out = s.bn(f"{p}.rbr_dense.bn", s.conv(f"{p}.rbr_dense.conv", x, stride))
        out = out + s.bn(f"{p}.rbr_1x1.bn", s.conv(f"{p}.rbr_1x1.conv", x, stride))
        if f"{p}.rbr_identity.weight" in s:
            out = out + s.bn(f"{p}.rbr_identity", x)
        return F.relu(out)

    x = block("stage0", x, 1)
    for stage, count in ((1, 2), (2, 4), (3, 14), (4, 1)):
        for number in range(count):
            x = block(f"stage{stage}.{number}", x, 2 if stage > 1 and number == 0 else 1)
    return s.linear("linear", mean(x))


def mobilenetv2_chenyaofo(s: Layers, x: Tensor, name: str) -> Tensor:
    x = F.relu6(s.bn("features.0.1", s.conv("features.0.0", x)))
    for block in range(1, 18):
        p = f"features.{block}.conv"
        stride = 2 if block in (4, 7, 14) else 1
        out, place = x, 0
        if block > 1:
            out = F.relu6(s.bn(f"{p}.0.1", s.conv(f"{p}.0.0", out)))
            place = 1
        out = F.relu6(s.bn(f"{p}.{place}.1", s.depthwise(f"{p}.{place}.0", out, stride)))
        out = s.bn(f"{p}.{place + 2}", s.conv(f"{p}.{place + 1}", out))
        x = out + x if stride == 1 and out.shape == x.shape else out
    x = F.relu6(s.bn("features.18.1", s.conv("features.18.0", x)))
    return s.linear("classifier.1", mean(x))


def shufflenetv2_chenyaofo(s: Layers, x: Tensor, name: str) -> Tensor:
    x = F.relu(s.bn("conv1.1", s.conv("conv1.0", x)))
    for stage in ("stage2", "stage3", "stage4"):
        for block in s.blocks(stage):
            p = f"{stage}.{block}"
            stride = 2 if block == 0 else 1
            left, right = (x, x) if block == 0 else x.chunk(2, dim=1)
            if block == 0:
                left = s.bn(f"{p}.branch1.1", s.depthwise(f"{p}.branch1.0", left, 2))
                left = F.relu(s.bn(f"{p}.branch1.3", s.conv(f"{p}.branch1.2", left)))
            right = F.relu(s.bn(f"{p}.branch2.1", s.conv(f"{p}.branch2.0", right)))
            right = s.bn(f"{p}.branch2.4", s.depthwise(f"{p}.branch2.3", right, stride))
            right = F.relu(s.bn(f"{p}.branch2.6", s.conv(f"{p}.branch2.5", right)))
            x = shuffled(torch.cat([left, right], 1), 2)
    x = F.relu(s.bn("conv5.1", s.conv("conv5.0", x)))
    return s.linear("fc", x.mean([2, 3]))


def googlenet_huyvnphan(s: Layers, x: Tensor, name: str) -> Tensor:
    def layer(p: str, x: Tensor) -> Tensor:
        return F.relu(s.bn(f"{p}.bn", s.conv(f"{p}.conv", x), eps=0.001))

    x = layer("conv1", x)
    for part in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
        if part in ("4a", "5a"):
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        p = f"inception{part}"
        two = layer(f"{p}.branch2.1", layer(f"{p}.branch2.0", x))
        three = layer(f"{p}.branch3.1", layer(f"{p}.branch3.0", x))
        four = layer(f"{p}.branch4.1", F.max_pool2d(x, 3, stride=1, padding=1))
        x = torch.cat([layer(f"{p}.branch1", x), two, three, four], 1)
    return s.linear("fc", mean(x))


def inception_huyvnphan(s: Layers, x: Tensor, name: str) -> Tensor:
    """torchvision's own blocks after the one convolution of the stem."""
    theirs = models.Inception3(10, aux_logits=False, init_weights=False).to(x.dtype).eval()
    mixed = {key: tensor for key, tensor in s.state.items() if key.startswith("Mixed_")}
    theirs.load_state_dict(mixed, strict=False)
    s.read.update(mixed)
    first = "Conv2d_1a_3x3"
    x = F.relu(s.bn(f"{first}.bn", s.conv(f"{first}.conv", x), eps=0.001))
    for block in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
        x = getattr(theirs, f"Mixed_{block}")(x)
    return s.linear("fc", mean(x))


def shufflenet_weiaicunzai(s: Layers, x: Tensor, name: str) -> Tensor:
    x = F.relu(s.bn("conv1.bn", s.conv("conv1.conv", x)))
    for stage in ("stage2", "stage3", "stage4"):
        for unit in s.blocks(stage):
            p, stride = f"{stage}.{unit}", 2 if unit == 0 else 1
            out = s.conv(f"{p}.bottlneck.0.pointwise.0", x, 1, 3)
            out = shuffled(F.relu(s.bn(f"{p}.bottlneck.0.pointwise.1", out)), 3)
            out = s.depthwise(f"{p}.depthwise.depthwise.0", out, stride)
            out = s.bn(f"{p}.depthwise.depthwise.1", out)
            out = s.bn(f"{p}.expand.pointwise.1", s.conv(f"{p}.expand.pointwise.0", out, 1, 3))
            if stride == 2:
                x = F.relu(torch.cat([F.avg_pool2d(x, 3, stride=2, padding=1), out], 1))
            else:
                x = F.relu(x + out)
    return s.linear("fc", mean(x))


def cbr(s: Layers, key: str, x: Tensor, stride: int = 1, padded: bool = True) -> Tensor:
    """Convolution, BatchNorm, ReLU under the names of Inception, once or in a row; the last has the
    stride."""
    if f"{key}.conv.weight" not in s:
        places = [n for n in range(9) if f"{key}.{n}.conv.weight" in s]
        for place in places[:-1]:
            x = cbr(s, f"{key}.{place}", x)
        return cbr(s, f"{key}.{places[-1]}", x, stride, padded)
    weight = s.get(f"{key}.conv.weight")
    pads = tuple(side // 2 for side in weight.shape[2:]) if padded else 0
    return F.relu(s.bn(f"{key}.bn", F.conv2d(x, weight, None, stride, pads)))


def inceptionv3_weiaicunzai(s: Layers, x: Tensor, name: str) -> Tensor:
    def averaged(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1)

    for p in ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1"):
        x = cbr(s, f"Conv2d_{p}", x)
    x = cbr(s, "Conv2d_4a_3x3", x, padded=False)
    for p in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        parts = [cbr(s, f"{p}.branch{kind}", x) for kind in ("1x1", "5x5", "3x3")]
        x = torch.cat([*parts, cbr(s, f"{p}.branchpool", averaged(x))], 1)
    parts = [cbr(s, f"Mixed_6a.branch3x3{kind}", x, 2, False) for kind in ("", "stack")]
    x = torch.cat([*parts, F.max_pool2d(x, 3, 2)], 1)
    for p in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        parts = [cbr(s, f"{p}.branch{kind}", x) for kind in ("1x1", "7x7", "7x7stack")]
        x = torch.cat([*parts, cbr(s, f"{p}.branch_pool", averaged(x))], 1)
    parts = [cbr(s, f"Mixed_7a.branch{kind}", x, 2, False) for kind in ("3x3", "7x7")]
    x = torch.cat([*parts, F.avg_pool2d(x, 3, 2)], 1)
    for p in ("Mixed_7b", "Mixed_7c"):
        one = cbr(s, f"{p}.branch3x3_1", x)
        two = cbr(s, f"{p}.branch3x3stack_2", cbr(s, f"{p}.branch3x3stack_1", x))
        parts = [cbr(s, f"{p}.branch1x1", x)]
        parts += [cbr(s, f"{p}.branch3x3_2{fork}", one) for fork in "ab"]
        parts += [cbr(s, f"{p}.branch3x3stack_3{fork}", two) for fork in "ab"]
        x = torch.cat([*parts, cbr(s, f"{p}.branch_pool", averaged(x))], 1)
    return s.linear("linear", mean(x))


def inception_stem(s: Layers, x: Tensor) -> Tensor:
    x = cbr(s, "stem.conv1.0", x, padded=False)
    x = cbr(s, "stem.conv1.2", cbr(s, "stem.conv1.1", x))
    x = torch.cat([cbr(s, "stem.branch3x3_conv", x), F.max_pool2d(x, 3, 1, 1)], 1)
    x = torch.cat([cbr(s, f"stem.branch7x7{fork}", x) for fork in "ab"], 1)
    return torch.cat([F.max_pool2d(x, 3, 1, 1), cbr(s, "stem.branchpoolb", x)], 1)


def reduction_a(s: Layers, x: Tensor) -> Tensor:
    parts = [cbr(s, f"reduction_a.branch3x3{kind}", x, 2, False) for kind in ("stack", "")]
    return torch.cat([*parts, F.max_pool2d(x, 3, 2)], 1)


def inceptionv4_weiaicunzai(s: Layers, x: Tensor, name: str) -> Tensor:
    def branches(p: str, kinds: tuple[str, ...], x: Tensor) -> list[Tensor]:
        return [cbr(s, f"{p}.branch{kind}", x) for kind in kinds]

    def pooled(p: str, x: Tensor) -> Tensor:
        return cbr(s, f"{p}.branchpool", F.avg_pool2d(x, 3, stride=1, padding=1))

    x = inception_stem(s, x)
    for block in s.blocks("inception_a"):
        p = f"inception_a.InceptionA_{block}"
        x = torch.cat([*branches(p, ("3x3stack", "3x3", "1x1"), x), pooled(p, x)], 1)
    x = reduction_a(s, x)
    for block in s.blocks("inception_b"):
        p = f"inception_b.InceptionB_{block}"
        x = torch.cat([*branches(p, ("1x1", "7x7", "7x7stack"), x), pooled(p, x)], 1)
    parts = [cbr(s, f"reduction_b.branch{kind}", x, 2) for kind in ("3x3", "7x7")]
    x = torch.cat([*parts, F.max_pool2d(x, 3, 2, 1)], 1)
    assert x.shape[2:] == (7, 7)  # the repository's last pooling has this size
    for block in s.blocks("inception_c"):
        p = f"inception_c.InceptionC_{block}"
        forks = [
            torch.cat(branches(p, (f"{kind}a", f"{kind}b"), cbr(s, f"{p}.branch{kind}", x)), 1)
            for kind in ("3x3", "3x3stack")
        ]
        x = torch.cat([cbr(s, f"{p}.branch1x1", x), *forks, pooled(p, x)], 1)
    return s.linear("linear", mean(x))


def inceptionresnet_weiaicunzai(s: Layers, x: Tensor, name: str) -> Tensor:
    def stage(letter: str, x: Tensor, kinds: tuple[str, ...], scale: float, beside: str) -> Tensor:
        name = f"inception_resnet_{letter.lower()}"
        for block in s.blocks(name):
            p = f"{name}.InceptionResNet{letter}_{block}"
            out = torch.cat([cbr(s, f"{p}.branch{kind}", x) for kind in kinds], 1)
            out = scale * s.conv(f"{p}.reduction1x1", out) + s.conv(f"{p}.{beside}", x)
            x = F.relu(s.bn(f"{p}.bn", out))
        return x

    x = stage("A", inception_stem(s, x), ("1x1", "3x3", "3x3stack"), 1, "shortcut")
    x = stage("B", reduction_a(s, x), ("1x1", "7x7"), 0.1, "shortcut")
    parts = [cbr(s, f"reduction_b.branch3x3{kind}", x, 2, False) for kind in ("a", "b", "stack")]
    x = torch.cat([*parts, F.max_pool2d(x, 3, 2)], 1)
    return s.linear("linear", mean(stage("C", x, ("1x1", "3x3"), 0.1, "shorcut")))


def xception_weiaicunzai(s: Layers, x: Tensor, name: str) -> Tensor:
    def separable(p: str, place: int, x: Tensor) -> Tensor:
        out = s.conv(f"{p}.{place}.pointwise", s.depthwise(f"{p}.{place}.depthwise", x))
        return s.bn(f"{p}.{place + 1}", out)

    def residual(p: str, x: Tensor, place: int, stride: int) -> Tensor:
        out = F.relu(separable(p, place, x))
        return F.max_pool2d(separable(p, place + 3, out), 3, stride, padding=1)

    def shortcut(p: str, x: Tensor, stride: int) -> Tensor:
        return s.bn(f"{p}.1", s.conv(f"{p}.0", x, stride))

    for p in ("entry_flow.conv1", "entry_flow.conv2"):
        x = F.relu(s.bn(f"{p}.1", s.conv(f"{p}.0", x)))
    p = "entry_flow.conv3"
    x = residual(f"{p}_residual", x, 0, 2) + shortcut(f"{p}_shortcut", x, 2)
    for p, stride in (("entry_flow.conv4", 2), ("entry_flow.conv5", 1)):
        x = F.relu(x)  # in place there, before both branches
        x = residual(f"{p}_residual", x, 1, stride) + shortcut(f"{p}_shortcut", x, stride)
    for block in range(8):
        x = out = F.relu(x)  # in place, too
        for conv in ("conv1", "conv2", "conv3"):
            out = separable(f"middel_flow.middel_block.{block}.{conv}", 1, F.relu(out))
        x = x + out
    beside = shortcut("exit_flow.shortcut", x, 2)
    x = residual("exit_flow.residual", F.relu(x), 1, 2) + beside
    for place in (0, 3):
        x = F.relu(separable("exit_flow.conv", place, x))
    return s.linear("fc", mean(x))


def nasnet_weiaicunzai(s: Layers, x: Tensor, name: str) -> Tensor:
    def reduced(p: str, x: Tensor) -> Tensor:
        return s.bn(f"{p}.2", s.conv(f"{p}.1", F.relu(x)))

    def branch(p: str, x: Tensor, stride: int = 1) -> Tensor:
        for block, step in (("block1", stride), ("block2", 1)):
            x = s.depthwise(f"{p}.{block}.1.depthwise", F.relu(x), step)
            x = s.bn(f"{p}.{block}.2", s.conv(f"{p}.{block}.1.pointwise", x))
        return x

    def fit(p: str, x: Tensor, before: Tensor, width: int) -> Tensor:
        if before.shape[2] != x.shape[2]:
            before = F.relu(before)
            odd = s.conv(f"{p}.p2.3", before[:, :, 1::2, 1::2])
            even = s.conv(f"{p}.p1.1", before[:, :, ::2, ::2])
            return s.bn(f"{p}.bn", torch.cat([even, odd], 1))
        return before if before.shape[1] == width else reduced(f"{p}.dim_reduce", before)

    before = x = s.bn("stem.1", s.conv("stem.0", x))
    width = 44
    for number in range(14):
        p = f"cell_layers.{number}"
        if number in (4, 9):
            width *= 2
            other, h = fit(f"{p}.fit", x, before, width), reduced(f"{p}.dim_reduce", x)
            p += ".layer1block"
            one = branch(f"{p}1_left", other, 2) + branch(f"{p}1_right", h, 2)
            two = F.max_pool2d(h, 3, 2, 1) + branch(f"{p}2_right", other, 2)
            three = F.avg_pool2d(h, 3, 2, 1) + branch(f"{p}3_right", other, 2)
            p = f"cell_layers.{number}.layer2block"
            four = F.max_pool2d(h, 3, 2, 1) + branch(f"{p}1_right", one)
            five = F.avg_pool2d(one, 3, 1, 1) + two
            before, x = x, torch.cat([two, three, four, five], 1)
            continue
        other, h = fit(f"{p}.fit", x, before, width), reduced(f"{p}.dem_reduce", x)
        p += ".block"
        one = branch(f"{p}1_left", h) + h
        two = branch(f"{p}2_left", other) + branch(f"{p}2_right", h)
        three = F.avg_pool2d(h, 3, 1, 1) + h
        four = F.avg_pool2d(other, 3, 1, 1) + F.avg_pool2d(other, 3, 1, 1)
        five = branch(f"{p}5_left", other) + branch(f"{p}5_right", other)
        before, x = x, torch.cat([other, one, two, three, four, five], 1)
    return s.linear("fc", mean(F.relu(x)))


def attention_weiaicunzai(s: Layers, x: Tensor, name: str) -> Tensor:
    def unit(p: str, x: Tensor, stride: int = 1) -> Tensor:
        out = x
        for place in (0, 3, 6):
            out = F.relu(s.bn(f"{p}.residual_function.{place}", out))
            step = stride if place == 0 else 1
            out = s.conv(f"{p}.residual_function.{place + 2}", out, step)
        return out + s.conv(f"{p}.shortcut", x, stride)

    def attention(p: str, x: Tensor, kind: int) -> Tensor:
        def up(number: int, x: Tensor) -> Tensor:
            return unit(f"{p}.soft_resup{number}.0", x)

        def down(number: int, x: Tensor) -> Tensor:
            return unit(f"{p}.soft_resdown{number}.0", x)

        x = unit(f"{p}.pre.0", x)
        trunk = unit(f"{p}.trunk.1", unit(f"{p}.trunk.0", x))
        small = F.max_pool2d(x, 3, stride=2, padding=1)
        if kind == 1:
            long = unit(f"{p}.shortcut_long", down(1, small))
            short = down(3, down(2, small))
            mask = up(2, up(1, down(4, down(3, small)))) + short
            mask = up(4, up(3, mask) + long)
        elif kind == 2:
            mask = up(2, up(1, down(3, down(2, small)))) + unit(f"{p}.shortcut", down(1, small))
            mask = up(3, mask)
        else:
            mask = up(2, up(1, down(2, down(1, small))))
        mask = mask.repeat_interleave(2, 2).repeat_interleave(2, 3)
        for place in (0, 3):
            mask = F.relu(s.bn(f"{p}.sigmoid.{place}", mask))
            mask = s.conv(f"{p}.sigmoid.{place + 2}", mask)
        return unit(f"{p}.last.0", trunk + mask.sigmoid() * trunk)

    x = F.relu(s.bn("pre_conv.1", s.conv("pre_conv.0", x)))
    for stage in (1, 2, 3):
        x = unit(f"stage{stage}.0", x, 2)
        for module in s.blocks(f"stage{stage}")[1:]:
            x = attention(f"stage{stage}.{module}", x, stage)
    x = unit("stage4.2", unit("stage4.1", unit("stage4.0", x, 2)))
    return s.linear("linear", mean(x))


def stochastic_weiaicunzai(s: Layers, x: Tensor, name: str) -> Tensor:
    x = F.relu(s.bn("conv1.1", s.conv("conv1.0", x)))
    stages = ("conv2_x", "conv3_x", "conv4_x", "conv5_x")
    blocks = [(stage, block) for stage in stages for block in s.blocks(stage)]
    for (stage, block), survival in zip(blocks, torch.linspace(1, 0.5, len(blocks)), strict=True):
        p = f"{stage}.{block}"
        stride = 2 if block == 0 and stage != "conv2_x" else 1
        layers = (0, 3, 6) if f"{p}.residual.6.weight" in s else (0, 3)
        out = x
        for layer in layers:
            own = stride if layer == layers[-2] else 1
            out = s.bn(f"{p}.residual.{layer + 1}", s.conv(f"{p}.residual.{layer}", out, own))
            out = F.relu(out) if layer != layers[-1] else out
        if f"{p}.shortcut.0.weight" in s:
            x = s.bn(f"{p}.shortcut.1", s.conv(f"{p}.shortcut.0", x, stride))
        x = float(survival) * out + x
    return s.linear("fc", mean(x))


Reference = Callable[[Layers, Tensor, str], Tensor]
FAST: dict[str, Reference] = {
    "vgg11-kuangliu": vgg,
    "vgg16-kuangliu": vgg,
    "vgg16_bn-chenyaofo": vgg,
    "vgg11-weiaicunzai": vgg,
    "vgg13_bn-chengyangfu": vgg,
    "preactresnet18-kuangliu": preact,
    "senet18-kuangliu": preact,
    "seresnet18-weiaicunzai": seresnet,
    "densenet121-weiaicunzai-k8": densenet_weiaicunzai,
    "resnext29_32x4d-kuangliu": bottlenecks,
    "regnetx_200mf-kuangliu": bottlenecks,
    "mobilenet-kuangliu": mobilenet,
    "mobilenetv2-kuangliu": mobilenetv2,
    "efficientnetb0-kuangliu": efficientnet,
    "mobilenetv2-weiaicunzai": mobilenetv2_weiaicunzai,
    "shufflenetg2-kuangliu": shufflenet,
    "shufflenetv2_x0_5-kuangliu": shufflenetv2,
    "squeezenet-weiaicunzai": squeezenet_weiaicunzai,
    "shufflenetv2_x0_5-weiaicunzai": shufflenetv2_weiaicunzai,
    "preresnet20-bearpaw": preresnet_bearpaw,
    "wrn-16-2-weiaicunzai": wrn_weiaicunzai,
    "shufflenet-weiaicunzai": shufflenet_weiaicunzai,
    "stochasticdepth18-weiaicunzai": stochastic_weiaicunzai,
    "repvgg_a0-chenyaofo": repvgg,
    "mobilenetv2_x1_0-chenyaofo": mobilenetv2_chenyaofo,
    "shufflenetv2_x0_5-chenyaofo": shufflenetv2_chenyaofo,
}
SLOW: dict[str, Reference] = {
    "dpn26-kuangliu": dpn,
    "resnext50-weiaicunzai": resnext_weiaicunzai,
    "dla-kuangliu": dla,
    "googlenet-huyvnphan": googlenet_huyvnphan,
    "googlenet-kuangliu": googlenet,
    "vgg13_bn-weiaicunzai": vgg,
    "simpledla-kuangliu": dla,
    "preactresnet18-weiaicunzai": preact_weiaicunzai,
    "mobilenetv2_x0_5-chenyaofo": mobilenetv2_chenyaofo,
    "googlenet-weiaicunzai": googlenet,
    "inception_v3-huyvnphan": inception_huyvnphan,
    "pnasneta-kuangliu": pnasnet,
    "mobilenet-weiaicunzai": mobilenet_weiaicunzai,
    "preactresnet50-kuangliu": preact,
    "preactresnet50-weiaicunzai": preact_weiaicunzai,
    "seresnet50-weiaicunzai": seresnet,
    "resnext29_2x64d-kuangliu": bottlenecks,
    "regnety_400mf-kuangliu": bottlenecks,
    "dpn92-kuangliu": dpn,
    "shufflenetg3-kuangliu": shufflenet,
    "shufflenetv2_x2_0-weiaicunzai": shufflenetv2_weiaicunzai,
    "preresnet56-bearpaw": preresnet_bearpaw,
    "shufflenetv2_x2_0-kuangliu": shufflenetv2,
    "pnasnetb-kuangliu": pnasnet,
    "repvgg_a2-chenyaofo": repvgg,
    "inceptionv3-weiaicunzai": inceptionv3_weiaicunzai,
    "inceptionv4-weiaicunzai": inceptionv4_weiaicunzai,
    "inceptionresnetv2-weiaicunzai": inceptionresnet_weiaicunzai,
    "xception-weiaicunzai": xception_weiaicunzai,
    "nasnet-weiaicunzai": nasnet_weiaicunzai,
    "attention56-weiaicunzai": attention_weiaicunzai,
    "attention92-weiaicunzai": attention_weiaicunzai,
    "stochasticdepth50-weiaicunzai": stochastic_weiaicunzai,
    "mobilenetv2_x1_4-chenyaofo": mobilenetv2_chenyaofo,
    "shufflenetv2_x2_0-chenyaofo": shufflenetv2_chenyaofo,
}
ALL = [*one_in(2, FAST), *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
UNUSED = {
    "efficientnetb0-kuangliu": r"layers\.0\.(conv1|bn1)\.",
    "nasnet-weiaicunzai": r"cell_layers\.\d+\.fit\.",
    **{
        f"attention{n}-weiaicunzai": r"stage1\.\d\.shortcut_short\.|stage3\.\d\.shortcut\."
        for n in (56, 92)
    },
}
"""Weights that are published and take no part in the forward pass."""


def images(count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def lively(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network with random weights whose logits depend on the image: BatchNorm
    has the statistics of a few images."""
    randomised(network)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.mul_(0.2).add_(1)
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(images(8, seed=2))
    return network.eval().state_dict()


def compare(state: dict[str, Tensor], reference: Reference, name: str, rebuilt: str = "") -> None:
    """A published state dict through the reference, and through the network that it is recognised
    as. rebuilt: the network's name, where it cannot be recognised."""
    found = recognise(state)
    assert found is not None
    arch = rebuilt or found.name
    # In float64, because rounding grows in deep networks with random weights.
    state = {
        key: value.double() if value.is_floating_point() else value for key, value in state.items()
    }
    network = build(arch, 10).double().eval()
    missing = network.load_state_dict(architectures.rename(arch, state), strict=False)
    assert not missing.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys)
    layers = Layers(state)
    with torch.no_grad():
        expected = reference(layers, images().double(), name)
        logits = network(images().double())
    assert expected.shape == (2, 10)
    assert (expected[0] - expected[1]).abs().max() > 5e-3 * expected.abs().max()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    left = {key for key in state.keys() - layers.read if not key.endswith("num_batches_tracked")}
    assert all(re.match(UNUSED.get(name, "$^"), key) for key in left), left


@pytest.mark.parametrize("name", ALL)
def test_the_logits_are_those_of_the_published_network(name: str) -> None:
    state = published(name, lively(build(name, 10)))
    same_keys = name in architectures.AMBIGUOUS.values()
    compare(state, {**FAST, **SLOW}[name], name, rebuilt=name if same_keys else "")


@pytest.mark.parametrize("depth", [18, pytest.param(50, marks=pytest.mark.slow)])
def test_resnets_of_weiaicunzai_are_those_of_kuangliu(depth: int) -> None:
    state = lively(build(f"resnet{depth}-kuangliu", 10))
    inner = [
        (rf"^(layer.*)\.{part}\.", rf"\1.residual_function.{place}.")
        for part, place in (
            ("conv1", 0),
            ("bn1", 1),
            ("conv2", 3),
            ("bn2", 4),
            ("conv3", 6),
            ("bn3", 7),
        )
    ]
    stages = [(rf"^layer{number}\.", f"conv{number + 1}_x.") for number in (1, 2, 3, 4)]
    stem = ((r"^conv1\.", "conv1.0."), (r"^bn1\.", "conv1.1."), (r"\.downsample\.", ".shortcut."))
    theirs = rekeyed(state, *stem, *inner, *stages)
    assert recognise(theirs).name == f"resnet{depth}-kuangliu"
    compare(theirs, resnet_weiaicunzai, f"resnet{depth}-kuangliu")


def pooled(network: nn.Module, stem: str, pool: str) -> nn.Module:
    """torchvision's network with huyvnphan's stem: 3x3 with stride 1; the max-pool is kept."""
    parent, _, child = stem.rpartition(".")
    width = network.get_submodule(stem).out_channels
    setattr(network.get_submodule(parent), child, nn.Conv2d(3, width, 3, 1, 1, bias=False))
    assert isinstance(network.get_submodule(pool), nn.MaxPool2d)
    return network


def test_the_max_pool_of_huyvnphan_is_named_by_arch() -> None:
    stems = {"resnet18": ("conv1", "maxpool"), "densenet121": ("features.conv0", "features.pool0")}
    for name, (stem, pool) in stems.items():
        theirs = pooled(models.get_model(name, num_classes=10), stem, pool)
        state = lively(theirs)
        found = recognise(state)
        assert found.name == f"torchvision:{name}+cifar-stem"
        network = build(f"torchvision:{name}+cifar-stem+max-pool", 10).eval()
        network.load_state_dict(state)
        with torch.no_grad():
            torch.testing.assert_close(network(images()), theirs.eval()(images()))
    for unknown in ("torchvision:resnet18+max-pool", "torchvision:vgg11+cifar-stem+max-pool"):
        assert not architectures.known(unknown)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        *(("vgg11-kuangliu", head) for head in ("fc", "linear", "classifier.0", "classifier.1")),
        *((name, "fc") for name in ("senet18-kuangliu", "dpn26-kuangliu", "dla-kuangliu")),
        ("mobilenet-kuangliu", "classifier"),
        ("googlenet-kuangliu", "fc"),
    ],
)
def test_other_names_of_the_head(name: str, head: str) -> None:
    state = rekeyed(layout(name), (r"^(linear|classifier)\.", f"{head}."))
    assert f"{head}.weight" in state
    assert recognise(state).name == name


def test_resnets_of_openood_are_those_of_kuangliu() -> None:
    theirs = rekeyed(layout("resnet18-kuangliu"), (r"^linear", "fc"))  # shortcut and fc
    assert {"layer2.0.shortcut.0.weight", "fc.weight"} <= theirs.keys()
    assert recognise(theirs).name == "resnet18-kuangliu"


def test_a_data_parallel_part_of_vgg_is_recognised() -> None:
    state = rekeyed(layout("vgg19_bn-chengyangfu"), (r"^features\.", "features.module."))
    assert recognise(state).name == "vgg19_bn-chengyangfu"


def fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """RepVGG's blocks as single convolutions (Ding et al. 2021, section 3.3)."""

    def scaled(norm: str) -> tuple[Tensor, Tensor]:
        parts = ("weight", "running_var", "bias", "running_mean")
        scale, var, bias, mean = (state[f"{norm}.{part}"].double() for part in parts)
        scale = scale / (var + 1e-5).sqrt()
        return scale, bias - mean * scale

    found = {key: tensor for key, tensor in state.items() if "rbr_" not in key}
    for key in state:
        if not key.endswith("rbr_dense.conv.weight"):
            continue
        p = key.removesuffix(".rbr_dense.conv.weight")
        scale, bias = scaled(f"{p}.rbr_dense.bn")
        kernel = state[key] * scale.view(-1, 1, 1, 1)
        scale, shift = scaled(f"{p}.rbr_1x1.bn")
        kernel[:, :, 1, 1] += state[f"{p}.rbr_1x1.conv.weight"][:, :, 0, 0] * scale[:, None]
        bias = bias + shift
        if f"{p}.rbr_identity.weight" in state:
            scale, shift = scaled(f"{p}.rbr_identity")
            kernel[:, :, 1, 1] += torch.diag(scale)
            bias = bias + shift
        found |= {f"{p}.rbr_reparam.weight": kernel, f"{p}.rbr_reparam.bias": bias}
    return {key: tensor.float() for key, tensor in found.items()}


def test_a_deployed_repvgg_has_the_logits_of_the_trained_one(tmp_path) -> None:
    state = lively(build("repvgg_a0-chenyaofo", 10))
    torch.save(state, tmp_path / "trained.pt")
    torch.save(fused(state), tmp_path / "deployed.pt")
    trained, deployed = (load_classifier(tmp_path / f"{n}.pt") for n in ("trained", "deployed"))
    assert deployed.arch == "repvgg_a0-chenyaofo+deployed"
    assert deployed.preprocessing == trained.preprocessing
    with torch.no_grad():
        expected, found = trained.network(images()), deployed.network(images())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert recognise(skeleton("repvgg_a1-chenyaofo+deployed", 1000).state_dict()) is None


def test_imagenets_repvgg_is_not_read_as_cifars() -> None:
    assert recognise(skeleton("repvgg_a0-chenyaofo", 7).state_dict()) is not None
    assert recognise(skeleton("repvgg_a0-chenyaofo", 1000).state_dict()) is None


def test_the_normalisation_is_that_of_the_repository() -> None:
    def std(name: str, classes: int = 10) -> tuple[float, ...]:
        found = architectures.inputs(name, skeleton(name, classes))
        return architectures.for_classes(found, classes).std

    assert std("vgg16-kuangliu") == std("repvgg_a0-chenyaofo") == architectures.KUANGLIU_STD
    assert std("resnext29_2x64d-kuangliu") == architectures.KUANGLIU_STD
    assert std("resnet18-kuangliu") == std("densenet121-kuangliu") == architectures.CIFAR_STD
    assert std("vgg16_bn-chengyangfu") == architectures.IMAGENET_STD
    assert std("googlenet-huyvnphan") == std("wrn-28-10") == architectures.CIFAR_STD
    for name in ("vgg16-kuangliu", "seresnet18-weiaicunzai", "wrn-28-10"):
        assert std(name, 100) == architectures.CIFAR100_STD


SAME_KEYS = architectures.AMBIGUOUS.items()


@pytest.mark.parametrize(("large", "small"), [*SAME_KEYS][:3:2])
def test_networks_with_the_same_keys_are_refused_with_both_names(large, small, tmp_path) -> None:
    state = lively(build(small, 10))
    torch.save(state, tmp_path / "ten.pt")
    with pytest.raises(CheckpointError, match=rf"--arch {re.escape(large)} .* --arch {small} "):
        load_classifier(tmp_path / "ten.pt")
    found = load_classifier(tmp_path / "ten.pt", Overrides(arch=small))
    assert (found.arch, found.preprocessing.input_size) == (small, (32, 32))
    torch.save(build(large, 7).state_dict(), tmp_path / "seven.pt")
    assert load_classifier(tmp_path / "seven.pt").arch == large


@pytest.mark.slow
def test_vgg_is_inverted_and_c2ir_z_fitted(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"net": lively(build("vgg11-kuangliu", 10))}, "vgg.pth")
    for command in (
        "invert vgg.pth --per-class 2 --steps 5 -o v.h5",
        "extract vgg.pth v.h5 -o f.h5",
        "fit f.h5 -d c2ir-z -o fitted",
        "score vgg.pth noise:uniform?n=4 -d fitted/c2ir-z.safetensors -o scores.csv",
    ):
        done = oodcli(*command.split())
        assert done.status == 0, done.err
    scores = [line.split(",")[4] for line in (tmp_path / "scores.csv").read_text().splitlines()]
    assert scores[0] == "c2ir-z"
    assert all(math.isfinite(float(score)) for score in scores[1:])
    assert len(set(scores)) == 5


@pytest.mark.parametrize("name", ["vgg11-kuangliu", "mobilenetv2-kuangliu", "repvgg_a0-chenyaofo"])
def test_taps_head_and_last_map_are_found(name: str, tmp_path) -> None:
    torch.save({"net": lively(build(name, 10)), "acc": 90.0}, tmp_path / "ckpt.pth")
    found = load_classifier(tmp_path / "ckpt.pth")
    norms = [m for m in found.network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(found.batchnorms) == len(norms)
    assert found.head.weight.shape[0] == 10
    assert found.last_map.spatial_size in (4, 16)
    assert {"block", "stage"} <= {tap.kind for tap in found.taps}
