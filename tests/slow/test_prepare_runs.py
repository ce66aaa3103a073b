"""``oodcli prepare``: every situation, its printed commands, kills, a full disk and torchrun."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import oodcli
from faults import NEVER, Process
from team import Teams

from oodcli.files.prepared import read_prepared
from oodcli.inversion.objective import OBJECTIVES

PLAIN = """\
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(128, 10))
"""
"""A network without BatchNorm."""


@pytest.fixture(scope="module")
def start(trained, tmp_path_factory) -> Path:
    """Two checkpoints, digits.pt and plain.pt, and images."""
    folder = tmp_path_factory.mktemp("start")
    for name in ("digits.pt", "digits.toml"):
        shutil.copy(trained / name, folder / name)
    (folder / "nets.py").write_text(PLAIN)
    namespace: dict[str, object] = {}
    exec(PLAIN, namespace)
    torch.save(namespace["net"]().state_dict(), folder / "plain.pt")
    with np.load(trained / "test.npz") as file:
        found = {"images": file["images"][:120], "labels": file["labels"][:120]}
        np.savez(folder / "labelled.npz", **found, classes=file["classes"])
        np.savez(folder / "unlabelled.npz", images=found["images"])
        np.savez(folder / "ten.npz", images=found["images"][:10])
    return folder


@pytest.fixture
def desk(start, tmp_path, monkeypatch) -> Path:
    folder = shutil.copytree(start, tmp_path / "desk")
    monkeypatch.chdir(folder)
    monkeypatch.setitem(OBJECTIVES, "kl", replace(OBJECTIVES["kl"], steps=20))
    return folder


def printed(err: str) -> list[list[str]]:
    return [shlex.split(line[2:])[1:] for line in err.splitlines() if line.startswith("$ ")]


def contents(folder: Path) -> dict[str, bytes]:
    """All files; of prepared.json all but the times."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    about = json.loads(found["prepared.json"])
    for step in about["steps"]:
        del step["seconds"]
    return {**found, "prepared.json": json.dumps(about).encode()}


# ------------------------------------------------------------------------------ every situation

NETWORKS = {
    "digits.pt": ("--per-class", 4, "--no-mirror"),
    "plain.pt": ("--arch", "nets.py:net", "--input-size", 8, "--mean", 0.3, "--std", 0.3),
}
DEFAULTS = {
    ("digits.pt", False, None): "c2ir-z",
    ("digits.pt", True, None): "c2ir-peak",
    ("digits.pt", False, "ten"): "c2ir-peak",
    ("digits.pt", True, "ten"): "c2ir-peak",
    ("digits.pt", False, "unlabelled"): "c2ir-peak",
    ("digits.pt", True, "labelled"): "c2ir-peak",
    ("plain.pt", False, None): "energy",
    ("plain.pt", True, None): "energy",
    ("plain.pt", False, "ten"): "energy",
    ("plain.pt", False, "unlabelled"): "energy",
    ("plain.pt", True, "labelled"): "energy",
}


@pytest.mark.parametrize("situation", DEFAULTS, ids=str)
def test_the_commands_do_the_same_by_hand_and_the_next_one_works(situation, desk, tmp_path):
    network, accuracy, images = situation
    words = ["prepare", network, *NETWORKS[network]]
    reached = {"digits.pt": 0.7, "plain.pt": 0.3}  # on virtual images, at least
    words += ["--accuracy", reached[network]] if accuracy else []
    words += ["--images", f"{images}.npz"] if images else []
    result = oodcli(*words)
    assert result.status == 0, result.err
    folder = Path(f"{network}.oodcli")
    prepared = read_prepared(folder)
    assert prepared.default == DEFAULTS[situation]

    *steps, following = printed(result.err)
    made = contents(folder)
    shutil.move(folder, tmp_path / "away")
    folder.mkdir()
    for command in steps:
        by_hand = oodcli(*command)
        assert by_hand.status == 0, by_hand.err
    shutil.copy(tmp_path / "away" / "prepared.json", folder)
    assert contents(folder) == made

    following[following.index("IMAGES")] = "labelled.npz"
    scored = oodcli(*following)
    assert scored.status == 0, scored.err
    with open("scores.csv", encoding="utf-8", newline="") as file:
        header = next(csv.reader(file))
    assert header[4] == prepared.default
    calibrated = accuracy or images is not None
    assert (f"{prepared.default}.ood" in header) == calibrated == ("--fpr" in following)


# ------------------------------------------------------------------------------------- faults

JOBS = {
    "virtual": "prepare net.pt --per-class 2 --batch-size 3 --device cpu",
    "images": "prepare net.pt --images noise:uniform?n=101 --batch-size 50",
}


@pytest.fixture(scope="module")
def process():
    with Process() as found:
        yield found


@pytest.mark.parametrize("mode", ["kill", "fail"])
@pytest.mark.parametrize("job", JOBS)
def test_it_resumes_after_a_kill_and_a_full_disk(job, mode, small, process, tmp_path):
    words = JOBS[job].split()
    whole = shutil.copytree(small, tmp_path / "whole")
    assert process(words, whole, "warm")["status"] == 0
    expected = contents(whole / "net.pt.oodcli")
    undisturbed = process(words, shutil.copytree(small, tmp_path / "undisturbed"), "fail", NEVER)
    changes = undisturbed["changes"]
    assert changes > 50
    for number in sorted({*range(1, changes, max(1, changes // 8)), changes - 1, changes}):
        folder = shutil.copytree(small, tmp_path / f"{number}")
        first = process(words, folder, mode, number)
        if mode == "fail":
            assert first["status"] in (0, 1), first
            assert "Traceback" not in first["err"], first
        again = process(words, folder, "warm")
        assert again["status"] == 0, (number, first, again)
        found = contents(folder / "net.pt.oodcli")
        assert found == expected, number
        assert not list((folder / "net.pt.oodcli").glob("*.partial/job.json")), number
        shutil.rmtree(folder)


# ----------------------------------------------------------------------------------- torchrun


@pytest.fixture(scope="module")
def team():
    with Teams() as found:
        yield found


def test_the_processes_of_torchrun_share_every_stage(start, team, tmp_path):
    alone, together = (shutil.copytree(start, tmp_path / name) for name in ("alone", "together"))
    words = ("prepare", "digits.pt", "--accuracy", 0.5, "--images", "ten.npz", "--per-class", 2)
    words = (*words, "--steps", 20, "--batch-size", 5, "--device", "cpu")
    [one] = team(1, *words, folder=alone)
    assert one.status == 0, one.err
    two = team(2, *words, folder=together)
    assert [each.status for each in two] == [0, 0], two
    assert contents(together / "digits.pt.oodcli") == contents(alone / "digits.pt.oodcli")
    assert two[1].err == two[1].out == ""
    assert one.err.splitlines()[-1] == two[0].err.splitlines()[-1]
    assert min(len(each.stored) for each in two) > 5  # both invert, both extract

    again = team(2, *words, folder=together)
    assert [each.stored for each in again] == [[], []]
    assert again[0].err.count("is there already") == 7

    shutil.rmtree(together / "digits.pt.oodcli")
    stopped = team(2, *words, folder=together, stop={1: 3})
    assert {each.status for each in stopped} & {130, 1, -15}
    resumed = team(2, *words, folder=together)
    assert [each.status for each in resumed] == [0, 0], resumed
    assert contents(together / "digits.pt.oodcli") == contents(alone / "digits.pt.oodcli")
    assert os.listdir(together / "digits.pt.oodcli") != []
