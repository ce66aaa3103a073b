"""The pages of docs/detectors and their figures: what a page says to run runs, and what it says
exists exists."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import oodcli
from networks import deconf_state, randomised
from PIL import Image
from torch import nn

from benchmarks import detector_pages
from oodcli import detectors
from oodcli.detectors.hyperparameters import hyperparameters
from oodcli.networks.architectures import build

FOLDER = detector_pages.FIGURES.parent
PAGES = {page.name: page.read_text(encoding="utf-8") for page in FOLDER.glob("*.md")}
FIGURES = json.loads(detector_pages.FIGURES.read_text(encoding="utf-8"))

every_page = pytest.mark.parametrize("page", sorted(PAGES))


@every_page
def test_its_settings_exist(page):
    for name, key in re.findall(r"`-p ([a-z0-9+-]+)\.(\w+)=", PAGES[page]):
        assert key in hyperparameters(detectors.get(name)), f"{name}.{key}"


def test_the_figures_are_of_detectors_and_of_all_sets():
    """A detector may have none, but what is there is whole."""
    for measured in FIGURES["networks"].values():
        for way, row in measured[detector_pages.ROWS].items():
            assert way.split("[")[0] in set(detectors.names()) - set(detector_pages.OWN_NETWORK)
            assert row.keys() >= set(detector_pages.SETS), way


def test_the_figures_hold_no_path():
    assert not re.search(r"/(work|tmp|home|root)\b", json.dumps(FIGURES))


def test_every_detector_is_measured_in_one_way_or_more():
    ways = detector_pages.Ways.of(detectors.names())
    all_ways = [*ways.free, *ways.either, *ways.virtual, *ways.noise, *ways.pool, *ways.ood]
    assert set(all_ways) == set(detectors.names()) - set(detector_pages.OWN_NETWORK)
    assert ways.noise == ["1c-sum"]
    assert ways.virtual == ["c2ir"]
    assert ways.pool == ["c2ir-peak", "duo", "trio"]
    assert ways.ood == ["supervised", "mds-sum"]
    assert "mds-sum" in ways.either


def test_one_detector_can_be_measured_again():
    row = {name: [50.0, 5.0] for name in detector_pages.SETS}
    found = {
        "date": "2030-01-01",
        "machine": "a machine",
        "versions": {"oodcli": "9.0"},
        "commands": ["oodcli score"],
        "images": FIGURES["images"],
        "virtual_images_per_class": FIGURES["virtual_images_per_class"],
        "networks": {
            name: {detector_pages.ROWS: {"knn[real]": row}} for name in detector_pages.NETWORKS
        },
    }
    after = detector_pages.merged(FIGURES, found)
    for network, each in FIGURES["networks"].items():
        before = dict(each[detector_pages.ROWS])
        del before["knn[virtual]"], before["knn[matched]"]
        now = after["networks"][network][detector_pages.ROWS]
        assert now == before | {"knn[real]": row}
    assert after["later"][-1]["detectors"] == ["knn"]
    assert after["later"][-1]["date"] == "2030-01-01"
    assert not any("knn" in each["detectors"] for each in after["later"][:-1])
    assert after["date"] == FIGURES["date"]
    again = detector_pages.merged(after, {**found, "date": "2031-01-01"})
    assert [each["date"] for each in again["later"] if "knn" in each["detectors"]] == ["2031-01-01"]
    with pytest.raises(SystemExit, match="--rows"):
        detector_pages.merged(FIGURES, {**found, "images": {"textures": 3}})


def test_samples_are_spread_over_a_set(tmp_path):
    """The sets are sorted by class, so the first rows would be of few classes."""
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(100) // 10, classes=["x"] * 10)
    np.savez(tmp_path / "b.npz", images=images[:3])
    (tmp_path / "work").mkdir()
    work = detector_pages.Work(tmp_path / "work", tmp_path)
    work.sample("a", 20)
    work.sample("b", 20)
    work.sample("both", 2, of=["a", "b"])
    with np.load(tmp_path / "work" / "a.npz") as found:
        assert found["images"].ravel().tolist() == list(range(0, 100, 5))
        assert np.bincount(found["labels"]).tolist() == [2] * 10
    with np.load(tmp_path / "work" / "b.npz") as found:
        assert found["images"].ravel().tolist() == [0, 1, 2]
    with np.load(tmp_path / "work" / "both.npz") as found:
        assert found["images"].ravel().tolist() == [0, 50, 0, 1]


def test_what_was_run_is_not_run_again(tmp_path, capfd):
    work = detector_pages.Work(tmp_path, tmp_path)
    first = work.run("list", "detectors", "--json")
    assert {each["name"] for each in json.loads(first)} == set(detectors.names())
    assert capfd.readouterr().err.strip() == "oodcli detectors --json"
    assert work.run("list", "detectors", "--json") == first
    assert capfd.readouterr().err == ""
    with pytest.raises(SystemExit, match=r"oodcli detectors --jsn\n(?s:.*)jsn"):
        work.run("list", "detectors", "--jsn")


@pytest.fixture(scope="module")
def workplace(fitted, tmp_path_factory):
    """A folder with all that the examples name, on the demo's network."""
    folder = tmp_path_factory.mktemp("pages")
    for source, target in (("digits.pt", "ckpt.pt"), ("digits.toml", "ckpt.toml")):
        (folder / target).write_bytes((fitted / source).read_bytes())
    for target in ("v.h5", "v.features.h5"):
        (folder / target).write_bytes((fitted / target).read_bytes())
    for name, seed, count in (("photos", 0, 4), ("real", 1, 60), ("ood", 2, 30)):
        (folder / name).mkdir()
        rows = torch.randint(0, 256, (count, 8, 8), generator=torch.Generator().manual_seed(seed))
        for index, row in enumerate(rows.to(torch.uint8)):
            Image.fromarray(row.numpy()).save(folder / name / f"{index:02d}.png")
    grouped = randomised(build("resnet20-cifar", 13)).state_dict()
    slices = torch.tensor([[0, 5], [5, 9], [9, 13]])
    torch.save(grouped | {"group_slices": slices}, folder / "mos.pt")
    backbone = randomised(build("resnet20-cifar", 10))
    backbone.linear = nn.Identity()
    torch.save(deconf_state(backbone, "cosine"), folder / "deconf.pt")
    torch.save(randomised(build("resnet20-cifar", 10)).state_dict(), folder / "multi.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(examples(PAGES["index.md"]))
    return folder


def examples(page):
    """Lines of the ``sh`` blocks of a page."""
    blocks = re.findall(r"```sh\n(.*?)```", page, re.S)
    assert blocks
    return "\n".join(blocks).splitlines()


def run(lines):
    for line in lines:
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "oodcli"
        result = oodcli(*words[1:], "--force")
        assert result.status == 0, (line, result.err)
        output = words[words.index("-o") + 1]
        assert Path(output).exists()


@every_page
def test_its_examples_run(workplace, monkeypatch, page):
    monkeypatch.chdir(workplace)
    run(examples(PAGES[page]))


WITHOUT_A_FILE = {name for name in detectors.names() if f"{name}.md" not in PAGES}
"""mc-dropout needs another network: tests/unit/test_mc_dropout.py runs its commands."""


@pytest.mark.parametrize("name", [*sorted(WITHOUT_A_FILE - {"mc-dropout"}), "c2ir", "duo"])
def test_examples_of_pages_without_a_file_run(workplace, monkeypatch, name):
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    from docs import hooks

    monkeypatch.chdir(workplace)
    run(examples(hooks.detector_page(name)))
