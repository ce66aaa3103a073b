"""Folders of every family of classifiers in transformers and timm, beside the frameworks' own
pipelines on photographs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hub_folders import (
    LABELS,
    PICTURES,
    TIMM,
    TRANSFORMERS,
    alike,
    timm_folder,
    timm_logits,
    transformers_folder,
    transformers_logits,
)

import oodcli
from oodcli.features import Features
from oodcli.networks.classifier import Classifier

pytestmark = pytest.mark.slow

PILLOW_AND_TORCHVISION = 5e-3
"""Part of the spread of the logits by which the resize of Pillow and that of torchvision's tensors,
the default of transformers, may differ."""


def recorded(classifier: Classifier, tmp_path: Path) -> Features:
    images = tmp_path / "pictures.txt"
    images.write_text("\n".join(map(str, PICTURES)), encoding="utf-8")
    return oodcli.record(classifier, images, {"logits", "embedding", "layers.mean"})


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_transformers(family: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = tmp_path / "network"
    network = transformers_folder(family, folder)
    classifier = oodcli.load_classifier(folder)
    found = recorded(classifier, tmp_path)
    assert found.logits is not None
    assert alike(found.logits, transformers_logits(folder, network))
    default = transformers_logits(folder, network, None)
    assert alike(found.logits, default, PILLOW_AND_TORCHVISION)
    assert classifier.class_names == tuple(LABELS.values())
    check_inside(classifier, found)


def check_inside(classifier: Classifier, found: Features) -> None:
    """The head gives the logits of the embedding, and there are stages and a last map."""
    assert classifier.head is not None
    assert found.embedding is not None
    assert found.logits is not None
    head = classifier.head
    logits = found.embedding @ head.weight.T + head.bias
    torch.testing.assert_close(logits, found.logits, atol=1e-3, rtol=1e-3)
    assert any(tap.kind == "stage" for tap in classifier.taps)
    assert classifier.last_map is not None


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    folder = tmp_path / "network"
    network = timm_folder(name, folder, num_classes=5)
    classifier = oodcli.load_classifier(folder)
    found = recorded(classifier, tmp_path)
    assert found.logits is not None
    assert alike(found.logits, timm_logits(network))
    check_inside(classifier, found)


def test_a_trained_network_of_a_hub(shared_data: Path, tmp_path: Path) -> None:
    """EfficientNet-Lite0 with its trained weights: as timm's pipeline, on photographs of ImageNet's
    classes."""
    timm = pytest.importorskip("timm")
    from PIL import Image
    from safetensors.torch import load_file
    from timm.data import create_transform

    imagenet = shared_data.parent / "imagenet"
    folder = imagenet / "checkpoints" / "efficientnet-lite0"
    if not folder.is_dir():
        pytest.skip("no trained network of a hub in shared/")
    photographs = sorted((imagenet / "id").glob("*.jpg"))[:40]
    config = json.loads((folder / "config.json").read_text("utf-8"))
    network = timm.create_model(config["architecture"]).eval()
    network.load_state_dict(load_file(folder / "model.safetensors"))
    cfg = config["pretrained_cfg"]
    size, share = tuple(cfg["input_size"]), cfg["crop_pct"]
    rest = {key: cfg[key] for key in ("interpolation", "mean", "std")}
    transform = create_transform(size, is_training=False, crop_pct=share, **rest)
    with torch.no_grad():
        images = [transform(Image.open(path).convert("RGB")) for path in photographs]
        theirs = network(torch.stack(images))
    listed = tmp_path / "photographs.txt"
    listed.write_text("\n".join(map(str, photographs)), encoding="utf-8")
    ours = oodcli.record(oodcli.load_classifier(folder, exif="keep"), listed, {"logits"}).logits
    assert ours is not None
    assert alike(ours, theirs)
    truth = torch.tensor([int(path.name.split("_")[0]) for path in photographs])
    assert float((ours.argmax(1) == truth).float().mean()) > 0.75
