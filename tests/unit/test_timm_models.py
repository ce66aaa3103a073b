"""Checkpoints of timm's models without a configuration beside them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_folders import PICTURES, alike, randomise
from torch import Tensor, nn

import oodcli
from oodcli.errors import CheckpointError
from oodcli.networks.architectures.weightless import Weightless
from oodcli.networks.timm_models import _ordered, likely

timm: Any = pytest.importorskip("timm")


def args(**values: Any) -> argparse.Namespace:
    """As timm's train.py saves them, in part."""
    usual = {"img_size": None, "input_size": None, "in_chans": None, "gp": None, "mean": None}
    usual |= {"std": None, "interpolation": "", "crop_pct": None, "num_classes": None}
    return argparse.Namespace(**usual | {"model_kwargs": {}, "epochs": 300} | values)


def saved(network: nn.Module, path: Path, **values: Any) -> Path:
    said = args(**values)
    content = {"epoch": 3, "arch": said.model, "state_dict": network.state_dict(), "args": said}
    torch.save(content | {"version": 2, "optimizer": {}, "metric": 71.5}, path)
    return path


def by_timm(network: nn.Module, given: dict[str, Any]) -> Tensor:
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    transform = create_transform(**resolve_data_config(given, model=network), is_training=False)
    images = [transform(Image.open(path).convert("RGB")) for path in PICTURES]
    with torch.no_grad():
        return network(torch.stack(images))


@pytest.mark.parametrize(
    ("name", "making", "given"),
    [
        (
            "test_resnet",
            {"num_classes": 4},
            {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.2], "crop_pct": 0.8, "img_size": 96},
        ),
        ("test_vit2", {"num_classes": 3, "img_size": 96}, {"img_size": 96}),
        (
            "test_vit2",
            {"num_classes": 3, "global_pool": "avg"},
            {"gp": "avg", "interpolation": "bilinear"},
        ),
        ("test_convnext", {"num_classes": 5, "in_chans": 3}, {"input_size": [3, 128, 160]}),
    ],
)
def test_args_of_the_training_script_are_obeyed(
    name: str, making: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    network = randomise(timm.create_model(name, **making))
    path = saved(network, tmp_path / "model_best.pth.tar", model=name, **given)
    options = {"crop": "squash"} if "input_size" in given else {}
    if options:  # timm covers an input that is not square in a way that cannot be told
        with pytest.raises(CheckpointError, match="until they cover 128x160"):
            oodcli.load_classifier(path)
    classifier = oodcli.load_classifier(path, **options)
    assert classifier.arch.startswith(f"timm:{name}")
    assert any("from the training script's args" in each for each in classifier.assumptions)
    if options:
        assert classifier.preprocessing.input_size == (128, 160)
        return
    listed = tmp_path / "pictures.txt"
    listed.write_text("\n".join(map(str, PICTURES)), encoding="utf-8")
    found = oodcli.record(classifier, listed, {"logits"}).logits
    assert found is not None
    assert alike(found, by_timm(network, given))


def test_grey_networks_have_one_channel(tmp_path: Path) -> None:
    network = randomise(timm.create_model("test_resnet", num_classes=3, in_chans=1))
    given = {"in_chans": 1, "mean": [0.4], "std": [0.2]}
    path = saved(network, tmp_path / "net.pth", model="test_resnet", **given)
    preprocessing = oodcli.load_classifier(path).preprocessing
    assert (preprocessing.mean, preprocessing.std) == ((0.4,), (0.2,))
    arch = "timm:test_resnet?in_chans=1"
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    assert oodcli.load_classifier(tmp_path / "bare.pth", arch=arch).preprocessing.channels == 1


@pytest.mark.parametrize(
    "values",
    [
        {"model": "no_such_model"},
        {"model": "hf-hub:timm/resnet18"},
        {"model": "test_vit"},
        {"model": ["test_resnet"]},
        {"model": "test_resnet", "model_kwargs": {"checkpoint_path": "x"}},
        {"model": "test_resnet", "mean": "abc"},
    ],
)
def test_args_that_are_no_use_are_passed_over(values: dict[str, Any], tmp_path: Path) -> None:
    network = timm.create_model("resnet18", num_classes=3)
    path = saved(network, tmp_path / "net.pth", **values)
    assert oodcli.load_classifier(path).arch == "torchvision:resnet18"


def test_what_the_script_of_torchvision_saved_is_torchvisions(tmp_path: Path) -> None:
    network = timm.create_model("resnet18", num_classes=3)
    said = argparse.Namespace(model="resnet18", val_crop_size=224)
    torch.save({"model": network.state_dict(), "args": said}, tmp_path / "net.pth")
    assert oodcli.load_classifier(tmp_path / "net.pth").arch == "torchvision:resnet18"


def test_the_script_of_deit_names_a_model_of_timm(tmp_path: Path) -> None:
    network = timm.create_model("test_vit2", num_classes=3, img_size=96)
    said = argparse.Namespace(model="test_vit2", input_size=96)
    torch.save({"model": network.state_dict(), "args": said}, tmp_path / "net.pth")
    found = oodcli.load_classifier(tmp_path / "net.pth")
    assert found.arch == "timm:test_vit2?img_size=96"
    assert found.preprocessing.input_size == (96, 96)


def test_a_tag_gives_the_inputs_of_those_weights(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "net.pth")
    found = oodcli.load_classifier(tmp_path / "net.pth", arch="timm:resnet18.fb_swsl_ig1b_ft_in1k")
    config = timm.get_pretrained_cfg("resnet18.fb_swsl_ig1b_ft_in1k")
    assert found.preprocessing.interpolation == config.interpolation
    assert found.preprocessing.mean == config.mean
    assert found.class_names[0] == "tench"


@pytest.mark.parametrize(
    ("arch", "sentence"),
    [
        ("timm:hf-hub:timm/resnet18", "is not the name of a model of timm"),
        ("timm:resnet18?pretrained=true", "'pretrained' is not the name"),
        ("timm:resnet18?checkpoint_path=x", "'checkpoint_path' is not the name"),
        ("timm:resnet18?no_such=1", "no_such"),
        ("timm:resnet18.no_such_tag", "no_such_tag"),
    ],
)
def test_names_that_are_none(arch: str, sentence: str, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=sentence):
        oodcli.load_classifier(tmp_path / "net.pth", arch=arch)


@pytest.mark.slow
def test_models_that_fit_a_bare_state_dict_are_proposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "tiny_patch16_224")
    torch.save(timm.create_model("deit_tiny_patch16_224").state_dict(), tmp_path / "net.pth")
    with pytest.raises(CheckpointError) as caught:
        oodcli.load_classifier(tmp_path / "net.pth")
    for name in ("timm:deit_tiny_patch16_224", "timm:vit_tiny_patch16_224"):
        assert name in caught.value.text
        assert oodcli.load_classifier(tmp_path / "net.pth", arch=name).num_classes == 1000


def only(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Compares the models with this in their names alone, however long it takes."""
    every = timm.list_models

    def some(module: str) -> list[str]:
        return [name for name in every(module=module) if part in name]

    monkeypatch.setattr(timm, "list_models", some)
    monkeypatch.setattr("oodcli.networks.timm_models.SECONDS", 300.0)


def test_the_nearest_model_is_named_with_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "test_")
    state = dict(timm.create_model("test_vit2", num_classes=7).state_dict())
    assert likely(state) == (["timm:test_vit2"], [])
    del state["blocks.1.norm1.weight"]
    names, differing = likely(state)
    assert names == ["timm:test_vit2"]
    assert differing == ["blocks.1.norm1.weight is missing"]
    grey = timm.create_model("test_efficientnet", in_chans=1).state_dict()
    assert likely(grey) == (["timm:test_efficientnet?in_chans=1"], [])
    assert likely({"a.weight": torch.zeros(3, 5)}) == ([], [])


@pytest.mark.parametrize("grey", [False, True])
def test_the_size_of_the_images_of_a_bare_transformer(grey: bool, tmp_path: Path) -> None:
    channels = {"in_chans": 1} if grey else {}
    network = timm.create_model("test_vit", num_classes=3, img_size=96, **channels)
    torch.save(network.state_dict(), tmp_path / "test_vit.pth")
    words = "in_chans=1&img_size=96" if grey else "img_size=96"
    arch = f"timm:test_vit?{words}"
    with pytest.raises(CheckpointError, match=re.escape(arch)):
        oodcli.load_classifier(tmp_path / "test_vit.pth")
    found = oodcli.load_classifier(tmp_path / "test_vit.pth", arch=arch)
    assert found.preprocessing.input_size == (96, 96)


@pytest.mark.slow
def test_a_model_of_each_module_is_among_those_that_are_tried() -> None:
    modules = {timm.models.model_entrypoint(name).__module__: name for name in timm.list_models()}
    missing = []
    for name in modules.values():
        try:
            with Weightless():
                state = timm.create_model(name).state_dict()
        except Exception:  # some compute with the numbers of their weights, or need a package
            continue
        if name not in _ordered(timm, state, ""):
            missing.append(name)
    assert len(modules) > 50
    assert not missing
