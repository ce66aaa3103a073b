"""torchvision's classification models, also behind a CIFAR stem; the table of them is torchvision's
own, so that a model it gains is known here without a change.

``torchvision:NAME`` and, each where it applies, ``+cifar-stem`` (first convolution 3x3 with stride
1, no max-pool), ``+cifar-stem+max-pool`` (with the max-pool, as in huyvnphan/PyTorch_CIFAR10),
``+384px`` (a vision transformer's image size), ``+transform-input`` or ``+no-transform-input``
(googlenet, inception_v3). ``resnet18-kuangliu`` is ``torchvision:resnet18+cifar-stem`` in the key
layouts that have ``shortcut`` and ``linear``, or ``conv2_x`` and ``residual_function``
(models/resnet.py of weiaicunzai/pytorch-cifar100).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn
from torchvision import models

from oodcli.networks.architectures.weightless import Weightless

KUANGLIU = r"resnet(18|34|50|101|152)-kuangliu"
"""torchvision's ResNets behind a CIFAR stem, in the CIFAR key layout."""

STEMS = ("conv1", "features.conv0")
"""First convolutions that a CIFAR stem replaces: ResNet's and DenseNet's."""

Shapes = Mapping[str, tuple[int, ...]]


def names() -> list[str]:
    """Every classification model that the installed torchvision can build."""
    return [str(name) for name in models.list_models(module=models)]


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
    """As of a Family; None also where an option does not apply to the model."""
    base, *options = name.split("+")
    if re.fullmatch(KUANGLIU, base) and not options:
        return model(base.removesuffix("-kuangliu"), num_classes, channels, ["cifar-stem"])
    library, colon, plain = base.partition(":")
    if library != "torchvision" or not colon:
        return None
    return model(plain, num_classes, channels, options)


def model(
    name: str, num_classes: int, channels: int = 3, options: Sequence[str] = ()
) -> nn.Module | None:
    """torchvision's model with random weights; None where it has none of that name, or an option
    does not apply to it."""
    if name not in names():
        return None
    arguments: dict[str, Any] = {"num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        # The auxiliary heads play no part in evaluation, and random weights would take minutes.
        arguments |= {"aux_logits": False, "init_weights": False}
        arguments["transform_input"] = "transform-input" in options or (
            num_classes == 1000 and "no-transform-input" not in options and channels == 3
        )
        options = [option for option in options if not option.endswith("transform-input")]
    for option in options:
        if re.fullmatch(r"\d+px", option) and name.startswith("vit_"):
            arguments["image_size"] = int(option[:-2])
        elif option != "cifar-stem" and (option != "max-pool" or "cifar-stem" not in options):
            return None
    network: nn.Module = models.get_model(name, weights=None, **arguments)
    if "cifar-stem" in options:
        stem = next((stem for stem in STEMS if _has(network, stem)), None)
        if stem is None:
            return None
        first = network.get_submodule(stem)
        assert isinstance(first, nn.Conv2d)
        _replace(network, stem, nn.Conv2d(3, first.out_channels, 3, 1, 1, bias=False))
        if "max-pool" not in options:
            _replace(network, "maxpool" if stem == "conv1" else "features.pool0", nn.Identity())
    if channels != 3:
        stem, first = next(
            (path, m) for path, m in network.named_modules() if isinstance(m, nn.Conv2d)
        )
        grey = nn.Conv2d(
            channels,
            first.out_channels,
            first.kernel_size,  # type: ignore[arg-type]
            first.stride,  # type: ignore[arg-type]
            first.padding,  # type: ignore[arg-type]
            bias=first.bias is not None,
        )
        _replace(network, stem, grey)
    return network


def _has(network: nn.Module, path: str) -> bool:
    parent, _, child = path.rpartition(".")
    modules = dict(network.named_modules())
    conv = getattr(modules.get(parent), child, None)
    return isinstance(conv, nn.Conv2d) and conv.kernel_size == (7, 7)


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's present keys, from those of its older files or of the CIFAR layouts, without
    auxiliary heads."""
    if _is_weiaicunzai(state):
        state = _from_weiaicunzai(state)
    elif _is_kuangliu(state):
        state = _from_kuangliu(state)
    rules = (
        (r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2"),
        (r"^(encoder\.layers\..*\.mlp)\.linear_1\.", r"\1.0."),
        (r"^(encoder\.layers\..*\.mlp)\.linear_2\.", r"\1.3."),
    )
    renamed = {}
    for key, value in state.items():
        if re.match(r"(AuxLogits|aux1|aux2)\.", key):
            continue
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def _is_kuangliu(state: Mapping[str, Any]) -> bool:
    return "linear.weight" in state or any(".shortcut." in key for key in state)


def _from_kuangliu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's keys of a ResNet, from those of the CIFAR layout."""
    return {
        re.sub(r"^(linear|classifier)\.", "fc.", key).replace(".shortcut.", ".downsample."): value
        for key, value in state.items()
    }


def _is_weiaicunzai(state: Mapping[str, Any]) -> bool:
    return "conv2_x.0.residual_function.0.weight" in state


_PARTS = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}
"""Where weiaicunzai's ``residual_function`` has the layers of a block."""


def _from_weiaicunzai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's keys of a ResNet, from ``conv2_x.0.residual_function.0``."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^conv1\.([01])\.", lambda m: f"{_PARTS[m[1]]}.", key)
        key = re.sub(r"^conv([2345])_x\.", lambda m: f"layer{int(m[1]) - 1}.", key)
        key = re.sub(r"\.residual_function\.([013467])\.", lambda m: f".{_PARTS[m[1]]}.", key)
        renamed[key.replace(".shortcut.", ".downsample.")] = value
    return renamed


@cache
def shapes(name: str) -> Shapes:
    """Keys and shapes of the model with 1000 classes, in a few milliseconds and no memory."""
    with Weightless():
        network = model(name, 1000)
    assert network is not None
    return {
        key: tuple(tensor.shape)
        for key, tensor in network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }


def key_patterns(keys: Mapping[str, Any]) -> frozenset[str]:
    """What the keys of a family have in common: numbers do not count."""
    return frozenset(
        re.sub(r"\d+", "#", key) for key in keys if not key.endswith("num_batches_tracked")
    )


def likely(state: Mapping[str, Any]) -> list[str]:
    """Names of models that resemble the state dict, the most similar family first. One member of
    each family (a module of torchvision) stands for all, so that few models are built."""
    families: dict[str, list[str]] = {}
    for name in names():
        families.setdefault(models.get_model_builder(name).__module__, []).append(name)
    given = key_patterns(state)

    def similarity(members: list[str]) -> float:
        known = key_patterns(shapes(members[0]))
        return len(given & known) / len(given | known)

    ranked = sorted(((similarity(m), m) for m in families.values()), reverse=True)
    return [name for score, members in ranked if score > 0.2 for name in members]


def guess(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """As of a Family; here every key and shape has been compared."""
    kuangliu = _is_kuangliu(state) or _is_weiaicunzai(state)
    renamed = rename(state)
    given = {
        key: tuple(value.shape)
        for key, value in renamed.items()
        if not key.endswith("num_batches_tracked")
    }
    for name in likely(given):
        known = shapes(name)
        if known.keys() == given.keys():
            found = _explain(known, given)
            if found is not None:
                options, classes = found
                if not kuangliu:
                    return f"torchvision:{name}{options}", classes
                if re.fullmatch(KUANGLIU, f"{name}-kuangliu") and options.startswith("+cifar-stem"):
                    return f"{name}-kuangliu{options[len('+cifar-stem') :]}", classes
    return None


def _explain(known: Shapes, given: Shapes) -> tuple[str, int] | None:
    """Options and number of classes that turn the known shapes into the given ones, or None."""
    classes = 1000
    stem = pixels = grey = ""
    for key, shape in known.items():
        other = given[key]
        if shape == other:
            continue
        if len(shape) != len(other):
            return None
        if shape[0] == 1000 and shape[1:] == other[1:] and classes in (1000, other[0]):
            classes = other[0]
        elif len(shape) == 4 == len(other) and shape[1] == 3 and shape[0] == other[0]:
            if shape[2:] != other[2:]:
                if other[2:] != (3, 3) or key.removesuffix(".weight") not in STEMS:
                    return None
                stem = "+cifar-stem"
            if other[1] not in (1, 3):
                return None
            grey = "+grey" * (other[1] == 1)
        elif key == "encoder.pos_embedding" and shape[2:] == other[2:]:
            side = round((other[1] - 1) ** 0.5)
            if side * side != other[1] - 1:
                return None
            pixels = f"+{side * given['conv_proj.weight'][2]}px"
        else:
            return None
    return stem + pixels + grey, classes


def transforms(name: str, size: int | None) -> tuple[str, Any]:
    """Name of the weights and their preprocessing: the default ones, or those of the image size
    that the network is built for."""
    weights = models.get_model_weights(name)
    chosen = weights.DEFAULT
    if size is not None:
        same = [w for w in weights if w.transforms().crop_size == [size]]
        chosen = chosen if chosen in same or not same else same[0]
    return chosen.name, chosen.transforms()


def categories(name: str) -> tuple[str, ...]:
    """ImageNet's class names, from the metadata of torchvision's weights."""
    return tuple(models.get_model_weights(name).DEFAULT.meta["categories"])
