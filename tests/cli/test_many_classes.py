"""``oodcli prepare`` of a network with many classes."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import oodcli

from oodcli.files.artefact import read_artefact
from oodcli.stages import prepare_plan
from oodcli.stages.verdict import TOO_STRICT

CODE = """import torch
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, stride=2), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 120))
"""
OPTIONS = (
    *("--arch", "net.py:net", "--num-classes", 120, "--input-size", 16),
    *("--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"),
)
IMAGES = 40
ACCURACY = 0.05


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    """A folder with a network of 120 classes, prepared, and images of noise."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "net.py").write_text(CODE, encoding="utf-8")
    namespace: dict[str, object] = {}
    exec(CODE, namespace)
    torch.manual_seed(0)
    network = namespace["net"]()
    for _ in range(30):
        network(torch.randn(32, 3, 16, 16))
    head = network.eval()[-1]
    head.weight.data *= 50
    with torch.no_grad():  # or the same class would be predicted for all images
        head.bias.copy_(-head.weight @ network[:-1](torch.randn(99, 3, 16, 16)).mean(0))
    torch.save(network.state_dict(), folder / "net.pt")
    random = np.random.default_rng(0)
    np.savez(folder / "x.npz", images=random.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(prepare_plan, "PIXELS", IMAGES * 16 * 16)
        plan = oodcli("prepare", "net.pt", *OPTIONS, "--accuracy", ACCURACY, "--dry-run")
        assert plan.status == 0, plan.err
        (folder / "plan").write_text(plan.out + plan.err)
        result = oodcli("prepare", "net.pt", *OPTIONS, "--accuracy", ACCURACY)
    assert result.status == 0, result.err
    (folder / "said").write_text(result.err)
    return folder


def test_a_few_images_of_some_classes(ready):
    said = (ready / "said").read_text()
    for text in (said, (ready / "plan").read_text()):
        assert f"{IMAGES} virtual images in all, of classes spread over all 120; " in text
    assert set(os.listdir(ready / "net.pt.oodcli")) == {
        *("pool.h5", "pool.png", "pool.features.h5", "prepared.json"),
        *("ang++.safetensors", "gen.safetensors"),
        *("energy.safetensors", "msp.safetensors"),
    }
    assert f"{IMAGES} images of {IMAGES} classes; steps: 24" in said
    assert re.search(r"on the 40 virtual images down to (2\.5|5\.0|7\.5)0%", said)


def test_every_class_gets_verdicts(ready, monkeypatch):
    """Most classes have no virtual image."""
    monkeypatch.chdir(ready)
    result = oodcli("score", "net.pt", "x.npz", *OPTIONS, "--fpr", 0.1, "-o", "x.csv")
    assert result.status == 0, result.err
    with open("x.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["predicted"] for row in rows}) > 5
    assert {row["ang++.ood"] for row in rows} <= {"0", "1"}


def test_no_sensitivities_no_c2ir(ready, monkeypatch, tmp_path):
    monkeypatch.chdir(ready)
    cache = tmp_path / "v.h5"
    words = ("extract", "net.pt", "net.pt.oodcli/pool.h5", *OPTIONS, "-o", cache, "--json")
    result = oodcli(*words)
    assert result.status == 0, result.err
    recorded = json.loads(result.out)["recorded"]
    assert "layers.gradient" in recorded
    assert "layers.sensitivity" not in recorded
    refused = oodcli("fit", cache, "-d", "c2ir", "-o", tmp_path / "d")
    assert refused.status == 1
    assert "made without --no-sensitivity" in refused.err


def test_c2ir_z_fitted_by_hand_speaks_of_every_class(ready, monkeypatch, tmp_path):
    """Its rows are of a third of the classes; the statistics are those of all."""
    monkeypatch.chdir(ready)
    cache = tmp_path / "v.h5"
    for words in (
        ("extract", "net.pt", "net.pt.oodcli/pool.h5", *OPTIONS, "--for", "c2ir-z", "-o", cache),
        ("fit", cache, "-d", "c2ir-z", "-o", tmp_path / "d"),
    ):
        result = oodcli(*words)
        assert result.status == 0, result.err
    artefact = read_artefact(tmp_path / "d" / "c2ir-z.safetensors")
    assert artefact.without_rows == ()
    assert artefact.detector.every_class


@pytest.mark.parametrize("count", [30, 120])
def test_real_images_calibrate_the_strongest(ready, monkeypatch, tmp_path, count):
    """All of 30; of 120, four fifths of which c2ir-z is fitted on."""
    monkeypatch.chdir(ready)
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", images=images)
    words = ("prepare", "net.pt", *OPTIONS, "--images", tmp_path / "real.npz", "-o", tmp_path / "d")
    result = oodcli(*words, "--accuracy", ACCURACY)
    assert result.status == 0, result.err
    assert f"score uses 1c-sum (calibrated on {count} real images" in result.err
    assert f"--accuracy is not used: the {count} real images are enough" in result.err
    rows = {
        path.stem: read_artefact(path).calibrations["plain"].real
        for path in (tmp_path / "d").glob("*.safetensors")
    }
    fitted = {"c2ir-z": count // 5} if count >= 100 else {}
    assert rows == {**dict.fromkeys(("1c-sum", "ang++", "gen", "energy", "msp"), count), **fitted}


def test_one_image_a_class_is_enough(ready, monkeypatch):
    monkeypatch.chdir(ready)
    words = ("prepare", "net.pt", *OPTIONS, "--accuracy", ACCURACY, "--per-class", 1, "--dry-run")
    result = oodcli(*words)
    assert result.status == 0, result.err
    assert "--per-class 1 " in result.out


def test_a_mean_of_all_images_gives_no_threshold_on_virtual_ones(ready, monkeypatch, tmp_path):
    monkeypatch.chdir(ready)
    cache, pool = tmp_path / "v.h5", tmp_path / "p.h5"
    extract = ("extract", "net.pt", "net.pt.oodcli/pool.h5", *OPTIONS, "--for", "c2ir-z")
    fit = ("fit", cache, "-d", "c2ir-z", "--calibrate", pool, "-o", tmp_path)
    artefact = tmp_path / "c2ir-z.safetensors"
    score = ("score", "net.pt", "x.npz", *OPTIONS, "-d", artefact, "--fpr", 0.1)
    for words in ((*extract, "-o", cache), (*extract, "--match-accuracy", ACCURACY, "-o", pool)):
        assert oodcli(*words).status == 0
    for words in (fit, score):
        result = oodcli(*words)
        assert result.status == 0, result.err
        assert f"c2ir-z: {TOO_STRICT}" in result.err
