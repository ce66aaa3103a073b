"""``benchmarks.fit_free``: detectors that need no image on a small copy of OpenOOD's layout."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import oodcli
from PIL import Image

from benchmarks import fit_free
from benchmarks.papers import page
from benchmarks.papers.config import read_config
from oodcli.metrics import auroc

RESEARCH = page.RESEARCH
ROOT = RESEARCH.parents[1]
OPENOOD = page.HERE / "openood.toml"
SETS = ("ssb_hard", "ninco", "inaturalist", "texture", "openimage_o")


@pytest.fixture(scope="module")
def data(trained, tmp_path_factory) -> Path:
    """OpenOOD's folders with digits as ImageNet, and a network and a set that its lists leave out
    images of."""
    folder = tmp_path_factory.mktemp("openood")
    large, classic = folder / "images_largescale", folder / "images_classic"
    lists = folder / "benchmark_imglist" / "imagenet"
    lists.mkdir(parents=True)
    for kind in ("pt", "toml"):
        shutil.copy(trained / f"digits.{kind}", folder)
    with np.load(trained / "test.npz") as test:
        images, labels = test["images"][:60], test["labels"][:60]
    _save(large / "imagenet_1k" / "val", images)
    rows = [f"imagenet_1k/val/{row:02}.png {label}" for row, label in enumerate(labels)]
    (lists / "test_imagenet.txt").write_text("\n".join(rows[:40]) + "\n")
    random = np.random.default_rng(0)
    for name in SETS:
        noise = random.integers(0, 256, (20, 8, 8)).astype(np.uint8)
        _save((classic if name == "texture" else large) / name, noise)
    (lists / "test_ninco.txt").write_text("".join(f"ninco/{row:02}.png -1\n" for row in range(12)))
    _save(large / "species_sub", noise)
    return folder


def _save(folder: Path, images: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for row, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(folder / f"{row:02}.png")


def configured(folder: Path, text: str = "") -> str:
    """openood.toml with the digits' network instead of its own."""
    config = folder / "c.toml"
    given = OPENOOD.read_text("utf-8").partition("[networks")[0]
    given = given.replace("noise = 500", "noise = 30").replace("= 1000", "= 10")
    network = '[networks.digits]\ncheckpoint = "digits.pt"\n'
    config.write_text(f"{given}{network}{text}", encoding="utf-8")
    return str(config)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    words = [configured(folder), str(data), "--work", str(folder / "work"), "--machine", "a test"]
    assert fit_free.main(words) == 0
    return folder


def test_every_detector_that_needs_no_image_has_figures_on_every_set(run, data):
    lines = fit_free.read_lines(run / "work" / "fit-free.csv")
    cells = {(x.detector, x.set, x.metric): x for x in lines}
    expected = oodcli("detectors", "--json").out
    found = {line.detector for line in lines if line.detector}
    assert {"msp", "energy", "gen", "1c-sum", "odin", "peak-energy"} <= found
    assert all(f'"{name}"' in expected for name in found)
    assert "knn" not in found
    for name in found:
        for on in ("ssb-hard", "ninco", "textures", "near", "far", "mean"):
            line = cells[name, on, "auroc"]
            assert line.low <= line.value <= line.high
        far = [cells[name, on, "auroc"].value for on in ("inaturalist", "textures", "openimage-o")]
        assert cells[name, "far", "auroc"].value == pytest.approx(np.mean(far), abs=0.02)
    images = {x.set: x.value for x in lines if x.metric == "images"}
    assert images["ID"] == 40
    assert (images["ninco"], images["ssb-hard"]) == (12, 20)
    assert cells["", "ID", "accuracy"].value > 90


def test_figures_are_those_of_score(run, data, tmp_path):
    for name in ("imagenet_1k/val", "texture"):
        root = "images_classic" if name == "texture" else "images_largescale"
        words = ("score", data / "digits.pt", data / root / name, "-d", "energy")
        assert oodcli(*words, "-o", tmp_path / f"{Path(name).name}.csv").status == 0
    inside, outside = (
        [float(row["energy"]) for row in csv.DictReader(path.read_text("utf-8").splitlines())]
        for path in (tmp_path / "val.csv", tmp_path / "texture.csv")
    )
    lines = fit_free.read_lines(run / "work" / "fit-free.csv")
    (found,) = [
        x for x in lines if (x.detector, x.set, x.metric) == ("energy", "textures", "auroc")
    ]
    assert found.value == pytest.approx(100 * auroc(inside[:40], outside), abs=0.006)


def test_a_second_run_repeats_nothing(run, data, capsys):
    before = (run / "work" / "fit-free.md").read_text("utf-8")
    words = [str(run / "c.toml"), str(data), "--work", str(run / "work"), "--machine", "a test"]
    assert fit_free.main([*words, "-o", str(run / "again")]) == 0
    assert (run / "again" / "fit-free.md").read_text("utf-8") == before
    said = capsys.readouterr()
    assert "oodcli" not in said.err
    assert "left out: images_largescale/species_sub" in said.err
    assert "/ninco," not in said.err


def test_the_page_shows_groups_and_published_figures(run):
    text = (run / "work" / "fit-free.md").read_text("utf-8")
    assert "| detector | digits, near | digits, far | OpenOOD's ResNet-50" in text
    (row,) = re.findall(r"^\| `msp` \|.*$", text, re.M)
    assert row.endswith("| 76.02 / 85.23 |")
    assert re.search(r"\| \d+\.\d \(\d+\.\d–\d+\.\d\) / \d+ \(\d+–\d+\) \|", row)
    assert "40 ID images" in text


def test_a_missing_folder_is_named_with_the_layout(run, data, tmp_path, capsys):
    moved = tmp_path / "data"
    shutil.copytree(data, moved)
    shutil.rmtree(moved / "images_largescale" / "ninco")
    words = [str(run / "c.toml"), str(moved), "--work", str(tmp_path / "work")]
    with pytest.raises(SystemExit, match="2"):
        fit_free.main(words)
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{moved} has no ninco: expected in it digits.pt, and the images" in said
    assert "openimage_o, which may be in images_largescale or images_classic" in said
    assert not (tmp_path / "work" / "fit-free.csv").exists()


def test_a_detector_is_measured_on_every_third_image(run, data, tmp_path):
    config = Path(configured(tmp_path))
    few = 'without = ["pro", "mc-dropout"]\nevery = { odin = 3 }\n'
    config.write_text(few + config.read_text("utf-8"), encoding="utf-8")
    assert fit_free.main([str(config), str(data), "--work", str(tmp_path / "work")]) == 0
    work = tmp_path / "work"
    all_rows, some = (
        {
            name: list(csv.DictReader((folder / f"{name}.csv").read_text("utf-8").splitlines()))
            for name in ("test", "ninco")
        }
        for folder in (run / "work" / "digits" / "scores", work / "digits" / "scores-every-3")
    )
    for name, rows in some.items():
        expected = {row["path"]: row["odin"] for row in all_rows[name][::3]}
        assert {row["path"]: row["odin"] for row in rows} == expected
        assert "energy" not in rows[0]
    before, found = (
        {(x.detector, x.set, x.metric): x for x in fit_free.read_lines(folder / "fit-free.csv")}
        for folder in (run / "work", work)
    )
    inside, outside = ([float(row["odin"]) for row in some[name]] for name in ("test", "ninco"))
    area = 100 * auroc(inside, outside)
    assert found["odin", "ninco", "auroc"].value == pytest.approx(area, abs=0.006)
    rest = {key: line for key, line in before.items() if key[0] not in ("odin", "pro")}
    assert {key: line for key, line in found.items() if key[0] != "odin"} == rest
    assert "* `odin`: one image of 3\n" in (work / "fit-free.md").read_text("utf-8")


def test_prepared_detectors_are_among_them(data, tmp_path):
    config = Path(configured(tmp_path, "accuracy = 0.98\n"))
    text = re.sub(r"^(inat|openi|ssb).*\n", "", config.read_text("utf-8"), flags=re.M)
    config.write_text(f'without = ["odin", "pro", "mc-dropout"]\n{text}', encoding="utf-8")
    assert fit_free.main([str(config), str(data), "--work", str(tmp_path / "work")]) == 0
    found = {line.detector for line in fit_free.read_lines(tmp_path / "work" / "fit-free.csv")}
    assert {"c2ir-peak", "c2ir-z", "msp"} <= found
    assert "odin" not in found


def test_an_unknown_network_is_refused(run, data, capsys):
    words = [str(run / "c.toml"), str(data), "--work", str(run / "work"), "--network", "letters"]
    with pytest.raises(SystemExit, match="2"):
        fit_free.main(words)
    assert "has no network 'letters'" in capsys.readouterr().err


def test_both_configurations_are_read():
    config = read_config(OPENOOD, ())
    (network,) = config.networks.values()
    groups = [each.group for each in network.sets.values()]
    assert (groups.count("near"), groups.count("far")) == (2, 3)
    assert set(SETS) == {each.images for each in network.sets.values()}
    assert len(read_config(page.HERE / "imagenet.toml", ()).networks) == 3


def test_the_page_of_the_docs_is_what_its_figures_give():
    text = (RESEARCH / "fit-free.md").read_text("utf-8")
    measured = re.search(r"^Measured on (.*):$", text, re.M)[1]
    name = re.search(r"^python -m benchmarks.fit_free (\S+) DATA", text, re.M)[1]
    config = read_config(ROOT / name, ())
    lines = fit_free.read_lines(RESEARCH / "fit-free.csv")
    assert fit_free.page(lines, measured, name, config.every) == text
    assert {line.network for line in lines} == set(config.networks)
    assert config.every.keys() <= {line.detector for line in lines}
