"""Classes of which there is no row to fit or calibrate on: named, and without a verdict."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import oodcli
from optional import SUFFIXES
from PIL import Image
from torch import nn

from oodcli.detectors import get
from oodcli.detectors.calibration import calibrate
from oodcli.features import Features
from oodcli.files.artefact import read_artefact, write_artefact
from oodcli.files.scores import read_scores
from oodcli.report.thresholds import flagged_shares, verdict_threshold
from oodcli.stages.chosen import Chosen
from oodcli.stages.fit import class_counts
from oodcli.stages.verdict import Rule, classes_in_words, rule_of

NAMES = ("red", "green", "blue")
CODE = """import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.fc = nn.Linear(3, 3)
    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))
"""


def images(root: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Pictures of which one channel is the brightest, by sub-folder."""
    random = np.random.default_rng(seed)
    for c, name in enumerate(NAMES):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(counts.get(name, 0)):
            pixels = np.full((8, 8, 3), 40.0) + random.normal(0, 10, (8, 8, 3))
            pixels += random.normal(0, 12)
            pixels[..., c] += 160
            path = root / name / f"{i:03d}.png"
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """net.pt, a classifier by colour, and test/, 20 images a class."""
    folder = tmp_path_factory.mktemp("colours")
    (folder / "net.py").write_text(CODE, encoding="utf-8")
    eye = torch.eye(3)
    head = nn.Linear(3, 3)
    head.weight.data, head.bias.data = 12 * eye, torch.zeros(3)
    state = {"conv.weight": eye.view(3, 3, 1, 1)}
    state |= {f"fc.{name}": value for name, value in head.state_dict().items()}
    torch.save(state, folder / "net.pt")
    images(folder / "test", dict.fromkeys(NAMES, 20), seed=1)
    return folder


def model(toy: Path) -> tuple[object, ...]:
    names = ("--class-names", ",".join(NAMES))
    return ("--arch", f"{toy}/net.py:Net", "--input-size", 8, "--mean", "0,0,0", "--std", "1,1,1",
            *names)  # fmt: skip


def run(*words: object, status: int = 0):
    result = oodcli(*words)
    assert result.status == status, result.err
    return result


def cache(toy: Path, name: str, counts: dict[str, int], *, labels: bool = True) -> Path:
    root = images(toy / name, counts)
    path = toy / f"{name}.h5"
    if labels:
        run("extract", toy / "net.pt", root, *model(toy), "-o", path)
    else:
        found = sorted(map(str, root.rglob("*.png")))
        listed = "\n".join(found)
        result = oodcli("extract", toy / "net.pt", "-", *model(toy), "-o", path, stdin=listed)
        assert result.status == 0, result.err
    return path


@pytest.fixture(scope="module")
def without_blue(toy) -> Path:
    return cache(toy, "train", {"red": 60, "green": 60})


@pytest.fixture(scope="module")
def detectors(toy, without_blue) -> Path:
    """mds and knn, fitted and calibrated on rows without blue ones."""
    run("fit", without_blue, "-d", "mds", "-d", "knn", "-o", toy / "det")
    return toy / "det"


def scored(toy: Path, path: Path, *words: object, status: int = 0):
    result = oodcli("score", toy / "net.pt", toy / "test", *model(toy), *words, "-o", path)
    assert result.status == status, result.err
    return result


def cells(path: Path, column: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {name: [] for name in NAMES}
    with path.open() as stream:
        for row in csv.DictReader(stream):
            found[row["label"]].append(row[column])
    return found


def test_fit_names_the_class_and_the_artefact_keeps_it(toy, without_blue):
    result = run("fit", without_blue, "-d", "mds", "-o", toy / "named")
    assert "note: train.h5 has no rows of blue" in result.err
    assert "note: none of the 24 calibration rows is of blue" in result.err
    artefact = read_artefact(toy / "named" / "mds.safetensors")
    assert artefact.fitted_on["classes_without_rows"] == [2]
    assert artefact.fitted_on["classes_with_one_row"] == []
    calibration = artefact.calibrations["plain"]
    assert (calibration.classes, calibration.without_rows) == (3, (2,))
    assert calibration.without_verdict == (2,)


def test_labels_count_or_else_what_is_predicted(toy):
    path = cache(toy, "unlabelled", {"red": 30, "blue": 30}, labels=False)
    result = run("fit", path, "-d", "knn", "-o", toy / "unlabelled-det")
    assert "unlabelled.h5 has no rows of green" in result.err
    logits = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9], [0, 0, 9]])
    block = Features(4, logits=logits, label=torch.tensor([1, 1, -1, 0]))
    assert class_counts([block, block], 3).tolist() == [2, 4, 2]
    assert class_counts([Features(4, logits=logits)], 3).tolist() == [1, 1, 2]


def test_a_class_with_one_row_is_named(toy):
    path = cache(toy, "one", {"red": 60, "green": 60, "blue": 1})
    result = run("fit", path, "-d", "knn", "-o", toy / "one-det")
    assert "one.h5 has only one row of blue" in result.err
    artefact = read_artefact(toy / "one-det" / "knn.safetensors")
    assert artefact.fitted_on["classes_without_rows"] == []
    assert artefact.fitted_on["classes_with_one_row"] == [2]


def test_rows_of_all_classes_need_no_note(toy):
    path = cache(toy, "all", dict.fromkeys(NAMES, 40))
    result = run("fit", path, "-d", "knn", "-o", toy / "all-det")
    assert "no rows of" not in result.err
    assert "only one row" not in result.err
    scored(toy, toy / "all.csv", "-d", toy / "all-det" / "knn.safetensors", "--fpr", 0.05)
    assert {cell for each in cells(toy / "all.csv", "knn.ood").values() for cell in each} <= {
        "0",
        "1",
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_verdict_on_a_class_without_rows(toy, detectors, suffix):
    path = toy / f"s.{suffix}"
    words = ("-d", detectors / "mds.safetensors", "-d", detectors / "knn.safetensors")
    result = scored(toy, path, *words, "--fpr", 0.05, "--force")
    assert "20 without (calibrated on 24 real images; expect " in result.err
    assert "no verdict on predictions of blue: no rows to fit or calibrate on" in result.err
    scores = read_scores(path)
    for name in ("mds", "knn"):
        unjudged = scores.unjudged[name]
        assert [label == "blue" for label in scores.labels] == unjudged.tolist()
        assert np.isnan(scores.p_values[name]).tolist() == unjudged.tolist()
        assert np.isfinite(scores.detectors[name]).all()
        flagged, basis = scores.verdicts[name]
        assert flagged < 10
        assert "no verdict on predictions of blue" in basis
    if suffix == "csv":
        assert set(cells(path, "mds.ood")["blue"]) == set(cells(path, "mds.p")["blue"]) == {""}
        assert set(cells(path, "mds.ood")["red"]) <= {"0", "1"}
    if suffix == "jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found = {row["label"]: row["mds.ood"] for row in rows}
        assert found["blue"] is None
        assert type(found["red"]) is int
        assert {row["mds.p"] for row in rows if row["label"] == "blue"} == {None}
    if suffix == "parquet":
        import pyarrow
        from pyarrow import parquet

        table = parquet.read_table(path)
        assert table.schema.field("mds.ood").type == pyarrow.int8()
        assert table["mds.ood"].null_count == 20
    made = json.loads(Path(f"{path}.json").read_text())
    assert "no verdict on predictions of blue" in made["verdicts"]["mds"]
    assert made["unjudged"] == {"mds": 20, "knn": 20}


def test_verdicts_by_thresholds_leave_it_out_too(toy, detectors):
    mds = ("-d", detectors / "mds.safetensors")
    scored(toy, toy / "t.csv", *mds, "--threshold", "mds=1e9")
    assert set(cells(toy / "t.csv", "mds.ood")["blue"]) == {""}
    assert set(cells(toy / "t.csv", "mds.ood")["red"]) == {"0"}
    # A threshold of the stream is that of the rows that it decides on: a tenth of 40.
    result = scored(toy, toy / "c.csv", *mds, "--contamination", 0.1, "--json")
    found = cells(toy / "c.csv", "mds.ood")
    assert set(found["blue"]) == {""}
    assert (found["red"] + found["green"]).count("1") == 4
    summary = json.loads(result.out)
    assert summary["unjudged"] == {"mds": 20}
    assert summary["ood_fraction"] == {"mds": pytest.approx(0.1)}
    assert "no verdict on predictions of blue: no rows to fit on" in result.err


def test_a_detector_that_is_only_calibrated(toy, without_blue):
    run("fit", "-d", "energy", "--calibrate", without_blue, "-o", toy / "cal")
    energy = ("-d", toy / "cal" / "energy.safetensors")
    scored(toy, toy / "e.csv", *energy, "--fpr", 0.05)
    assert set(cells(toy / "e.csv", "energy.ood")["blue"]) == {""}
    assert "no rows to calibrate on" in cells(toy / "e.csv", "energy.basis")["red"][0]
    scored(toy, toy / "e2.csv", *energy, "--threshold", "energy=1e9")
    assert set(cells(toy / "e2.csv", "energy.ood")["blue"]) == {"0"}


def test_few_rows_to_calibrate_on_may_lack_a_class_by_chance(toy):
    path = cache(toy, "few", {"red": 7, "green": 7})  # fewer than 5 for each of 3 classes
    result = run("fit", "-d", "energy", "--calibrate", path, "-o", toy / "few-det")
    assert "1 of 3 classes have no row among the 14 calibration rows" in result.err
    energy = ("-d", toy / "few-det" / "energy.safetensors")
    scored(toy, toy / "few.csv", *energy, "--fpr", 0.1)
    assert set(cells(toy / "few.csv", "energy.ood")["blue"]) <= {"0", "1"}
    assert "no rows to calibrate on of 1 of 3 classes" in cells(toy / "few.csv", "energy.basis")[
        "red"
    ][0]  # fmt: skip


def test_the_gate_counts_rows_without_a_verdict(toy, detectors):
    words = ("-d", detectors / "mds.safetensors", "--threshold", "mds=1e9", "--force")
    result = scored(toy, toy / "g.csv", *words, "--max-ood-fraction", 0.3, status=4)
    assert "33.3% are not known to be in-distribution by mds, more than 30.0%" in result.err
    assert "(20 without a verdict, of 60)" in result.err
    scored(toy, toy / "g.csv", *words, "--max-ood-fraction", 0.34)


def test_shards_merge_with_rows_without_a_verdict(toy, detectors, tmp_path):
    words = ("-d", detectors / "mds.safetensors", "--fpr", 0.05, "--batch-size", 7)
    for n in (1, 2):
        scored(toy, tmp_path / f"{n}.csv", *words, "--shard", f"{n}/2")
    parts = ("merge", tmp_path / "1.csv", tmp_path / "2.csv", "-o", tmp_path / "m.csv")
    result = run(*parts, "--json")
    assert json.loads(result.out)["unjudged"] == {"mds": 20}
    assert "20 without" in result.err
    assert read_scores(tmp_path / "m.csv").unjudged["mds"].sum() == 20
    result = run(*parts, "--force", "--max-ood-fraction", 0.3, status=4)
    assert "20 without a verdict" in result.err


def test_inspect_names_them(detectors, tmp_path):
    about = run("inspect", detectors / "mds.safetensors").out
    assert re.search(r"^no verdict on +blue *$", about, re.M)


def test_evaluate_reports_it(toy, detectors, tmp_path):
    words = ("-d", detectors / "mds.safetensors", "-d", detectors / "knn.safetensors")
    scored(toy, tmp_path / "id.csv", *words, "--fpr", 0.05)
    result = run("evaluate", "--id", tmp_path / "id.csv", "--ood", f"x={tmp_path / 'id.csv'}",
                 "--resamples", 0, "-o", tmp_path / "report")  # fmt: skip
    notes = json.loads((tmp_path / "report" / "metrics.json").read_text())["notes"]
    (note,) = [note for note in notes if note.startswith("mds calls OOD")]
    assert "rows without a verdict: ID 20, x 20" in note
    assert "no verdict on predictions of blue" in note
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Rows without a verdict of a detector do not count for it" in page
    assert "rows without a verdict: ID 20" in result.err + result.out
    about = run("inspect", tmp_path / "id.csv").out
    assert "20 without one" in about


def test_thresholds_and_shares_are_of_rows_with_a_verdict(tmp_path):
    path = tmp_path / "s.csv"
    lines = ["path,label,predicted,confidence,d,d.p,d.ood,d.basis,error"]
    for i, (score, p, ood) in enumerate([(1, 0.9, 0), (2, 0.05, 1), (9, "", ""), (8, "", "")]):
        lines.append(f"{i},,a,0.5,{score},{p},{ood},score above 1.5; no verdict on x,")
    path.write_text("\n".join(lines) + "\n")
    scores = read_scores(path)
    assert scores.verdicts["d"] == (1, "score above 1.5; no verdict on x")
    assert scores.unjudged["d"].tolist() == [False, False, True, True]
    assert verdict_threshold("d", [scores]) == (1.5, 1.5)
    other = replace(scores, verdicts={"d": (1, "12 real images")})
    assert verdict_threshold("d", [other]) == (1.0, 2.0)
    assert flagged_shares(scores, "d", np.array([0.01, 0.1, 1.0])).tolist() == [0, 0.5, 1]


def test_artefacts_of_before_have_verdicts_on_all_classes(toy, detectors, tmp_path):
    artefact = read_artefact(detectors / "mds.safetensors")
    fitted_on = {k: v for k, v in artefact.fitted_on.items() if not k.startswith("classes_")}
    calibrations = {
        view: replace(each, classes=0, without_rows=None)
        for view, each in artefact.calibrations.items()
    }
    old = replace(artefact, fitted_on=fitted_on, calibrations=calibrations)
    write_artefact(old, tmp_path / "mds.safetensors")
    about = read_artefact(tmp_path / "mds.safetensors")
    assert about.without_rows == ()
    assert about.calibrations["plain"].without_rows is None
    result = scored(toy, tmp_path / "s.csv", "-d", tmp_path / "mds.safetensors", "--fpr", 0.05)
    assert "no verdict" not in result.err
    assert set(cells(tmp_path / "s.csv", "mds.ood")["blue"]) == {"1"}


@pytest.mark.slow
def test_virtual_images_of_some_classes(fitted, tmp_path):
    net = fitted / "digits.pt"
    run("invert", net, "--per-class", 5, "--classes", "0-8", "--no-mirror", "--steps", 3,
        "-o", tmp_path / "v.h5")  # fmt: skip
    run("extract", net, tmp_path / "v.h5", "-o", tmp_path / "f.h5")
    result = run("fit", tmp_path / "f.h5", "-d", "c2ir-z", "-o", tmp_path / "det")
    assert "f.h5 has no rows of 9" in result.err
    words = ("-d", tmp_path / "det" / "c2ir-z.safetensors", "--threshold", "c2ir-z=1e9")
    run("score", net, fitted / "test.npz", *words, "-o", tmp_path / "s.csv")
    with (tmp_path / "s.csv").open() as stream:
        for row in csv.DictReader(stream):
            assert (row["c2ir-z.ood"] == "") == (row["predicted"] == "9")


def test_noise_has_no_classes(fitted, tmp_path):
    net = fitted / "digits.pt"
    run("extract", net, "noise:uniform?n=60", "--for", "1c-sum", "-o", tmp_path / "n.h5")
    result = run("fit", fitted / "v.features.h5", "--noise", tmp_path / "n.h5", "-d", "1c-sum",
                 "-o", tmp_path / "det")  # fmt: skip
    assert "no rows of" not in result.err
    artefact = read_artefact(tmp_path / "det" / "1c-sum.safetensors")
    assert "classes_without_rows" not in artefact.fitted_on


# by hand


def test_rules_by_hand():
    scores = torch.tensor([1.0, 5.0, torch.inf, 1.0])
    predicted = torch.tensor([0, 1, 1, 2])
    rule = Rule(threshold=2.0, silent=(1,))
    ood = rule.columns("d", scores, predicted)["d.ood"]
    assert np.array_equal(ood, [0, np.nan, np.nan, 0], equal_nan=True)
    assert rule.columns("d", scores)["d.ood"].tolist() == [0, 1, 1, 0]
    calibration = calibrate([torch.arange(30.0)], [], None)
    some = replace(calibration, classes=6, without_rows=(2,))
    assert some.without_verdict == (2,)
    assert replace(some, classes=7).without_verdict == ()
    assert calibration.without_verdict == ()
    chosen = Chosen(get("msp")(), without_rows=(0,))
    rule = rule_of(chosen, NAMES, calibration=some, rate=0.1)
    assert rule.silent == (0, 2)
    assert rule.basis == (
        "30 real images; nominal 0.1; no verdict on predictions of red: no rows to fit on; no "
        "verdict on predictions of blue: no rows to calibrate on"
    )


def test_classes_in_words():
    names = [f"c{i}" for i in range(9)]
    assert classes_in_words((3,), names) == "c3"
    assert classes_in_words(range(7), names) == "c0, c1, c2, c3, c4 and 2 more classes"


# several detectors at once


def test_what_cannot_be_fitted_is_named_and_the_rest_is_written(fitted, tmp_path):
    out = tmp_path / "det"
    words = ("fit", fitted / "v.features.h5", "-d", "c2ir-z", "-d", "gram", "-d", "knn")
    result = run(*words, "-o", out, "--json", status=3)
    assert sorted(path.name for path in out.iterdir()) == [
        "c2ir-z.safetensors",
        "knn.safetensors",
    ]
    assert "gram is not fitted: " in result.err
    summary = json.loads(result.out)
    assert [each["detector"] for each in summary] == ["c2ir-z", "knn", "gram"]
    assert summary[-1]["file"] is None
    assert "layers.gram" in summary[-1]["reason"]


def test_an_artefact_of_another_checkpoint_leaves_the_others(fitted, toy, detectors, tmp_path):
    result = run("fit", fitted / "v.features.h5", "-d", detectors / "mds.safetensors", "-d", "knn",
                 "-o", tmp_path / "det", status=3)  # fmt: skip
    assert "mds is not fitted: " in result.err
    assert "was fitted for the checkpoint" in result.err
    assert (tmp_path / "det" / "knn.safetensors").is_file()


def test_nothing_is_written_where_nothing_can_be_fitted(fitted, tmp_path):
    out = tmp_path / "det"
    words = ("fit", fitted / "v.features.h5", "-o", out)
    one = run(*words, "-d", "gram", status=1)
    assert "layers.gram" in one.err
    two = run(*words, "-d", "gram", "-d", "supervised", status=1)
    assert "none of gram, supervised can be fitted: gram: " in two.err
    assert not list(out.glob("*"))


def test_all_leaves_out_without_a_status_of_its_own(fitted, tmp_path):
    result = run("fit", fitted / "v.features.h5", "-d", "all", "-o", tmp_path / "det", "--json")
    assert all(each["file"] for each in json.loads(result.out))


def test_scores_without_verdicts_in_standard_output(toy, detectors):
    words = ("-d", detectors / "mds.safetensors", "--threshold", "mds=1e9")
    result = run("score", toy / "net.pt", toy / "test", *model(toy), *words)
    rows = list(csv.DictReader(io.StringIO(result.out)))
    assert [row["mds.ood"] for row in rows] == [
        "" if row["label"] == "blue" else "0" for row in rows
    ]
