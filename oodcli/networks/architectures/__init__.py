"""Architectures by name, and the name of the architecture that a state dict belongs to.

One grammar: ``NAME[+OPTION…]``. NAME is built in (``resnet20-cifar``, ``wrn-28-10``,
``densenet-bc-100-12``, ``resnet18-kuangliu`` …) or ``torchvision:NAME``; ``+grey`` means one input
channel, ``+deployed`` belongs to RepVGG, the other options to torchvision's models (see
:mod:`.imagenet`). What ``--arch``
takes after that, a retrained head, is no part of NAME here (see :mod:`.heads`).

Nothing heavy is imported here: completion needs the names only.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oodcli.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from oodcli.networks.architectures.family import Family

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "cifar_resnet": tuple(
        f"resnet{n}-cifar{option}" for option in ("", "-b") for n in (20, 32, 44, 56, 110)
    ),
    "wide_resnet": (
        *(f"wrn-{size}" for size in ("16-4", "16-8", "28-2", "28-10", "34-10", "40-2", "40-4")),
        *(f"wrn-{size}-meliketoy" for size in ("28-10", "40-4")),
        "wrn-40-10-weiaicunzai",
    ),
    "densenet": (
        *(f"densenet-bc-{size}" for size in ("100-12", "190-40", "250-24")),
        *(f"densenet{n}-{o}" for o in ("kuangliu", "weiaicunzai") for n in (121, 161, 169, 201)),
    ),
    "cifar_vgg": (
        *(f"vgg{n}-kuangliu" for n in (11, 13, 16, 19)),
        *(
            f"vgg{n}_bn-{owner}"
            for owner in ("chenyaofo", "weiaicunzai", "chengyangfu")
            for n in (11, 13, 16, 19)
        ),
    ),
    "cifar_preact": (
        *(f"preactresnet{n}-kuangliu" for n in (18, 34, 50, 101, 152)),
        "senet18-kuangliu",
        *(f"preactresnet{n}-weiaicunzai" for n in (18, 34, 50, 101, 152)),
    ),
    "cifar_senet": tuple(f"seresnet{n}-weiaicunzai" for n in (18, 34, 50, 101, 152)),
    "cifar_bottleneck": (
        *(f"resnext29_{size}-kuangliu" for size in ("2x64d", "4x64d", "8x64d", "32x4d")),
        *(f"regnet{size}-kuangliu" for size in ("x_200mf", "x_400mf", "y_400mf")),
        *(f"dpn{n}-kuangliu" for n in (26, 92)),
        *(f"resnext{n}-weiaicunzai" for n in (50, 101, 152)),
    ),
    "cifar_mobile": (
        *(f"{name}-kuangliu" for name in ("mobilenet", "mobilenetv2", "efficientnetb0")),
        *("mobilenet-weiaicunzai", "mobilenetv2-weiaicunzai"),
    ),
    "cifar_shuffle": (
        *(f"shufflenetg{n}-kuangliu" for n in (2, 3)),
        *(f"shufflenetv2_x{size}-kuangliu" for size in ("0_5", "1_0", "1_5", "2_0")),
    ),
    "cifar_shuffle_v2": tuple(
        f"shufflenetv2_x{size}-weiaicunzai" for size in ("0_5", "1_0", "1_5", "2_0")
    ),
    "cifar_shuffle_v1": ("shufflenet-weiaicunzai",),
    "cifar_squeeze": ("squeezenet-weiaicunzai",),
    "cifar_preresnet": tuple(f"preresnet{n}-bearpaw" for n in (20, 32, 56, 110, 164)),
    "cifar_inception": ("googlenet-kuangliu", "googlenet-weiaicunzai"),
    "cifar_inception_v4": tuple(
        f"inception{kind}-weiaicunzai" for kind in ("v3", "v4", "resnetv2")
    ),
    "cifar_xception": ("xception-weiaicunzai",),
    "cifar_nasnet": ("nasnet-weiaicunzai",),
    "cifar_attention": ("attention56-weiaicunzai", "attention92-weiaicunzai"),
    "cifar_stochastic": tuple(f"stochasticdepth{n}-weiaicunzai" for n in (18, 34, 50, 101, 152)),
    "cifar_dla": ("dla-kuangliu", "simpledla-kuangliu"),
    "cifar_pnasnet": ("pnasneta-kuangliu", "pnasnetb-kuangliu"),
    "cifar_repvgg": tuple(
        f"repvgg_a{n}-chenyaofo{option}" for option in ("", "+deployed") for n in range(3)
    ),
    "imagenet": tuple(f"resnet{n}-kuangliu" for n in (18, 34, 50, 101, 152)),
    "torchvision_cifar": (
        *(f"mobilenetv2_x{size}-chenyaofo" for size in ("0_5", "0_75", "1_0", "1_4")),
        *(f"shufflenetv2_x{size}-chenyaofo" for size in ("0_5", "1_0", "1_5", "2_0")),
        *(f"{name}-huyvnphan" for name in ("googlenet", "inception_v3")),
    ),
}
"""Modules that are a ``family.Family``, in the order in which they are asked, and names worth
completing; other depths and widths are spelt the same way. torchvision's own names are added."""

AMBIGUOUS: Mapping[str, str] = {
    "torchvision:mobilenet_v2": "mobilenetv2_x1_0-chenyaofo",
    **{
        f"torchvision:shufflenet_v2_{size}": f"shufflenetv2_{size}-chenyaofo"
        for size in ("x0_5", "x1_0", "x1_5", "x2_0")
    },
}
"""Networks for 224x224 pixels → those for 32x32 pixels with the same keys and shapes."""

PROBED = 997
"""Number of classes of a network that is built for its shapes; no other layer has this width."""

CIFAR10 = "CIFAR-10's"
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)
KUANGLIU_STD = (0.2023, 0.1994, 0.2010)
"""What kuangliu's and chenyaofo's training scripts divide CIFAR-10 by: the mean of the standard
deviations of single images."""
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Inputs:
    """What a network expects, and where that was taken from (half a sentence). resize: as of a
    Preprocessing. crop_share: the input's side in sides of the resized picture, where that holds at
    every input size. cannot: why the resize or the interpolation cannot be as the network expects
    it, by the name of the option that says what to do instead. crop_rounding: as of a
    Preprocessing."""

    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"
    size_source: str = ""
    normalisation_source: str = ""
    crop_share: float | None = None
    cannot: Mapping[str, str] = field(default_factory=dict)
    crop_rounding: str = "even"


@dataclass(frozen=True)
class Recognition:
    """The architecture of a state dict. name: as ``build`` takes it. state_dict: with the keys of
    the network that ``build`` makes. network: that network, on the meta device."""

    name: str
    num_classes: int
    state_dict: dict[str, Tensor]
    network: nn.Module


def usual() -> list[str]:
    """Names of built-in networks that are worth completing."""
    return [name for names in FAMILIES.values() for name in names]


def names() -> list[str]:
    """Names for completion: the usual built-in ones and torchvision's, without importing it."""
    spec = importlib.util.find_spec("torchvision")
    found: list[str] = []
    for folder in spec.submodule_search_locations or () if spec else ():
        for file in sorted(Path(folder, "models").glob("*.py")):
            match = re.search(r"^__all__ = (\[.*?\])", file.read_text("utf-8"), re.M | re.S)
            if match and not file.stem.startswith("_") and "@register_model" in match.string:
                found += [name for name in ast.literal_eval(match[1]) if name.islower()]
    return [*usual(), *(f"torchvision:{name}" for name in sorted(found))]


def known(name: str) -> bool:
    """Whether ``build`` takes the name."""
    try:
        skeleton(name, 2)
    except CheckpointError:
        return False
    return True


def build(name: str, num_classes: int) -> nn.Module:
    """The network with random weights. Raises CheckpointError when the name is not known."""
    parts = name.split("+")
    channels = 1 if "grey" in parts else 3
    plain = "+".join(part for part in parts if part != "grey")
    network: nn.Module | None = None
    for family in FAMILIES:
        network = network or _family(family).build(plain, num_classes, channels)
    if network is None:
        near = difflib.get_close_matches(name, names(), 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "for example resnet20-cifar"
        raise CheckpointError(
            f"'{name}' is not a known architecture ({hint}): --arch takes a built-in "
            "name, torchvision:NAME, timm:NAME or FILE.py:FACTORY"
        )
    return network


def skeleton(name: str, num_classes: int) -> nn.Module:
    """As ``build``, on the meta device: no memory, a few milliseconds."""
    from oodcli.networks.architectures.weightless import Weightless

    with Weightless():
        return build(name, num_classes)


def rename(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the keys of the named network, from any of its widespread layouts."""
    from oodcli.networks.architectures.weightless import Weightless

    plain = "+".join(part for part in name.split("+") if part != "grey")
    for family in FAMILIES:
        with Weightless():
            ours = _family(family).build(plain, 2) is not None
        if ours:
            return _family(family).rename(state)
    return dict(state)


def recognise(state: Mapping[str, Tensor]) -> Recognition | None:
    """Which network the tensors belong to, by their names and shapes; None when it is unknown."""
    for family in FAMILIES:
        guessed = _family(family).guess(state)
        if guessed is None:
            continue
        try:
            network = skeleton(*guessed)
        except CheckpointError:  # a depth or width that no network of the family has
            continue
        renamed = _family(family).rename(state)
        if not compare(network.state_dict(), renamed):
            return Recognition(*guessed, renamed, network)
    return None


def head_classes(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> int | None:
    """The number of classes in a state dict. expected: that of the same network with ``PROBED``
    classes, whose first tensor of this length is the head's. None where state has no head."""
    for key, tensor in expected.items():
        if tensor.shape[:1] == (PROBED,):
            return len(state[key]) if key in state and state[key].ndim else None
    return None


def compare(expected: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Phrases such as "fc.weight is 10x64, expected 10x512", in the order of the network. Counts
    of batches are left out: old checkpoints have none."""
    found = []
    for key, tensor in expected.items():
        if key.endswith("num_batches_tracked"):
            continue
        if key not in given:
            found.append(f"{key} is missing")
        elif tuple(given[key].shape) != tuple(tensor.shape):
            found.append(f"{key} is {size(given[key])}, expected {size(tensor)}")
    for key in given:
        if key not in expected and not key.endswith("num_batches_tracked"):
            found.append(f"{key} is not expected")
    return found


def size(tensor: Any) -> str:
    return "x".join(str(length) for length in tensor.shape) or "a scalar"


def nearest(state: Mapping[str, Tensor]) -> tuple[str, list[str]]:
    """The known architecture with the most keys and shapes in common, and what differs; the
    number of classes does not count. Builds many skeletons: a second or more, so for error
    messages only."""
    renamed = {family: _family(family).rename(state) for family in FAMILIES}

    def alike(family: str, name: str) -> float:
        return _likeness(_with_head(name, renamed[family]), renamed[family])

    close = sorted(FAMILIES, key=lambda family: alike(family, FAMILIES[family][0]))[-3:]
    candidates = [(family, name) for family in close for name in FAMILIES[family]]
    candidates += [("imagenet", f"torchvision:{name}") for name in _imagenet().likely(state)]
    family, best = max(candidates, key=lambda pair: alike(*pair))
    if not alike(family, best):
        return "", ["nothing in common"]
    return best, compare(_with_head(best, renamed[family]), renamed[family])


@cache
def _probed(name: str) -> Mapping[str, Tensor]:
    """The state dict of the named network with ``PROBED`` classes, on the meta device."""
    return skeleton(name, PROBED).state_dict()


def _with_head(name: str, renamed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the named network, with the given one's head if it differs in the number
    of classes. renamed: with that network's keys."""
    return {
        key: renamed[key] if _is_head(key, tensor, renamed) else tensor
        for key, tensor in _probed(name).items()
    }


def _likeness(expected: Mapping[str, Tensor], renamed: Mapping[str, Tensor]) -> float:
    """The share of keys that both have, with the same shape."""
    same = sum(
        key in expected and expected[key].shape == tensor.shape for key, tensor in renamed.items()
    )
    return same / (len(expected.keys() | renamed.keys()) or 1)


def _is_head(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> bool:
    """Whether a tensor differs from the network's for ``PROBED`` classes only in their number."""
    return key in state and tensor.shape == (PROBED, *state[key].shape[1:])


def inputs(name: str, network: nn.Module) -> Inputs:
    """Input size and normalisation of a named network: those of torchvision's own weights, or
    CIFAR-10's for networks with a CIFAR stem, whatever their classes (see ``for_classes``)."""
    base, *options = name.split("+")
    if not base.startswith("torchvision:") or "cifar-stem" in options:
        found = Inputs(
            (32, 32),
            CIFAR_MEAN,
            CIFAR_STD,
            size_source="usual for CIFAR networks",
            normalisation_source=CIFAR10,
        )
        owner = base.partition("-")[2]
        # Many other scripts train ResNets and DenseNets with kuangliu's keys.
        if owner == "chenyaofo" or (owner == "kuangliu" and not _OTHERS_TOO.match(base)):
            source = f"{owner}'s for CIFAR-10,"
            found = replace(found, std=KUANGLIU_STD, normalisation_source=source)
        elif owner == "chengyangfu":
            source = "chengyangfu's, which is ImageNet's,"
            found = replace(
                found, mean=IMAGENET_MEAN, std=IMAGENET_STD, normalisation_source=source
            )
    else:
        side = getattr(network, "image_size", None)
        weights, preset = _imagenet().transforms(base.partition(":")[2], side)
        crop, resize = int(preset.crop_size[0]), int(preset.resize_size[0])
        if side is not None and side != crop:
            crop = resize = side
        found = Inputs(
            (crop, crop),
            tuple(preset.mean),
            tuple(preset.std),
            resize,
            str(preset.interpolation.value),
            f"of torchvision's weights {weights}",
            f"of torchvision's weights {weights}",
        )
    return grey(found) if "grey" in options else found


_OTHERS_TOO = re.compile(r"(resnet|densenet)\d")


def for_classes(found: Inputs, num_classes: int) -> Inputs:
    """The same with CIFAR-100's normalisation where CIFAR-10's would be assumed of 100 classes."""
    if num_classes != 100 or "CIFAR-10" not in found.normalisation_source:
        return found
    return replace(found, mean=CIFAR100_MEAN, std=CIFAR100_STD, normalisation_source="CIFAR-100's")


def grey(colour: Inputs) -> Inputs:
    """The same for one channel, whose statistics nobody knows."""
    return replace(colour, mean=(0.5,), std=(0.5,), normalisation_source="a guess for grey images,")


def resizing(resize: int | Sequence[int] | None) -> str:
    """How a picture comes to the input's size, in words. resize: as of a Preprocessing."""
    if resize is None:
        return "resized straight to it"
    if isinstance(resize, int):
        return f"shorter side to {resize}, centre crop"
    return f"resized to {resize[0]}x{resize[1]}, centre crop"


def categories(name: str, num_classes: int) -> tuple[str, ...] | None:
    """ImageNet's class names for a model of torchvision or timm with exactly 1000 classes, else
    None."""
    if not name.startswith(("torchvision:", "timm:")) or num_classes != 1000:
        return None
    if name.startswith("timm:"):
        name = "torchvision:resnet18"
    return tuple(_imagenet().categories(name.partition(":")[2].split("+")[0]))


def _imagenet() -> Any:
    # Which imports torchvision: a second.
    return import_module("oodcli.networks.architectures.imagenet")


def _family(name: str) -> Family:
    module: Any = import_module(f"oodcli.networks.architectures.{name}")
    found: Family = module
    return found
