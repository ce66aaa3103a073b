"""Agreement with an independent implementation on real images, where the shared data lie."""

from __future__ import annotations

import csv
import math

import pytest
from commands import oodcli

from oodcli.files.scores import read_scores
from oodcli.metrics import auroc, tnr95

SETS = ("textures", "scenes", "notmnist", "fashion-mnist", "imagenet-samples")
CHECKPOINT = "checkpoints/resnet20-12fca82f.th"


@pytest.fixture(scope="module")
def scored(shared_data, tmp_path_factory):
    """Scores files by set; ODIN's two extra passes are made on fewer sets, for time."""
    folder = tmp_path_factory.mktemp("resnet20")
    checkpoint = shared_data / CHECKPOINT
    steps = (
        ("invert", checkpoint, "--per-class", 10, "-o", folder / "v.h5"),
        ("extract", checkpoint, folder / "v.h5", "-o", folder / "v.features.h5"),
        ("fit", folder / "v.features.h5", "-d", "c2ir", "-d", "c2ir-z", "-o", folder),
    )
    for words in steps:
        result = oodcli(*words)
        assert result.status == 0, result.err
    fitted = [
        word for name in ("c2ir", "c2ir-z") for word in ("-d", folder / f"{name}.safetensors")
    ]
    found = {}
    for name in ("cifar10-test", *SETS):
        output = folder / f"{name}.csv"
        images = shared_data / f"{name}.npz"
        result = oodcli("score", checkpoint, images, "-d", "all", *fitted, "-o", output)
        assert result.status == 0, result.err
        found[name] = read_scores(output)
    return found


@pytest.fixture(scope="module")
def reference(shared_data):
    with (shared_data.parent / "reference" / "resnet20.csv").open() as stream:
        return {row["detector"]: row for row in csv.DictReader(stream)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["msp", "energy"])
def test_metrics_agree(scored, reference, name):
    inside = scored["cifar10-test"].detectors[name]
    for set_ in SETS:
        outside = scored[set_].detectors[name]
        expected = float(reference[name][f"auroc {set_}"])
        assert 100 * auroc(inside, outside) == pytest.approx(expected, abs=0.02)
        expected = float(reference[name][f"tnr95 {set_}"])
        assert 100 * tnr95(inside, outside) == pytest.approx(expected, abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tolerance"), [("msp", 1e-3), ("energy", 1e-4)])
@pytest.mark.parametrize("set_", ["cifar10-test", "textures", "notmnist"])
def test_scores_agree(shared_data, scored, name, tolerance, set_):
    path = shared_data.parent / "reference" / f"resnet20-{set_}.csv"
    with path.open() as stream:
        expected = [float(row[name]) for row in csv.DictReader(stream)]
    found = scored[set_].detectors[name][: len(expected)].tolist()
    assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.slow
def test_virtual_images_alone_beat_the_output(scored):
    """c2ir-z on ten virtual images a class, above msp, energy and odin on the mean AUROC."""
    inside = scored["cifar10-test"]
    mean = {
        name: sum(auroc(inside.detectors[name], scored[s].detectors[name]) for s in SETS) / 5
        for name in inside.detectors
    }
    assert mean["c2ir-z"] > max(mean["msp"], mean["energy"], mean["odin"])
    assert 0.90 < mean["odin"] < 0.93
    assert mean["c2ir"] > 0.7
    labels = [label == guess for label, guess in zip(inside.labels, inside.predicted, strict=True)]
    assert math.isclose(sum(labels) / len(labels), 0.9173)
