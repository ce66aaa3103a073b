"""``benchmarks.papers``: the tables of the papers, and docs/research/results.md made from them."""

from __future__ import annotations

import csv
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from commands import oodcli
from safetensors.torch import load_file

from benchmarks import train_cifar
from benchmarks.papers import __main__ as command
from benchmarks.papers import (
    indicators_tables_4_5,
    lsgm_figure_5,
    lsgm_figure_7,
    page,
    rg_table_3,
    rg_table_4,
    rg_table_5,
)
from benchmarks.papers.config import read_config
from benchmarks.papers.runs import Runs
from benchmarks.papers.table import Figures, mean_over_sets
from benchmarks.papers.tables import TABLES
from oodcli import detectors

RESULTS = command.read_results()
PUBLISHED = page.read_published()
HERE = page.HERE / "here.toml"

every_table = pytest.mark.parametrize("name", TABLES)
measured = pytest.mark.parametrize(
    ("name", "network"),
    [(name, each) for name, table in RESULTS.get("tables", {}).items() for each in table],
)


def test_the_page_is_what_the_results_give():
    assert page.PAGE.read_text("utf-8") == page.page(RESULTS), "python -m benchmarks.papers write"


def test_the_files_of_figures_are_what_the_results_give():
    assert page.CLAIMS.read_text("utf-8") == page.claims(RESULTS), (
        "python -m benchmarks.papers write"
    )
    text = page.ALL_FIGURES.read_text("utf-8")
    assert text == page.figures(RESULTS), "python -m benchmarks.papers write"


def test_a_check_writes_nothing(capsys):
    assert command.main(["write", "--check"]) == 0
    assert capsys.readouterr().out == ""


def test_a_check_fails_where_a_file_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "ALL_FIGURES", tmp_path / "tables.csv")
    assert command.main(["write", "--check"]) == 1
    assert capsys.readouterr().out == "tables.csv: is not up to date\n"
    assert command.main(["write"]) == 0
    assert (tmp_path / "tables.csv").read_bytes() == page.ALL_FIGURES.read_bytes()


def test_a_changed_figure_changes_page_and_file():
    changed = json.loads(json.dumps(RESULTS))
    changed["tables"]["c2ir-table-1"]["ResNet-20"]["rows"]["odin"]["mean"]["auroc"][0] += 0.2
    assert page.page(changed) != page.page(RESULTS)
    assert page.figures(changed) != page.figures(RESULTS)


def test_the_file_of_all_figures_has_ours_and_the_papers():
    rows = list(csv.DictReader(page.figures(RESULTS).splitlines()))
    keys = ("table", "source", "network", "method", "set", "metric")
    found = {tuple(row[key] for key in keys): row for row in rows}
    assert len(found) == len(rows)
    ours = found["c2ir-table-1", "oodcli", "ResNet-20", "msp", "mean", "auroc"]
    cell = RESULTS["tables"]["c2ir-table-1"]["ResNet-20"]["rows"]["msp"]["mean"]["auroc"]
    assert [float(ours[key]) for key in ("value", "low", "high")] == cell
    theirs = found["c2ir-table-1", "paper, table 1", "ResNet-34", "msp", "mean", "auroc"]
    assert (theirs["value"], theirs["low"], theirs["high"]) == ("93.67", "", "")


def test_all_tables_were_taken_on_both_networks():
    networks = set(read_config(HERE, TABLES).networks)
    assert set(RESULTS["networks"]) >= networks
    for name in TABLES:
        assert set(RESULTS["tables"][name]) >= networks, name


def test_results_and_page_hold_no_path():
    for text in (json.dumps(RESULTS), page.page(RESULTS), page.figures(RESULTS)):
        assert not re.search(r"/(work|tmp|home|root)/|(?<![\w.])/work\b", text)


@measured
def test_figures_lie_in_their_intervals(name, network):
    entry = RESULTS["tables"][name][network]
    assert all(each.startswith("oodcli ") for each in entry["commands"])
    for method, on in entry["rows"].items():
        assert set(TABLES[name].metrics) <= on["mean"].keys() | {"rank"}, method
        for each in on.values():
            for metric, cell in each.items():
                assert len(cell) in (1, 3)
                # A maximum over thresholds is biased upwards in every resample.
                if len(cell) == 3 and metric != "detection-accuracy":
                    assert cell[1] - 0.5 <= cell[0] <= cell[2] + 0.5, (method, metric)


@measured
def test_claims_have_a_verdict_and_figures(name, network):
    figures = Figures(RESULTS["tables"][name][network]["rows"])
    for claim in TABLES[name].claims:
        holds, said = claim.test(figures)
        assert holds in (True, False, None)
        assert said
        assert claim.figures or holds is None


@every_table
def test_what_a_table_records_is_known(name):
    table = TABLES[name]
    assert set(table.records) <= set(detectors.names())
    assert table.place in name.replace("-", " ") or "tables" in table.place
    for entry in PUBLISHED.get(name, []):
        for method, on in entry["rows"].items():
            assert set(on["mean"]) == set(table.metrics), method


def test_published_figures_agree_with_the_averages_that_are_printed_with_them():
    """A figure copied wrongly would move its row's mean."""
    wrong = []
    for name, entries in PUBLISHED.items():
        for entry in entries:
            for method, on in entry["rows"].items():
                for metric, mean in on["mean"].items():
                    values = [v[metric][0] for s, v in on.items() if s != "mean" and metric in v]
                    if values and abs(sum(values) / len(values) - mean[0]) > 0.06:
                        wrong.append((name, method, metric))
    assert wrong == KNOWN_WRONG


KNOWN_WRONG = [
    ("rg-tables-1-6-7", "msp", "auroc"),
    ("rg-table-3", "k = 0.1", "auroc"),
    ("rg-table-4", "T = 4", "fpr95"),
    ("rg-table-4", "T = 32", "auroc"),
    ("rg-table-4", "T = 64", "fpr95"),
]
"""Printed like that."""


def test_verdicts_over_networks():
    assert page.verdict({"a": (True, "x"), "b": (True, "y")}) == "yes"
    assert page.verdict({"a": (True, "x"), "b": (False, "y")}) == "a only"
    assert page.verdict({"a": (False, "x"), "b": (None, "x")}) == "no"
    assert page.verdict({"a": (None, "x"), "b": (None, "x")}) == "not tested"


def test_ranks_share_places_and_are_averaged():
    values = {"a": (90, 80), "b": (90, 70), "c": (50, 60)}
    rows = {
        name: {s: {"auroc": [v]} for s, v in zip(("x", "y"), pair, strict=True)}
        for name, pair in values.items()
    }
    found = indicators_tables_4_5.ranked(mean_over_sets(rows))
    assert {name: on["mean"]["rank"][0] for name, on in found.items()} == {
        "a": 1.25,
        "b": 1.75,
        "c": 3,
    }
    assert found["c"]["mean"]["auroc"] == [55]


def test_all_configurations_are_read(tmp_path):
    usual = read_config(HERE, TABLES)
    assert set(usual.networks) == {"ResNet-20", "ResNet-32"}
    trained = read_config(page.HERE / "resnet34.toml", TABLES)
    (network,) = trained.networks.values()
    (judge,) = read_config(page.HERE / "wrn.toml", TABLES).networks.values()
    assert judge.tables == ("data-free",)
    assert set(RESULTS["tables"]["data-free"]) == {*usual.networks, network.name, judge.name}
    assert RESULTS["networks"][network.name]["precision"] == trained.precision == "bfloat16"
    for name in network.tables:
        commands = RESULTS["tables"][name][network.name]["commands"]
        passes = [each for each in commands if " extract " in each or " --mirror " in each]
        assert all(" --precision bfloat16 " in each for each in passes)
    runs = Runs(usual, usual.networks["ResNet-20"], tmp_path, tmp_path)
    assert (runs.precision, replace(runs, config=trained).precision) == (
        (),
        ("--precision", "bfloat16"),
    )
    assert runs.model == ()
    own = replace(runs.network, arch="nets.py:tiny")
    assert replace(runs, network=own).model == ("--arch", "nets.py:tiny", "--trust-pickle")
    public = read_config(page.HERE / "public.toml", TABLES).networks
    assert public["ResNet-34"].sets["svhn"].learn.endswith("train")
    assert "lsgm-table-1" in public["DenseNet-100-CIFAR-100"].tables


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sizes = 1", "unknown key 'sizes'"),
        ("test = 'a'", "names no network"),
        ("[networks.a]\ncheckpoint = 'b'", "a has no test"),
        ("[networks.a]\ncheckpoint = 'b'\ntest={images='c',group=1,kind=2}", "key 'kind'"),
        ("[networks.a]\ncheckpoint = 'b'\ntest='c'\ntrain='d'\nsets=['e']", "no set 'e'"),
        ("[networks.a]\ncheckpoint = 'b'\ntest='c'\ntrain='d'\ntables=['e']", "no table 'e'"),
        ("[networks.a]\narchitecture = 'b'", "unknown key 'architecture'"),
        ("[sets]\na = {image = 'b'}", "unknown key 'image'"),
    ],
)
def test_a_wrong_configuration_is_refused(tmp_path, text, said):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_config(tmp_path / "c.toml", TABLES)


@pytest.fixture(scope="module")
def digits(trained, tmp_path_factory):
    """The results of every table on the demo's network, of few images."""
    folder = tmp_path_factory.mktemp("papers")
    random = np.random.default_rng(0)
    np.savez(trained / "stripes.npz", images=_stripes(random, 40))
    with np.load(trained / "test.npz") as test:
        few = {key: test[key][::3] for key in ("images", "labels")}
        np.savez(trained / "few.npz", **few, classes=test["classes"])
    config = folder / "digits.toml"
    config.write_text(DIGITS)
    with pytest.MonkeyPatch.context() as patch:
        for module, few in FEWER.items():
            for name, value in few.items():
                patch.setattr(module, name, value)
        words = [str(config), str(trained), "--work", str(folder / "work")]
        words += ["--machine", "a test", "--results", str(folder / "results.json")]
        assert command.main(words) == 0
    return folder


FEWER: dict[ModuleType, dict[str, object]] = {
    lsgm_figure_5: {"COMPONENTS": (2, 4)},
    lsgm_figure_7: {"COMPONENTS": (2, 3, 4), "AT": 2, "ROUNDS": 1},
    rg_table_3: {"CLIPS": ("0.5", "1", "2")},
    rg_table_4: {"TEMPERATURES": ("1", "2", "64")},
    rg_table_5: {"RATIOS": ("0.5", "0.6")},
}
"""What is smaller in the tests, as the data are."""

DIGITS = """
per_class = 4
seeds = [3]
noise = 40
resamples = 5
test = "few.npz"
train = "few.npz"

[sets]
stripes = "stripes.npz"

[networks.digits]
checkpoint = "digits.pt"
"""


def _stripes(random, count):
    rows = random.integers(0, 256, (count, 8, 1, 1))
    return np.broadcast_to(rows, (count, 8, 8, 1)).astype(np.uint8)


def test_every_table_runs_on_the_demo_s_network(digits):
    results = command.read_results(digits / "results.json")
    assert list(results["tables"]) == list(TABLES)
    assert results["machine"] == "a test"
    assert results["networks"]["digits"]["sets"] == {"stripes": 40}
    for name in TABLES:
        rows = results["tables"][name]["digits"]["rows"]
        theirs = {method for entry in PUBLISHED.get(name, []) for method in entry["rows"]}
        ours = {re.sub(r", seed \d+$", "", method) for method in rows}
        absent = {"G-ODIN", "Generalized ODIN", "MOS", "U of GradNorm, V of RG"}
        if all(TABLES[name] is not module.TABLE for module in FEWER):
            assert theirs - absent <= ours, name
    text = page.page(results)
    for table in TABLES.values():
        assert f"## {table.paper}\n" in text
        assert all(f"| {claim.text} |" in text for claim in table.claims)


def test_a_table_s_figures_are_those_of_its_commands(digits, trained, monkeypatch):
    """Repeated from the first to the last, in another folder."""
    results = command.read_results(digits / "results.json")
    entry = results["tables"]["rg-table-4"]["digits"]
    monkeypatch.chdir(trained)
    for line in entry["commands"]:
        words = shlex.split(re.sub("(?<=[ =])work/", f"{digits}/again/", line))
        Path(words[-1]).parent.mkdir(parents=True, exist_ok=True)  # after -o, where there is one
        result = oodcli(*words[1:])
        assert result.status == 0, result.err
    last = json.loads(result.out)["metrics"]
    found = {
        (row["set"], row["metric"]): [row["value"], row["low"], row["high"]]
        for row in last
        if row["metric"] in TABLES["rg-table-4"].metrics
    }
    rows = entry["rows"]["T = 64"]
    assert {(on, m): c for on, each in rows.items() for m, c in each.items()} == {
        key: [round(100 * value, 2) for value in cell] for key, cell in found.items()
    }


def test_what_was_run_is_not_run_again(digits, trained, capfd):
    before = command.read_results(digits / "results.json")
    words = [str(digits / "digits.toml"), str(trained), "c2ir-table-2", "rg-table-2"]
    words += ["--work", str(digits / "work"), "--results", str(digits / "results.json")]
    assert command.main([*words, "--machine", "a test"]) == 0
    assert capfd.readouterr().err == ""
    assert command.read_results(digits / "results.json") == before


def test_what_fails_is_said(digits, trained, tmp_path, capsys):
    np.savez(trained / "broken.npz", pictures=np.zeros(3))
    words = [str(tmp_path / "c.toml"), str(trained), "rg-table-2", "--work", str(digits / "work")]
    words += ["--results", str(tmp_path / "results.json")]
    (tmp_path / "c.toml").write_text(DIGITS.replace("stripes.npz", "broken.npz"))
    with pytest.raises(SystemExit, match=r"oodcli extract digits.pt broken.npz(?s:.*)broken.npz"):
        command.main(words)
    (tmp_path / "c.toml").write_text(DIGITS.replace("stripes.npz", "gone.npz"))
    with pytest.raises(SystemExit, match="2"):
        command.main(words)
    assert f"{trained} has no gone.npz: expected in it digits.pt" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


SAMPLED = {
    "c2ir-table-1": ["msp", "odin", "energy"],
    "indicators-tables-4-5": ["t1000", "entropy", "norm+", "act+", "ang++", "dms", "dss-ext"],
    "thinkback-table-1": ["thinkback, T = 1"],
    "rg-tables-1-6-7": ["energy-norm", "gradnorm", "rg, k = 1"],
}
"""Rows of results.json that need no fit."""


def test_a_few_hundred_real_images_agree(shared_data, tmp_path, monkeypatch):
    """AUROC of textures within the error of a sample."""
    monkeypatch.chdir(tmp_path)
    names = {method.split(",")[0] for rows in SAMPLED.values() for method in rows}
    options = [word for name in names for word in ("-d", name)]
    checkpoint = shared_data / "checkpoints" / "resnet20-12fca82f.th"
    for name, count in (("cifar10-test", 500), ("textures", 300)):
        with np.load(shared_data / f"{name}.npz") as found:
            chosen = np.arange(count) * len(found["images"]) // count
            np.savez(f"{name}.npz", images=found["images"][chosen])
        result = oodcli("score", checkpoint, f"{name}.npz", *options, "-o", f"{name}.csv")
        assert result.status == 0, result.err
    words = "--id", "cifar10-test.csv", "--ood", "textures=textures.csv", "--resamples", 0
    found = json.loads(oodcli("evaluate", *words, "--json").out)["metrics"]
    here = {
        each["detector"]: 100 * each["value"]
        for each in found
        if each["metric"] == "auroc" and each["set"] == "textures"
    }
    for table, methods in SAMPLED.items():
        rows = RESULTS["tables"][table]["ResNet-20"]["rows"]
        for method in methods:
            there = rows[method]["textures"]["auroc"][0]
            assert here[method.split(",")[0]] == pytest.approx(there, abs=4), method


def test_a_network_is_trained_and_goes_on_after_an_interruption(tmp_path, monkeypatch, capfd):
    random = np.random.default_rng(0)
    labels = np.arange(24) % 2
    images = random.integers(0, 100, (24, 32, 32, 3)) + 100 * labels[:, None, None, None]
    np.savez(
        tmp_path / "a.npz", images=images.astype(np.uint8), labels=labels, classes=["dark", "light"]
    )
    data = [str(tmp_path / "a.npz")] * 2
    settings = ["--arch", "resnet8-cifar", "--batch-size", "8", "--device", "cpu", "--lr", "0.05"]
    settings += ["--sides", "16:1", "24:1"]
    monkeypatch.setattr(train_cifar, "EVERY", 2)
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    assert train_cifar.main([*data, "-o", str(whole), *settings, "--epochs", "4"]) == 0
    said = capfd.readouterr().err
    assert "epoch 4 of 4: 100.00 % of 24 right" in said
    assert re.findall(r"step (\d+) of 12 at (\d+) px", said) == [
        ("2", "16"),
        *((str(step), "24") for step in (4, 6)),
        *((str(step), "32") for step in (8, 10, 12)),
    ]
    assert not list(tmp_path.glob("*.partial"))
    save, saved = train_cifar.Training.save, []

    def interrupted(self, path):
        save(self, path)
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_cifar.Training, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_cifar.main([*data, "-o", str(parts), *settings, "--epochs", "4"])
    with pytest.raises(SystemExit, match="was kept by another command"):
        train_cifar.main([*data, "-o", str(parts), *settings, "--epochs", "5"])
    assert train_cifar.main([*data, "-o", str(parts), *settings, "--epochs", "4"]) == 0
    assert "going on after 4 of 12 steps" in capfd.readouterr().err
    assert parts.read_bytes() == whole.read_bytes()
    inspected = json.loads(oodcli("inspect", whole, "--json").out)
    assert inspected["arch"] == "resnet8-cifar"
    assert inspected["class_names"] == ["dark", "light"]
    further = tmp_path / "further.safetensors"
    words = [*data, "-o", str(further), *settings, "--epochs", "2", "--lr", "1e-9"]
    assert train_cifar.main([*words, "--from", str(whole)]) == 0
    weights, earlier = load_file(further), load_file(whole)
    torch.testing.assert_close(weights["conv1.weight"], earlier["conv1.weight"])
    assert train_cifar.main(words) == 0
    assert not torch.allclose(load_file(further)["conv1.weight"], earlier["conv1.weight"])


def test_steps_alone_write_nothing(tmp_path, capfd):
    images = np.zeros((8, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(8) % 2, classes=["a", "b"])
    data = [str(tmp_path / "a.npz")] * 2
    words = [*data, "-o", str(tmp_path / "n.safetensors"), "--arch", "resnet8-cifar"]
    assert train_cifar.main([*words, "--device", "cpu", "--batch-size", "4", "--steps", "3"]) == 0
    assert re.search(
        r"step 3 of 200 at 32 px: loss \d\.\d+, [\d.]+ images/s", capfd.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_augmented_images_are_crops_mirrored_or_not_with_a_hole():
    images = torch.arange(1, 65).reshape(1, 8, 8, 1).expand(60, 8, 8, 3).to(torch.uint8)
    plain = train_cifar.augmented(images, 0, torch.Generator().manual_seed(0))
    assert plain.shape == (60, 3, 8, 8)
    framed = torch.nn.functional.pad(images[:1], (0, 0, 4, 4, 4, 4))
    crops = [
        train_cifar.normalised(framed[:, y : y + 8, x : x + 8]) for y in range(9) for x in range(9)
    ]
    known = torch.cat([*crops, *(each.flip(3) for each in crops)])
    for image in plain:
        assert (known == image).flatten(1).all(1).any()
    holed = train_cifar.augmented(images, 4, torch.Generator().manual_seed(0))
    holes = (holed != plain).any(1)
    assert holes.sum((1, 2)).max() <= 16
    assert holes.any()
    assert (holed.movedim(1, 3)[holes] == 0).all()


def test_a_network_of_timm_becomes_a_folder_of_a_hub(tmp_path, monkeypatch, capfd):
    """With Muon, whose state is kept as SGD's is."""
    pytest.importorskip("timm")
    images = np.repeat(np.uint8([30, 220]), 24)[:, None, None, None].repeat(32, 1).repeat(32, 2)
    np.savez(
        tmp_path / "a.npz",
        images=images.repeat(3, 3),
        labels=np.repeat([0, 1], 24),
        classes=["dark", "light"],
    )
    data = [str(tmp_path / "a.npz")] * 2
    arguments = {"patch_size": 2, "dims": [8, 8, 8, 8], "depths": [1, 1, 0, 0]}
    arguments |= {"ls_init_value": None}
    settings = ["--arch", "timm:convnext_atto", "--model-args", json.dumps(arguments)]
    settings += ["--optimiser", "muon", "--device", "cpu", "--batch-size", "8", "--lr", "0.01"]
    words = [*data, *settings, "--epochs", "4", "-o"]
    folder = tmp_path / "net"
    assert train_cifar.main([*words, str(folder)]) == 0
    assert f"wrote {folder}: 100.00 % right" in capfd.readouterr().out
    inspected = json.loads(oodcli("inspect", folder, "--json").out)
    assert inspected["arch"].startswith("timm:convnext_atto?patch_size=2")
    assert inspected["class_names"] == ["dark", "light"]
    assert inspected["preprocessing"]["mean"] == list(train_cifar.CIFAR_MEAN)
    assert inspected["batchnorm_layers"] == []
    monkeypatch.setattr(train_cifar, "EVERY", 5)
    save = train_cifar.Training.save

    def interrupted(self, path):
        save(self, path)
        raise KeyboardInterrupt

    again = tmp_path / "again"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_cifar.Training, "save", interrupted)
        train_cifar.main([*words, str(again)])
    assert train_cifar.main([*words, str(again)]) == 0
    weights = [(each / "model.safetensors").read_bytes() for each in (folder, again)]
    assert weights[0] == weights[1]
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SystemExit, match="needs timm: pip install timm"):
        train_cifar.main([*words, str(tmp_path / "without")])


def test_the_step_of_muon_is_orthogonal():
    torch.manual_seed(0)
    for shape in ((6, 20), (20, 6)):
        found = torch.linalg.svdvals(train_cifar.orthogonal(torch.randn(shape)))
        assert found.min() > 0.5
        assert found.max() < 1.5
    one, other = (torch.nn.Parameter(torch.randn(4, 3, 2, 2)) for _ in range(2))
    before = other.detach().clone()
    one.grad, other.grad = torch.ones_like(one), torch.randn_like(other)
    train_cifar.Muon([one, other], lr=0.1).step()
    moved = before * (1 - 0.1 * train_cifar.DECAY) - other.detach()
    lengths = torch.linalg.svdvals(moved.flatten(1))
    assert lengths.min() > 0.5 * 0.1 * 0.2 * 12**0.5
    assert (moved * other.grad).sum() > 0
