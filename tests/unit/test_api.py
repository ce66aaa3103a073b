"""The few functions for notebooks."""

from __future__ import annotations

import csv
import doctest
import io
import logging
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from commands import oodcli as run
from PIL import Image

import oodcli
from oodcli import api
from oodcli.errors import CheckpointError, DetectorError, FileError, ImagesError, OodcliError


@pytest.fixture
def classifier(trained):
    return oodcli.load_classifier(trained / "digits.pt")


@pytest.fixture
def arrays(trained):
    with np.load(trained / "test.npz") as file:
        return file["images"], file["labels"]


@pytest.mark.slow
def test_to_import_it_is_light():
    code = (
        "import gc, sys, oodcli\n"
        "assert set(oodcli.__all__) <= set(dir(oodcli))\n"
        "heavy = {'torch', 'numpy', 'typer', 'h5py', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "oodcli.load_classifier\n"
        "assert 'torch' in sys.modules\n"
        "rare = {'triton', 'jinja2', 'matplotlib', 'sklearn', 'timm', 'transformers', 'rich'}\n"
        "assert not rare & set(sys.modules), rare & set(sys.modules)\n"
        "assert gc.isenabled() and gc.get_freeze_count() == 0, 'only the command line may'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        _ = oodcli.load


def test_the_example_of_the_module(trained, monkeypatch):
    monkeypatch.chdir(trained)
    result = doctest.testmod(api)
    assert (result.failed, result.attempted) == (0, 6)


def test_scores_are_those_of_the_command_line(fitted, classifier):
    names = ("msp", "energy", "odin", "1c-sum", str(fitted / "fitted" / "c2ir-z.safetensors"))
    words = [word for name in names for word in ("-d", name)]
    images = str(fitted / "test.npz")
    printed = run("score", fitted / "digits.pt", images, *words, "--batch-size", api.BATCH_SIZE)
    assert printed.status == 0, printed.err
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    chosen = [oodcli.load_detector(name, classifier) for name in names]
    features = oodcli.record(classifier, images, chosen)
    assert len(features) == len(rows)
    for detector in chosen:
        expected = torch.tensor([float(row[detector.name]) for row in rows], dtype=torch.float64)
        scores = detector.score(features)
        assert scores.dtype == torch.float64
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-9)


def test_arrays_and_inputs_are_like_the_file(trained, classifier, arrays):
    images, labels = arrays
    expected = oodcli.record(classifier, trained / "test.npz")
    assert expected.label.tolist() == labels.tolist()
    for pixels in (images, images.reshape(-1, 8, 8, 1), torch.from_numpy(images)):
        found = oodcli.record(classifier, pixels)
        assert (found.label == -1).all()
        for name, rows in expected.rows().items():
            assert name == "label" or torch.equal(found.rows()[name], rows), name
    inputs = torch.from_numpy(images.reshape(-1, 1, 8, 8)).float().div(255)
    inputs = classifier.preprocessing.normalise(inputs)
    for given in (inputs, inputs.double(), inputs.requires_grad_()):
        found = oodcli.record(classifier, given)
        assert found.rows().keys() == expected.rows().keys()
        assert not found.logits.requires_grad
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.embedding, expected.embedding, rtol=1e-5, atol=1e-5)


def test_pixels_of_any_size_are_prepared(trained, classifier, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 4), np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    found = oodcli.record(classifier, pixels, "logits")
    expected = oodcli.record(classifier, tmp_path, "logits")
    assert torch.equal(found.logits, expected.logits)


def test_what_is_recorded(classifier):
    images = "noise:uniform?n=3"
    assert oodcli.record(classifier, images, ["logits"]).recorded >= {"logits", "head"}
    assert oodcli.record(classifier, images, []).embedding is None
    both = oodcli.record(classifier, images, [oodcli.load_detector("energy"), "layers.gradient"])
    assert {"logits", "layers.gradient"} <= both.recorded
    odin = oodcli.load_detector("odin", epsilon=0.01)
    found = oodcli.record(classifier, images, odin)
    assert found.made_with["odin"].epsilon == 0.01
    assert odin.score(found).shape == (3,)


def test_a_row_that_cannot_be_read_is_left_out(classifier, tmp_path, caplog):
    Image.new("L", (8, 8)).save(tmp_path / "b.png")
    (tmp_path / "a.png").write_bytes(b"x")
    with caplog.at_level(logging.WARNING, "oodcli"):
        assert len(oodcli.record(classifier, tmp_path)) == 1
    assert "left out 1 of 2 images" in caplog.text
    assert "a.png" in caplog.text
    (tmp_path / "b.png").unlink()
    with pytest.raises(ImagesError, match="not one of 1 images could be read"):
        oodcli.record(classifier, tmp_path)


def test_what_is_said_of_a_checkpoint_wins(trained):
    found = oodcli.load_classifier(
        str(trained / "digits.pt"), mean=[0.1], std=[0.3], class_names=[*"abcdefghij"]
    )
    assert found.preprocessing.mean == (0.1,)
    assert found.class_names[1] == "b"


def test_it_runs_where_the_commands_run(trained):
    where = "cuda" if torch.cuda.is_available() else "cpu"
    assert oodcli.load_classifier(trained / "digits.pt").device.type == where
    with pytest.raises(OodcliError, match="--device nonsense cannot be used"):
        oodcli.load_classifier(trained / "digits.pt", device="nonsense")


def test_a_detector_needs_what_it_needs(fitted, classifier, tmp_path):
    artefact = fitted / "fitted" / "c2ir-z.safetensors"
    assert oodcli.load_detector("energy", T=2).T == 2.0
    assert oodcli.load_detector(artefact).name == "c2ir-z"
    state = torch.load(fitted / "digits.pt", weights_only=True)
    torch.save({name: value * 1.01 for name, value in state.items()}, tmp_path / "other.pt")
    another = oodcli.load_classifier(tmp_path / "other.pt", card=fitted / "digits.toml")
    prepared = oodcli.load_classifier(fitted / "digits.pt", mean=[0.1])
    for error, sentence, words, options in (
        (DetectorError, "no detector is called 'magic'", ("magic",), {}),
        (DetectorError, "no detector is called 'all'", ("all",), {}),
        (DetectorError, "knn must be fitted first", ("knn", classifier), {}),
        (DetectorError, "1c-sum must be fitted first", ("1c-sum",), {}),
        (DetectorError, "energy has no hyper-parameter 'Q'", ("energy",), {"Q": 1}),
        (DetectorError, "energy.T=-1 must be positive", ("energy",), {"T": -1}),
        (DetectorError, "is fitted already", (artefact,), {"weights": "uniform"}),
        (FileError, "none.safetensors does not exist", ("none.safetensors",), {}),
        (FileError, "was fitted for the checkpoint", (artefact, another), {}),
        (FileError, "prepared with mean", (artefact, prepared), {}),
        (FileError, "damaged or not a safetensors file", (fitted / "digits.toml",), {}),
    ):
        with pytest.raises(error, match=sentence) as caught:
            oodcli.load_detector(*words, **options)
        assert isinstance(caught.value, oodcli.OodcliError)
    with pytest.raises(CheckpointError, match=r"none\.pt does not exist"):
        oodcli.load_classifier("none.pt")


def test_faults_of_what_is_recorded(classifier):
    planes = np.zeros((2, 3, 8, 8), np.uint8)
    for error, sentence, images, needs in (
        (DetectorError, "'energy' cannot be recorded: expected detectors", "noise:blob", "energy"),
        (DetectorError, "cannot give deconf.h", "noise:blob", ["deconf.h"]),
        (ImagesError, "does not exist", "nowhere", None),
        (ImagesError, r"uint8 \(2, 3, 8, 8\): expected pixels", planes, None),
        (ImagesError, "float32", np.zeros((2, 8, 8), np.float32), None),
        (ImagesError, r"\(0, 8, 8\)", np.zeros((0, 8, 8), np.uint8), None),
        (ImagesError, r"inputs of this network, \(N, 1, 8, 8\)", torch.zeros(2, 3, 8, 8), None),
        (ImagesError, r"inputs of this network", torch.zeros(0, 1, 8, 8), None),
    ):
        with pytest.raises(error, match=sentence):
            oodcli.record(classifier, images, needs)
    with pytest.raises(oodcli.OodcliError, match="expected float32 or bfloat16"):
        oodcli.record(classifier, "noise:blob", precision="int8")


@pytest.mark.parametrize("capable", [True, False])
def test_bfloat16_is_chosen_where_it_is_allowed_and_fast(trained, tmp_path, monkeypatch, capable):
    monkeypatch.setattr("oodcli.stages.model.multiplies_bfloat16", lambda _: capable)
    for precision, expected in (
        (None, "float32"),
        ("auto", "bfloat16" if capable else "float32"),
        ("bfloat16", "bfloat16"),
    ):
        path = tmp_path / f"{precision}.h5"
        images = "noise:blob?n=3"
        api.extract(trained / "digits.pt", images, path, record=["logits"], precision=precision)
        with h5py.File(path) as file:
            assert file.attrs["precision"] == expected


def test_a_detector_says_what_was_not_recorded(classifier):
    features = oodcli.record(classifier, "noise:blob?n=2", "logits")
    with pytest.raises(oodcli.OodcliError, match=r"odin needs odin\.logits"):
        oodcli.load_detector("odin").score(features)
