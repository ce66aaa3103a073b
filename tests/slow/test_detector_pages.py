"""docs/detectors: every detector has a page, and its facts, figures and commands are right."""

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

PAGES = {page.name: page.read_text(encoding="utf-8") for page in detector_pages.PAGES.glob("*.md")}
FIGURES = detector_pages.read_figures()
WHERE = detector_pages.pages()

every_page = pytest.mark.parametrize("page", sorted(PAGES))
every_detector = pytest.mark.parametrize("name", detectors.names())


def section(text: str, title: str) -> str:
    """What stands below a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", text, re.M | re.S)
    return found[1] if found else ""


@every_page
def test_its_tables_are_what_the_figures_and_the_classes_give(page):
    assert detector_pages.written(PAGES[page], FIGURES) == PAGES[page], (
        "python -m benchmarks.detector_pages write"
    )


def test_no_page_is_written_anew_by_a_check(capsys):
    assert detector_pages.main(["write", "--check"]) == 0
    assert capsys.readouterr().out == ""


def test_a_changed_figure_is_seen():
    changed = json.loads(json.dumps(FIGURES))
    changed["networks"]["ResNet-20"]["auroc and tnr95"]["vim[real]"]["scenes"][0] += 0.2
    stale = [name for name, text in PAGES.items() if detector_pages.written(text, changed) != text]
    assert stale == ["vim.md"] or sorted(stale) == ["index.md", "vim.md"]


@every_detector
def test_it_has_a_page_and_a_row_in_the_index(name):
    assert f"| [`{name}`]({WHERE[name].name}) |" in PAGES["index.md"]


@every_page
def test_its_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        assert (detector_pages.PAGES / target).is_file(), target


def test_every_page_is_some_detectors():
    assert {path.name for path in WHERE.values()} | {"index.md"} == set(PAGES)


@every_detector
def test_hyperparameters_are_those_of_the_class(name):
    """In the table: name and default, and none that there is not. A meaning may be missing."""
    text = section(PAGES[WHERE[name].name], "Hyper-parameters")
    found = dict(re.findall(rf"^\| `{re.escape(name)}\.(\w+)` \| (\S+) \|", text, re.M))
    expected = {
        key: str(default).lower() if default is None or isinstance(default, bool) else str(default)
        for key, (_, default) in hyperparameters(detectors.get(name)).items()
    }
    assert found == expected
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    family = [other for other, page in WHERE.items() if page == WHERE[name]]
    total = sum(len(hyperparameters(detectors.get(other))) for other in family)
    assert len(rows) == total
    assert total or text.startswith("\nNone.")


def test_the_figures_are_of_detectors_and_of_all_sets():
    for measured in FIGURES["networks"].values():
        for way, row in measured["auroc and tnr95"].items():
            assert way.split("[")[0] in set(detectors.names()) - set(detector_pages.OWN_NETWORK)
            assert row.keys() >= set(detector_pages.SETS), way


def test_a_detector_without_figures_is_not_measured():
    without = json.loads(json.dumps(FIGURES))
    for measured in without["networks"].values():
        found = measured["auroc and tnr95"]
        for way in [each for each in found if each.split("[")[0] == "vim"]:
            del found[way]
    page = detector_pages.written(PAGES["vim.md"], without)
    assert re.search(r"^\| `vim` \| not measured \|( *\|)+$", page, re.M)
    index = detector_pages.written(PAGES["index.md"], without)
    assert re.search(r"^\| \[`vim`\]\(vim\.md\) .* not measured \| not measured \|$", index, re.M)


def test_a_page_is_made_for_a_detector_without_one(tmp_path, monkeypatch, capsys):
    for name, text in PAGES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "figures.json").write_text(json.dumps(FIGURES))
    (tmp_path / "vim.md").unlink()
    monkeypatch.setattr(detector_pages, "PAGES", tmp_path)
    assert detector_pages.main(["write", "--check"]) == 1
    assert capsys.readouterr().out == "vim.md: is missing\n"
    assert not (tmp_path / "vim.md").exists()
    assert detector_pages.main(["write"]) == 0
    made = (tmp_path / "vim.md").read_text()
    assert made.startswith("# vim: virtual logit from the embedding's residual")
    assert "| `vim.dim` | none | |" in made
    assert "| `vim`, real images | ResNet-20 |" in made
    assert "oodcli fit v.features.h5 -d vim -o detectors\n" in made
    assert detector_pages.main(["write", "--check"]) == 0


def test_the_figures_hold_no_path():
    assert not re.search(r"/(work|tmp|home|root)\b", json.dumps(FIGURES))


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
    for name in ("real", "ood"):
        words = "extract", folder / "ckpt.pt", folder / name, "-o", folder / f"{name}.features.h5"
        assert oodcli(*words).status == 0
    grouped = randomised(build("resnet20-cifar", 13)).state_dict()
    slices = torch.tensor([[0, 5], [5, 9], [9, 13]])
    torch.save(grouped | {"group_slices": slices}, folder / "mos.pt")
    backbone = randomised(build("resnet20-cifar", 10))
    backbone.linear = nn.Identity()
    torch.save(deconf_state(backbone, "cosine"), folder / "deconf.pt")
    return folder


@every_page
def test_its_examples_run(workplace, monkeypatch, page):
    monkeypatch.chdir(workplace)
    blocks = re.findall(r"```sh\n(.*?)```", PAGES[page], re.S)
    assert blocks
    for line in "\n".join(blocks).splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "oodcli"
        result = oodcli(*words[1:], "--force")
        assert result.status == 0, (line, result.err)
        output = words[words.index("-o") + 1]
        assert Path(output).exists()
