"""Scores say how they were made, beside them; what does not go together is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from commands import oodcli
from optional import SUFFIXES

NOISE = "noise:uniform?n=30"


@pytest.fixture
def folder(fitted, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("digits.pt", "digits.toml", "v.features.h5"):
        shutil.copy(fitted / name, tmp_path)
    return tmp_path


def score(*words: object) -> None:
    result = oodcli("score", *words)
    assert result.status == 0, result.err


def refused(*words: object) -> str:
    result = oodcli(*words)
    assert result.status == 1, result.err
    assert "Traceback" not in result.err
    return result.err


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_scores_say_how_they_were_made(fitted, folder, suffix):
    artefact = fitted / "fitted" / "c2ir-z.safetensors"
    score(
        "digits.pt", NOISE, "-d", "energy", "-p", "energy.T=2", "-d", artefact, "-o", f"s.{suffix}"
    )
    made = json.loads((folder / f"s.{suffix}.json").read_text())
    assert made["command"].startswith("oodcli score digits.pt ")
    assert made["detectors"]["energy"] == "T=2.0"
    assert "fitted on virtual, state " in made["detectors"]["c2ir-z"]
    assert made["rows"] == 30
    page = oodcli("inspect", f"s.{suffix}").out
    for words in ("made by", "oodcli score digits.pt", "seed 0, float32 on cpu", NOISE, "sha256"):
        assert words in page
    found = json.loads(oodcli("inspect", f"s.{suffix}", "--json").out)["made"]
    assert found == made
    result = oodcli("inspect", "--verify", f"s.{suffix}", "digits.pt")
    assert result.status == 0, result.err
    assert "scores_sha256" in result.out
    assert "from which the file was made" in result.out


def test_scores_of_a_cache_say_who_extracted_it(folder):
    score("v.features.h5", "-d", "msp", "-o", "s.csv")
    made = json.loads(Path("s.csv.json").read_text())
    assert made["source"] == "v.features.h5"
    assert made["extracted_by"].startswith("oodcli extract ")


def test_edited_scores_are_noticed(folder):
    score("digits.pt", NOISE, "-d", "msp", "-o", "s.csv")
    with open("s.csv", "a") as file:
        file.write("x.png,,0,0.5,-0.5,\n")
    assert "scores_sha256 is " in refused("inspect", "--verify", "s.csv")
    os.remove("s.csv.json")
    assert "not checked" in oodcli("inspect", "--verify", "s.csv").out
    assert "its metadata file is missing" in oodcli("inspect", "s.csv").out
    assert "does not name its checkpoint" in refused("inspect", "--verify", "s.csv", "digits.pt")


def test_evaluate_refuses_a_mixture(folder):
    blobs = "noise:blob?n=30"
    score("digits.pt", NOISE, "-d", "msp", "-d", "odin", "-o", "id.csv")
    score("digits.pt", blobs, "-d", "msp", "-d", "odin", "--batch-size", 7, "-o", "far.csv")
    evaluate = ("evaluate", "--id", "id.csv", "--resamples", 0, "--ood", "far=far.csv")
    assert oodcli(*evaluate).status == 0

    def differing(change: dict[str, object]) -> str:
        made = json.loads(Path("far.csv.json").read_text())
        Path("far.csv.json").write_text(json.dumps(made | change))
        words = refused(*evaluate)
        Path("far.csv.json").write_text(json.dumps(made))
        return words

    words = differing({"checkpoint_sha256": "another"})
    assert "id.csv was scored with the checkpoint " in words
    assert "far.csv with another: score both alike" in words
    preprocessing = json.loads(Path("id.csv.json").read_text())["preprocessing"]
    words = differing({"preprocessing": preprocessing | {"input_size": [9, 9]}})
    assert "with the preprocessing " in words
    assert "far.csv with T=9" in differing({"detectors": {"odin": "T=9"}})
    assert oodcli(*evaluate).status == 0
    os.remove("far.csv.json")  # scores of somebody else's
    assert oodcli(*evaluate).status == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "does not describe s.csv"),
        ("[" * 100_000, "does not describe s.csv"),
        ('{"format": "oodcli-scores", "version": 2}', "has format version 2"),
        ('{"format": "oodcli-scores", "version": 1}', "is damaged"),
        (" " * (1 << 24) + "{}", "does not describe s.csv"),
    ],
)
def test_a_damaged_file_beside_is_refused(folder, text, words):
    score("digits.pt", NOISE, "-d", "msp", "-o", "s.csv")
    Path("s.csv.json").write_text(text)
    assert words in refused("inspect", "s.csv")


@pytest.mark.parametrize(
    "change",
    [
        *({name: None} for name in ("command", "seed", "preprocessing", "arch", "verdicts")),
        {"preprocessing": {"input_size": ["a"]}},
        {"preprocessing": {"input_size": [8, 8], "mean": ["x"], "std": [1], "resize": 1}},
        {"detectors": []},
        {"extracted_by": 3},
    ],
)
def test_values_of_the_wrong_kind_are_refused(folder, change):
    score("digits.pt", NOISE, "-d", "msp", "-o", "s.csv")
    made = json.loads(Path("s.csv.json").read_text())
    Path("s.csv.json").write_text(json.dumps(made | change))
    assert f"s.csv.json is damaged ({next(iter(change))})" in refused("inspect", "s.csv")


def test_a_file_of_somebody_elses_is_not_written_over(folder):
    Path("s.csv.json").write_text("my notes")
    assert "s.csv.json does not describe s.csv: move it away" in refused(
        "score", "digits.pt", NOISE, "-d", "msp", "-o", "s.csv", "--force"
    )
    assert Path("s.csv.json").read_text() == "my notes"


def test_it_is_written_over_with_the_scores(folder):
    score("digits.pt", NOISE, "-d", "msp", "-o", "s.csv")
    first = Path("s.csv.json").read_text()
    os.remove("s.csv")
    score("digits.pt", NOISE, "-d", "energy", "-o", "s.csv")
    assert Path("s.csv.json").read_text() != first
    assert "says how s.csv was made" in refused("inspect", "s.csv.json")
