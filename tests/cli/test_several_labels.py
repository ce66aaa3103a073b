"""Networks with several labels an image: their scores, and what is refused."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Result, fails, oodcli
from PIL import Image
from torch import nn

CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, images):
        return self.fc(images.mean((2, 3)))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each label is one colour of the image."""
    folder = tmp_path_factory.mktemp("labels")
    (folder / "multi.py").write_text(CODE)
    head = nn.Linear(3, 3)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3) * 10)
        head.bias.fill_(-5)
    torch.save({"fc.weight": head.weight, "fc.bias": head.bias}, folder / "multi.pt")
    (folder / "pictures").mkdir()
    for name, colour in (("black", (0, 0, 0)), ("red", (255, 0, 0)), ("white", (255,) * 3)):
        pixels = np.full((8, 8, 3), colour, np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{name}.png")
    return folder


def run(place: Path, command: str, *words: object) -> Result:
    given = ("--arch", f"{place}/multi.py:Net", "--input-size", 8, "--mean", "0,0,0")
    return oodcli(command, place / "multi.pt", *words, *given, "--std", "1,1,1")


def test_the_scores_made_for_them(place: Path) -> None:
    result = run(
        place, "score", place / "pictures", "--multi-label", "-d", "joint-energy", "-d", "mls"
    )
    assert result.status == 0, result.err
    rows = {Path(row["path"]).stem: row for row in csv.DictReader(result.out.splitlines())}
    on, off = math.log1p(math.exp(5)), math.log1p(math.exp(-5))
    for name, count in (("black", 0), ("red", 1), ("white", 3)):
        expected = -(count * on + (3 - count) * off)
        assert float(rows[name]["joint-energy"]) == pytest.approx(expected, rel=1e-5)
        sigmoid = 1 / (1 + math.exp(-5 if count else 5))
        assert float(rows[name]["confidence"]) == pytest.approx(sigmoid, rel=1e-5)


def test_joint_energy_is_the_default(place: Path) -> None:
    result = run(place, "score", place / "pictures", "--multi-label")
    assert result.out.splitlines()[0].split(",")[-2] == "joint-energy"
    assert "joint-energy" in result.err


def test_other_detectors_are_refused(place: Path) -> None:
    for name in ("msp", "energy"):
        result = run(place, "score", place / "pictures", "--multi-label", "-d", name)
        assert result.status == 1
        assert f"{name} is for networks with one label" in result.err
        assert "use mls or joint-energy" in result.err
    every = run(place, "score", place / "pictures", "--multi-label", "-d", "all")
    assert every.out.splitlines()[0] == "path,label,predicted,confidence,mls,joint-energy,error"
    single = run(place, "score", place / "pictures", "-d", "joint-energy")
    assert single.status == 1
    assert "--multi-label" in single.err


def test_a_cache_knows_it(place: Path) -> None:
    cache = place / "f.h5"
    made = run(place, "extract", place / "pictures", "--multi-label", "-o", cache)
    assert made.status == 0, made.err
    fails("msp is for networks with one label", "score", cache, "-d", "msp")
    fails("knn is for networks with one label", "fit", cache, "-d", "knn", "-o", place / "d")
    result = oodcli("score", cache)
    assert result.out.splitlines()[0] == "path,label,predicted,confidence,joint-energy,error"
