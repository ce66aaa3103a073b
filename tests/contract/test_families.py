"""Every family of architectures: its networks are recognised in their published layouts."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from networks import layout
from optional import one_in
from torch import Tensor

from oodcli.networks import architectures
from oodcli.networks.architectures import names, recognise, skeleton
from oodcli.networks.architectures.weightless import Weightless

SAME_KEYS = architectures.AMBIGUOUS.values()
BUILT_IN = [
    name for name in names() if not name.startswith("torchvision:") and name not in SAME_KEYS
]
TORCHVISION = [name for name in names() if name.startswith("torchvision:")]
VARIANTS = [
    "resnet8-cifar-w8+grey",
    "resnet20-cifar-b-w32",
    "wrn-10-1",
    "wrn-16-3-meliketoy+grey",
    "densenet-bc-40-12",
    "torchvision:vit_b_16+384px",
    "torchvision:vit_b_16+384px+grey",
    "torchvision:resnet18+cifar-stem",
    "torchvision:resnext50_32x4d+cifar-stem+grey",
    "torchvision:densenet121+cifar-stem",
    "vgg16-weiaicunzai",
    "torchvision:resnet50+grey",
]


def with_classes(name: str, classes: int) -> dict[str, Tensor]:
    """The state dict of a torchvision model with another number of classes, and no weights."""
    imagenet = pytest.importorskip("oodcli.networks.architectures.imagenet")
    table = imagenet.shapes(name.removeprefix("torchvision:"))
    head = [*table][-2:] if not name.endswith("maxvit_t") else [*table][-1:]
    assert all(table[key][0] == 1000 for key in head)
    changed = {key: (classes, *table[key][1:]) for key in head}
    return {key: torch.empty(shape, device="meta") for key, shape in {**table, **changed}.items()}


@pytest.mark.parametrize("classes", [1000, 7])
@pytest.mark.parametrize("name", one_in(16, TORCHVISION))
def test_every_torchvision_model_is_recognised(name: str, classes: int) -> None:
    state = skeleton(name, 1000).state_dict() if classes == 1000 else with_classes(name, classes)
    found = recognise(state)
    assert found is not None
    assert (found.name, found.num_classes) == (name, classes)


@pytest.mark.parametrize("name", [*one_in(4, BUILT_IN), *VARIANTS])
def test_every_built_in_network_is_recognised_in_its_published_layout(name: str) -> None:
    state = layout(name)
    found = recognise(state)
    assert found is not None
    assert (found.name, found.num_classes) == (name, 10)
    assert not architectures.compare(skeleton(name, 10).state_dict(), found.state_dict)


@pytest.mark.parametrize("family", one_in(3, architectures.FAMILIES))
def test_every_family_keeps_to_the_contract(family: str) -> None:
    """What ``family.Family`` promises, for each of its usual names."""
    module = importlib.import_module(f"oodcli.networks.architectures.{family}")
    assert module.build("nothing-of-the-kind", 3) is None
    assert module.guess({}) is None
    assert module.guess({"conv1.weight": torch.zeros(1), "linear.weight": torch.zeros(1)}) is None
    others = [
        importlib.import_module(f"oodcli.networks.architectures.{each}")
        for each in architectures.FAMILIES
        if each != family
    ]
    for name in architectures.FAMILIES[family]:
        with Weightless():
            assert module.build(name, 3) is not None
            assert not any(other.build(name, 3) for other in others)
        for grey in ("", "+grey"):
            state = skeleton(name + grey, 3).state_dict()
            published = layout(name + grey, 3)
            assert module.guess(published) == (name + grey, 3)
            renamed = module.rename(published)
            assert not architectures.compare(state, renamed)
            assert module.rename(renamed).keys() == renamed.keys()


def test_every_kind_of_built_in_network_is_in_the_guide() -> None:
    page = Path(__file__, "../../../docs/checkpoints.md").resolve().read_text("utf-8")
    listed = re.findall(r"`([a-z]+[\w-]*)`", page)

    def kind(name: str) -> str:  # numbers aside
        return re.sub(r"\d+|(?<=dla|net)[ab](?=-)", "#", name)

    owners = ("kuangliu", "chenyaofo", "weiaicunzai", "huyvnphan", "chengyangfu")
    kinds = {kind(name).split("x#")[0] for name in architectures.usual() if name.endswith(owners)}
    assert kinds <= {kind(name).split("x#")[0] for name in listed}


def test_names_are_torchvisions_own() -> None:
    from torchvision import models

    listed = [f"torchvision:{name}" for name in models.list_models(module=models)]
    assert sorted(listed) == TORCHVISION
