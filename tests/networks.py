"""Small networks with the awkward habits of large ones."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.features import DropoutPasses, Features, LinearHead
from oodcli.networks.architectures import skeleton
from oodcli.networks.assemble import assemble
from oodcli.networks.classifier import Classifier
from oodcli.networks.preprocessing import Preprocessing
from oodcli.recording.recorder import Recorder, recordable

PREPROCESSING = Preprocessing((8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


class Block(nn.Module):
    """A residual block; its ReLUs are functional, and in place where asked."""

    def __init__(self, width: int, inplace: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=self.inplace)
        return F.relu(self.bn2(self.conv2(out)) + x, inplace=self.inplace)


class Residual(nn.Module):
    """Stem, two stages with a change of resolution between, linear head."""

    def __init__(self, classes: int = 3, width: int = 6, inplace: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(Block(width, inplace), Block(width, inplace))
        self.down = nn.MaxPool2d(2)
        self.layer2 = nn.Sequential(Block(width, inplace), Block(width, inplace))
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(F.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer2(self.down(x)).mean((2, 3)))


class Shared(nn.Module):
    """Calls one BatchNorm twice, and has one at a single position."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.flat = nn.BatchNorm1d(3)
        self.fc = nn.Linear(3, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(self.flat(x.mean((2, 3))))


class Standardised(nn.Module):
    """A weight standardised by BatchNorm in training mode, as in NFNet and BiT, positions that are
    computed from sizes, as in XCiT, and a mask written part by part, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight.reshape(1, 6, -1)
        weight = F.batch_norm(weight, None, None, training=True, momentum=0.0)
        x = F.conv2d(x, weight.reshape(self.conv.weight.shape), self.conv.bias).relu()
        rows = torch.arange(1, x.shape[2] + 1, device=x.device).float().view(1, 1, -1, 1)
        mask = torch.zeros(1, 1, x.shape[2], x.shape[3])
        mask[:, :, 2:5, :3] = 1
        mask[:, :, 5:, 3:] = 2
        places = torch.ones(1, 1, x.shape[2], x.shape[3]).cumsum(3)
        return self.fc((x * (rows.sin() + mask + places.cos())).mean((2, 3)))


class Plain(nn.Module):
    """No BatchNorm; without ``linear``, the logits are no linear function of features."""

    def __init__(self, classes: int = 3, linear: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.head = nn.Linear(5, classes) if linear else nn.Conv2d(5, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3), keepdim=True)
        return (
            self.head(x.flatten(1))
            if isinstance(self.head, nn.Linear)
            else self.head(x).tanh().mean((2, 3))
        )


class Activated(nn.BatchNorm2d):
    """A BatchNorm layer that holds the activation after it, as timm's BatchNormAct2d."""

    def forward(self, x):
        return F.silu(super().forward(x))


class Apart(nn.Module):
    """The same network with the activation in the layer, or apart from it; the layer's input goes
    another way, too."""

    def __init__(self, layer):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 5, 3), layer(5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.conv(x)
        y = self.bn(x)
        y = y if isinstance(self.bn, Activated) else F.silu(y)
        return self.fc((x + y).mean((2, 3)))


class Maps(Apart):
    def forward(self, x):
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


class Tokens(Apart):
    """BatchNorm over tokens, each of which is a row, as in LeViT."""

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)  # (N, T, C)
        return self.fc(F.relu(self.bn(x.flatten(0, 1)).reshape(x.shape)).mean(1))


class Dropping(nn.Module):
    """Dropout of channels, of numbers, and before the head; with p = 0, not there."""

    def __init__(self, channels: float = 0.3, numbers: float = 0.2, head: float = 0.5) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.channels, self.numbers = nn.Dropout2d(channels), nn.Dropout(numbers)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(head), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.channels(F.relu(self.bn(self.conv1(x))))
        x = F.relu(self.conv2(self.numbers(x)))
        return self.classifier(F.dropout(x, 0.4, self.training).mean((2, 3)))


def settled(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, and running statistics from a few batches of noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            spread = 0.5 if parameter.ndim > 1 else 0.2
            shift = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(shift + spread * torch.randn(parameter.shape, generator=generator))
        network.train()
        for _ in range(20):
            network(torch.randn(16, 3, 8, 8, generator=generator))
    return network.eval()


def classifier(network: nn.Module, **settings: object) -> Classifier:
    """A classifier around a small network, 8×8 RGB."""
    return assemble(
        settled(network), arch=type(network).__name__, preprocessing=PREPROCESSING, **settings
    )


def images(count: int, seed: int = 1) -> Tensor:
    """(N, 3, 8, 8), normalised."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def recorded(count: int, seed: int = 1, *, classes: int = 3, labelled: bool = True) -> Features:
    """Rows of Residual with everything that can be recorded, and what takes an inversion or a
    network trained for it made up. Logits are about 0 on average, so that each class is
    predicted."""
    network = classifier(Residual(classes=classes))
    labels = torch.arange(count) % classes if labelled else None
    seen = Recorder(network, recordable(network))(images(count, seed), labels)
    usual = Recorder(network, frozenset({"logits"}))(images(24, 1)).logits.mean(0)
    generator = torch.Generator().manual_seed(seed)
    passes = DropoutPasses()
    noise = torch.randn(count, passes.passes, classes, generator=generator)
    return replace(
        seen,
        dropout_logits=((seen.logits - usual)[:, None] + noise).flatten(1),
        made_with={**seen.made_with, passes.group: passes},
        logits=seen.logits - usual,
        odin_logits=seen.odin_logits - usual,
        head=LinearHead(seen.head.weight, seen.head.bias - usual),
        multi_label=True,
        deconf_h=(seen.logits - usual) / 2,
        mos_others=torch.randn(count, 2, generator=generator).sigmoid().log(),
        layers={
            name: replace(layer, sensitivity=torch.randn(layer.mean.shape, generator=generator))
            for name, layer in seen.layers.items()
        },
    )


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and statistics that no two channels share."""
    generator = torch.Generator().manual_seed(seed)
    state = network.state_dict()
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if key.endswith("running_var"):
            noise = noise.abs() + 0.5
        elif tensor.ndim > 1:
            noise = noise / math.sqrt(tensor[0].numel())
        tensor.copy_(noise)
    return network.eval()


def rekeyed(state: dict[str, Tensor], *rules: tuple[str, str]) -> dict[str, Tensor]:
    """Keys rewritten by regular expressions, and no counters, as in old files."""
    found = {}
    for key, tensor in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        if not key.endswith("num_batches_tracked"):
            found[key] = tensor
    return found


PREFIXES = ("underlying_model.", "backbone.", "module.underlying_model.")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def deconf_tensors(form):
    """The tensors of a DeConf head of 10 classes, by the keys of the widespread implementations."""
    found = {
        "h.h.weight": normal(10, 64, seed=1),
        "g.0.weight": normal(1, 64, seed=2) / 8,
        "g.0.bias": torch.tensor([0.3]),
        "g.1.weight": torch.tensor([1.5]),
        "g.1.bias": torch.tensor([-0.2]),
        "g.1.running_mean": torch.tensor([0.4]),
        "g.1.running_var": torch.tensor([2.0]),
        "g.1.num_batches_tracked": torch.tensor(7),
    }
    return found | ({"h.h.bias": normal(10, seed=3)} if form == "inner" else {})


def deconf_state(backbone, form, prefix=PREFIXES[0]):
    """A checkpoint of a DeConf head and the network that it stands on."""
    outer = prefix.removesuffix("underlying_model.").removesuffix("backbone.")
    body = {f"{prefix}{key}": value for key, value in backbone.state_dict().items()}
    return body | {f"{outer}{key}": value for key, value in deconf_tensors(form).items()}


def layout(name: str, classes: int = 10) -> dict[str, Tensor]:
    """The keys in which the checkpoints of a built-in network are usually published."""
    return published(name, skeleton(name, classes).state_dict())


def published(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a built-in network with those keys."""
    if name.startswith(RENAMED) and "-weiaicunzai" in name:
        return of_weiaicunzai(name, state)
    if re.fullmatch(r"resnet\d+-kuangliu.*", name):
        return rekeyed(state, (r"^fc\.", "linear."), (r"\.downsample\.", ".shortcut."))
    if name.startswith("densenet") and "kuangliu" in name:
        return rekeyed(state, (r"^block(\d)", r"dense\1"))
    if name.startswith("densenet-bc"):
        return rekeyed(
            state,
            (r"^block(\d)\.", r"block\1.layer."),
            (r"^(trans\d)\.(bn|conv)\.", r"\1.\g<2>1."),
            (r"^bn\.", "bn1."),
            (r"^linear\.", "fc."),
        )
    if "meliketoy" in name:
        return rekeyed(state, (r"^block", "layer"), (r"\.shortcut\.", ".shortcut.0."))
    if name.startswith("wrn"):
        return rekeyed(
            state,
            (r"^block(\d)\.", r"block\1.layer."),
            (r"\.shortcut\.", ".convShortcut."),
            (r"^linear\.", "fc."),
        )
    return rekeyed(state)


RENAMED = ("preact", "mobilenet", "resnext", "googlenet", "wrn", "densenet")
"""Networks that have other keys in weiaicunzai's repository than in oodcli."""

MOBILE_STAGES = ("stem.1", *(f"conv{stage}.{block}" for stage in (1, 2) for block in (0, 1)))
MOBILE_STAGES += (*(f"conv3.{block}" for block in range(6)), "conv4.0", "conv4.1")
"""weiaicunzai's names of MobileNet's thirteen blocks."""


def of_weiaicunzai(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of weiaicunzai/pytorch-cifar100."""
    if name.startswith("preactresnet"):
        parts = (("bn1", 0), ("conv1", 2), ("bn2", 3), ("conv2", 5), ("bn3", 6), ("conv3", 8))
        inner = [(rf"^(layer.*)\.{part}\.", rf"\1.residual.{place}.") for part, place in parts]
        outer = ((r"^conv1", "pre.0"), (r"^bn1", "pre.1"), (r"^layer", "stage"))
        return rekeyed(state, *inner, *outer, (r"shortcut\.0", "shortcut"))
    if name.startswith("mobilenetv2"):
        return of_mobilenetv2(state)
    if name.startswith("resnext"):
        parts = (("conv1", 0), ("bn1", 1), ("conv2", 3), ("bn2", 4), ("conv3", 6), ("bn3", 7))
        inner = [(rf"^(layer.*)\.{part}\.", rf"\1.split_transforms.{n}.") for part, n in parts]
        stem = ((r"^conv1\.", "conv1.0."), (r"^bn1\.", "conv1.1."), (r"^linear", "fc"))
        return rekeyed(
            state, *stem, *inner, *((rf"^layer{n}", f"conv{n + 1}") for n in (1, 2, 3, 4))
        )
    if name.startswith("googlenet"):
        return rekeyed(state, (r"^pre_layers", "prelayer"))
    if name.startswith("wrn"):
        parts = (("bn1", 0), ("conv1", 2), ("bn2", 3), ("conv2", 6))
        inner = [(rf"(\d)\.{part}\.", rf"\1.residual.{place}.") for part, place in parts]
        stem = ((r"^conv1", "init_conv"), (r"^bn1", "bn"), (r"\.shortcut\.", ".shortcut.0."))
        stages = [(rf"^block{number}\.", f"conv{number + 1}.") for number in (3, 2, 1)]
        return rekeyed(state, *stem, *inner, *stages)
    if name.startswith("densenet"):
        parts = (("bn1", 0), ("conv1", 2), ("bn2", 3), ("conv2", 5))
        found = {}
        for key, tensor in rekeyed(state, (r"^bn\.", "features.bn.")).items():
            if match := re.match(r"block(\d)\.(\d+)\.(\w+)\.", key):
                block = (
                    "dense_block3" if match[1] == "4" else f"dense_block_layer_{int(match[1]) - 1}"
                )
                inner = f"bottle_neck_layer_{match[2]}.bottle_neck.{dict(parts)[match[3]]}"
                key = f"features.{block}.{inner}.{key[match.end() :]}"
            if match := re.match(r"trans(\d)\.(bn|conv)\.", key):
                part = ("bn", "conv").index(match[2])
                block = f"transition_layer_{int(match[1]) - 1}.down_sample.{part}"
                key = f"features.{block}.{key[match.end() :]}"
            found[key] = tensor
        return found
    blocks = [
        (rf"^layers\.{place}\.{layer}{number}\.", f"{stage}.{kind}wise.{part}.")
        for place, stage in enumerate(MOBILE_STAGES)
        for number, kind in ((1, "depth"), (2, "point"))
        for part, layer in enumerate(("conv", "bn"))
    ]
    stem = ((r"^(conv|bn)1\.(?!\d)", r"stem.0.\1."), (r"^linear", "fc"))
    return rekeyed(state, *stem, *blocks)


def of_mobilenetv2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of weiaicunzai's MobileNetV2, whose head is a 1x1 convolution."""
    places = [
        (stage, block)
        for stage, count in enumerate((1, 2, 3, 4, 3, 3, 1), 1)
        for block in range(count)
    ]
    parts = (("conv1", 0), ("bn1", 1), ("conv2", 3), ("bn2", 4), ("conv3", 6), ("bn3", 7))
    rules = [
        (
            rf"^layers\.{number}\.{part}\.",
            f"stage{stage}{'' if stage in (1, 7) else f'.{block}'}.residual.{place}.",
        )
        for number, (stage, block) in enumerate(places)
        for part, place in parts
    ]
    outer = ((r"^conv1\.", "pre.0."), (r"^bn1\.", "pre.1."), (r"^conv2\.", "conv1.0."))
    found = rekeyed(state, *outer, (r"^bn2\.", "conv1.1."), (r"^linear\.", "conv2."), *rules)
    found["conv2.weight"] = found["conv2.weight"][:, :, None, None]
    return found
