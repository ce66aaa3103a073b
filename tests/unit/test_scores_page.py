"""The page of ``oodcli show``: what it counts, what it keeps, and that it is harmless."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import fails, oodcli
from optional import SUFFIXES
from pages import EVIL, Page
from PIL import Image

import oodcli as package
from oodcli.detectors.calibration import Calibration
from oodcli.errors import FileError
from oodcli.files.made import json_number
from oodcli.files.scores import ScoreBlock, ScoresWriter, score_rows
from oodcli.report import listing as listing_module
from oodcli.report.listing import Listing, read_listing
from oodcli.report.overview import CLASSES, Overview, overview, rows_by_class
from oodcli.report.scores_page import overviews
from oodcli.report.thumbnails import noise_of, read_thumbnails

BASIS = "200 real images; nominal 0.1"


def write(
    path: Path,
    scores: Mapping[str, Sequence[float]],
    *,
    flags: Mapping[str, Sequence[float]] | None = None,
    basis: str = BASIS,
    paths: Sequence[str] | None = None,
    predicted: Sequence[str] | None = None,
    more: Mapping[str, Any] | None = None,
    errors: int = 0,
) -> Path:
    """A scores file whose last rows are unreadable."""
    rows = len(next(iter(scores.values())))
    columns: dict[str, Any] = {}
    for name, column in scores.items():
        columns[name] = np.array(column, float)
        if flags and name in flags:
            columns[f"{name}.ood"] = np.array(flags[name], float)
            columns[f"{name}.basis"] = [basis] * rows
    columns |= more or {}
    block = ScoreBlock(
        [*(paths or [f"in/{k}.png" for k in range(rows)]), *["gone.png"] * errors],
        [""] * (rows + errors),
        [""] * rows + ["damaged"] * errors,
        predicted or ["cat"] * rows,
        np.full(rows, 0.5),
        columns,
    )
    with ScoresWriter(path, tuple(columns)) as writer:
        writer.write(block)
    return path


def listed(path: Path, *detectors: str, most: int = listing_module.LISTED) -> Listing:
    return read_listing(score_rows(path), detectors, most)


def first(path: Path) -> Overview:
    return overviews(listed(path))[0]


def data_of(page: Path) -> dict[str, Any]:
    [text] = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S
    )
    found: dict[str, Any] = json.loads(text)
    return found


# --- the calibration --------------------------------------------------------------------------


def calibrations() -> list[Calibration]:
    random = np.random.default_rng(0)
    found = []
    for n in (1, 2, 7, 40):
        scores = torch.from_numpy(np.sort(random.normal(size=n).round(1)))
        weights = torch.from_numpy(random.choice([1.0, 0.25], n))
        found += [Calibration(scores, torch.ones(n).double(), n, 0)]
        found += [Calibration(scores, weights, n, n, 0.9)]
    scores = torch.tensor([0.0, 1.0, math.inf], dtype=torch.float64)
    return [*found, Calibration(scores, torch.ones(3).double(), 3, 0)]


@pytest.mark.parametrize("calibration", calibrations())
def test_a_score_is_above_the_threshold_where_its_p_value_is_at_most_the_rate(calibration) -> None:
    asked = torch.cat([calibration.scores, torch.linspace(-5, 5, 1001, dtype=torch.float64)])
    for rate in (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.9, 1.0, calibration.resolution):
        threshold = calibration.threshold(rate)
        expected = calibration.p_value(asked) <= rate
        assert torch.equal(asked > threshold, expected), rate


def test_quantiles_by_hand() -> None:
    def quantiles(scores: list[float], weights: list[float], most: int) -> list[float]:
        tensors = (torch.tensor(each, dtype=torch.float64) for each in (scores, weights))
        return Calibration(*tensors, len(scores), 0).quantiles(most).tolist()

    assert quantiles([1, 2, 3, 4], [1, 1, 1, 1], 4) == [1, 1, 2, 3, 4]
    assert quantiles([1, 2, 3, 4], [1, 1, 1, 1], 2) == [1, 2, 4]
    assert quantiles([1, 2], [1, 3], 2) == [1, 2, 2]
    assert len(quantiles(list(range(1000)), [1.0] * 1000, 200)) == 201


def test_numbers_that_json_lacks() -> None:
    assert json_number(1 / 3) == 0.333333333
    assert [float(json_number(each)) for each in (math.inf, -math.inf)] == [math.inf, -math.inf]


# --- what is kept -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_row_of_a_small_file_is_kept(tmp_path: Path, suffix: str) -> None:
    path = write(
        tmp_path / f"s.{suffix}",
        {"a": [1, math.inf, 3], "b": [0, 1, 2]},
        flags={"b": [0, math.nan, 1]},
        more={"a.why": ["x", "", "z"], "b.saw": ["SVHN"] * 3},
        predicted=["cat", "dog", "cat"],
        errors=2,
    )
    found = listed(path)
    b, a = found.columns  # the one with verdicts first
    assert (a.name, b.name, found.rows, found.unreadable) == ("a", "b", 5, 2)
    assert found.errors == [("gone.png", "damaged")] * 2
    np.testing.assert_array_equal(a.scores, [1, math.inf, 3])
    np.testing.assert_array_equal(b.flags, [0, math.nan, 1])
    assert (a.flags, b.basis, b.saw, a.why) == (None, BASIS, "SVHN", {0: "x", 2: "z"})
    assert [texts.path for texts in found.listed.values()] == ["in/0.png", "in/1.png", "in/2.png"]
    assert [found.names[k] for k in found.predicted] == ["cat", "dog", "cat"]
    assert [column.name for column in listed(path, "a").columns] == ["a"]
    with pytest.raises(FileError, match="no column 'c': it has a, b"):
        listed(path, "c")


def test_of_a_long_file_the_highest_of_each_detector_are_listed(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    scores = {name: random.normal(size=500) for name in "ab"}
    whys = [f"why {k}" for k in range(500)]
    path = write(tmp_path / "s.csv", scores, more={"a.why": whys})
    found = listed(path, most=40)
    assert not found.complete
    assert len(found.listed) <= 40 + 2 * listing_module.LEAST
    for name, column in scores.items():
        order = np.argsort(-column)
        assert set(order[:20]) | set(order[-listing_module.LEAST :]) <= found.listed.keys(), name
        np.testing.assert_allclose(
            next(each.scores for each in found.columns if each.name == name), column, rtol=1e-8
        )
    assert found.columns[0].why.keys() <= set(range(500))
    assert {found.listed[row].path for row in found.listed} == {
        f"in/{row}.png" for row in found.listed
    }


def test_explanations_of_the_highest_are_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(listing_module, "EXPLAINED", 3)
    path = write(tmp_path / "s.csv", {"a": range(9)}, more={"a.why": ["w"] * 9})
    assert listed(path).columns[0].why == {6: "w", 7: "w", 8: "w"}


def test_steps_of_the_threshold_count_exactly(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    scores = random.normal(size=400).round(3)
    flags = np.where(random.random(400) < 0.1, math.nan, scores > 1.5)
    predicted = random.choice(["cat", "dog", "emu"], 400).tolist()
    path = write(
        tmp_path / "s.csv", {"a": scores}, flags={"a": flags.tolist()}, predicted=predicted
    )
    found = listed(path, most=30)
    classes = rows_by_class(found)
    one = overview(found, found.columns[0], classes, most=5, least=3)
    assert one.threshold.value in one.steps
    for step, threshold in enumerate(one.steps):
        for (name, _), above in zip(classes, one.above, strict=True):
            expected = (
                (scores > threshold) & ~np.isnan(flags) & (np.array(predicted) == name)
            ).sum()
            assert above[step] == expected
    assert sum(one.class_flagged) == one.flagged == np.nansum(flags)


# --- what one detector shows ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "basis", "value", "exact"),
    [
        ([0, 0, 0, 1], BASIS, 3, True),
        ([0, 0, 1, 1], "score above 2.5", 2.5, True),
        ([0, 0, 1, 1], "score above 3.5", 2, True),  # what the file flags counts
        ([0, 0, 0, 0], BASIS, 4, True),
        ([1, 1, 1, 1], BASIS, 1, True),
        ([0, 1, 0, 0], BASIS, 4, False),
        ([math.nan, 0, 1, 1], BASIS, 2, True),
        ([math.nan] * 4, BASIS, 1, True),
    ],
)
def test_the_threshold_flags_what_the_file_flags(tmp_path, flags, basis, value, exact) -> None:
    path = write(tmp_path / "s.csv", {"a": [1, 2, 3, 4]}, flags={"a": flags}, basis=basis)
    one = first(path)
    assert one.threshold.value == pytest.approx(value, abs=1e-5)
    assert (one.threshold.exact, one.silent) == (exact, sum(math.isnan(each) for each in flags))
    if exact:
        assert one.flagged == np.nansum(flags)
    assert one.threshold.rate == (0.1 if basis == BASIS else None)


def test_an_infinite_score_is_flagged_at_any_threshold(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", {"a": [1, 2, math.inf]}, flags={"a": [0, 0, 1]})
    one = first(path)
    assert (one.threshold.value, one.flagged, one.infinite) == (2, 1, 1)
    assert sum(one.bins) == 3
    assert one.bins[-1] == 2
    assert first(write(tmp_path / "t.csv", {"a": [math.inf, math.inf]})).bins[-1] == 2


def test_the_axis_leaves_out_far_outliers(tmp_path: Path) -> None:
    scores = [*np.random.default_rng(0).normal(size=200), 1e9]
    one = first(write(tmp_path / "s.csv", {"a": scores}))
    assert one.high < 20
    assert sum(one.bins) == 201
    equal = first(write(tmp_path / "t.csv", {"a": [7.0, 7.0]}))
    assert equal.low < 7 < equal.high


def test_small_classes_are_counted_together(tmp_path: Path) -> None:
    count = CLASSES + 20
    predicted = [str(k) for k in range(count)] + ["5"]
    path = write(tmp_path / "s.csv", {"a": range(count + 1)}, predicted=predicted)
    classes = rows_by_class(listed(path))
    assert (len(classes), classes[0][0], classes[-1][0]) == (CLASSES, "5", None)
    assert sum(len(rows) for _, rows in classes) == count + 1


# --- the page ---------------------------------------------------------------------------------


def test_it_is_harmless_and_needs_nothing_else(tmp_path: Path) -> None:
    scores = {EVIL: [1, 2, math.inf]}
    path = write(
        tmp_path / "s.jsonl",
        scores,
        flags={EVIL: [0, 0, 1]},
        basis=EVIL,
        paths=[f"{EVIL}/{k}.png" for k in range(3)],
        predicted=[EVIL] * 3,
        more={f"{EVIL}.why": [EVIL] * 3, f"{EVIL}.saw": [EVIL] * 3},
        errors=1,
    )
    text = path.read_text("utf-8").replace("damaged", "\\\\udcff <!--<script>")
    path.write_text(text.replace("/0.png", "/\\udcff0.png"), "utf-8")
    shown = package.show(path, command=EVIL)
    text = shown.output.read_text("utf-8")
    parsed = Page(text)
    assert [each.get("type") for each in parsed.all("script")] == ["application/json", None]
    for _, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/jpeg", "#"))
    assert "alert(1)</script>" not in text
    assert not re.search(r"url\((?!#)|@import|https?:(?!//www\.w3\.org/2000/svg)", text)
    script = parsed.text["script"][-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(each["content"] for each in parsed.all("meta") if "http-equiv" in each)
    assert f"script-src 'sha256-{digest}'" in str(policy)
    data = data_of(shown.output)
    assert data["names"] == [EVIL]
    assert data["detectors"][0]["why"] == dict.fromkeys("012", EVIL)


def test_what_a_reader_sees_first(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.csv",
        {"a": range(120), "b": range(120)},
        flags={"a": [0] * 113 + [1] * 7},
        basis="200 real images; nominal 0.05",
        errors=2,
    )
    shown = package.show(path)
    sentence = (
        "7 of 120 images (5.8 %) are flagged as out of distribution by a at a false-alarm rate "
        "of 5 %."
    )
    assert (shown.sentence, shown.flagged) == (sentence, {"a": 7, "b": None})
    assert (shown.rows, shown.unreadable, shown.listed, shown.thumbnails) == (122, 2, 120, 0)
    text = shown.output.read_text("utf-8").replace("\u00a0", " ").replace("\u2011", "-")
    assert re.search(rf"<h1[^>]*>{re.escape(sentence)}</h1>", text)
    assert "about 6 images would be flagged. 2 unreadable." in text
    assert text.count("<figure title=") == 48 + 12  # b has the same order
    data = data_of(shown.output)
    assert [each["name"] for each in data["detectors"]] == ["a", "b"]
    assert data["detectors"][1]["sentence"] == (
        "120 images scored by b; no threshold says which are out of distribution."
    )


@pytest.mark.parametrize(
    ("rows", "errors", "words"),
    [(0, 0, "s.csv has no rows."), (0, 3, "None of 3 images could be read."), (1, 0, "1 image ")],
)
def test_a_file_with_next_to_nothing(tmp_path, monkeypatch, rows, errors, words) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("s.csv"), {"a": [1.0] * rows}, errors=errors)
    shown = package.show("s.csv")
    Page(shown.output.read_text("utf-8"))
    assert shown.sentence.startswith(words)


def test_the_command(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("s.csv"), {"a": [1, 2]}, paths=["x.png", "none.png"])
    Image.new("RGB", (9, 5), (255, 0, 0)).save("x.png")
    done = oodcli("show", "s.csv", "--json")
    assert (done.status, done.err.count("\n")) == (0, 2)
    assert json.loads(done.out)["output"] == "s.html"
    assert json.loads(done.out)["thumbnails"] == 1
    assert "oodcli show s.csv --json" in Path("s.html").read_text("utf-8")
    before = Path("s.html").read_bytes()
    fails("s.html exists", "show", "s.csv", leaves=tmp_path)
    assert oodcli("show", "s.csv", "--force", "--no-thumbnails", "-q").err == ""
    assert len(Path("s.html").read_bytes()) < len(before)
    fails("expected a name that ends in .html", "show", "s.csv", "-o", "p.txt", leaves=tmp_path)
    fails("no column 'b'", "show", "s.csv", "-d", "b", "-o", "p.html", leaves=tmp_path)
    fails("far does not exist", "show", "s.csv", "--images", "far", "-o", "p.html", leaves=tmp_path)
    fails("t.csv does not exist", "show", "t.csv", leaves=tmp_path)
    fails("s.html: expected a scores file", "show", "s.html", leaves=tmp_path)
    os.mkfifo("pipe.csv")
    fails("name the page with -o", "show", "pipe.csv", leaves=tmp_path)
    Path("t.csv").write_text(Path("s.csv").read_text() + "cut")
    fails("t.csv, line 4: 1 cells", "show", "t.csv", leaves=tmp_path)


def test_images_that_have_moved(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("a/1.png", "a/2.png", "b/1.png")
    for place, name in enumerate(names):
        path = tmp_path / "elsewhere" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (80 * place, 0, 0)).save(path)
    write(Path("s.csv"), {"a": [1, 2, 3]}, paths=[f"old/place/{name}" for name in names])
    assert package.show("s.csv").thumbnails == 0
    shown = package.show("s.csv", images="elsewhere", force=True)
    assert shown.thumbnails == 3
    sources = [each["src"] for each in Page(shown.output.read_text("utf-8")).all("img")]
    reds = []
    for source in sources:
        content = base64.b64decode(str(source).partition(",")[2])
        (tmp_path / "t.jpg").write_bytes(content)
        with Image.open(tmp_path / "t.jpg") as image:
            reds.append(image.getpixel((50, 50))[0])
    np.testing.assert_allclose(reds, [160, 80, 0], atol=4)  # the most suspicious first
    # A name alone may be that of another image.
    write(Path("t.csv"), {"a": [1, 2]}, paths=["old/1.png", "old/2.png"])
    assert package.show("t.csv", images="elsewhere").thumbnails == 0
    Image.new("RGB", (9, 9)).save(tmp_path / "elsewhere" / "1.png")
    assert package.show("s.csv", images="elsewhere", force=True).thumbnails == 3
    # In a list, 1.png is the name of two images, and 2.png of one.
    Path("list.txt").write_text("".join(f"elsewhere/{name}\n" for name in names))
    assert package.show("t.csv", images="list.txt", force=True).thumbnails == 1


# --- score ------------------------------------------------------------------------------------


def test_score_makes_it_too(small: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = small / "c.h5"
    assert oodcli("fit", cache, "-d", "energy", "--calibrate", cache, "-o", "fitted").status == 0
    score = ("score", small / "net.pt", "noise:blob?n=30", "-d", "fitted/energy.safetensors")
    fails("--html shows a scores file", *score, "--html", "p.html")
    Path("p.html").write_text("mine")
    fails("p.html exists", *score, "-o", "s.csv", "--html", "p.html", leaves=tmp_path)
    done = oodcli(*score, "--fpr", 0.3, "-o", "s.csv", "--html", "p.html", "--force")
    assert (done.status, "wrote p.html" in done.err) == (0, True)
    made = json.loads(Path("s.csv.json").read_text())["calibration"]["energy"]
    assert (made["rate"], made["images"], len(made["quantiles"])) == (0.3, "9 real images", 10)
    [one] = data_of(Path("p.html"))["detectors"]
    assert one["threshold"] == made["threshold"]
    assert sum(one["expected"]) == pytest.approx(30, abs=0.1)
    text = Path("p.html").read_text("utf-8")
    assert text.count("data:image/jpeg") == 30  # noise is drawn again
    # Of an older version, without metadata: the verdicts are the same.
    Path("s.csv.json").unlink()
    shown = package.show("s.csv", "q.html")
    assert shown.flagged == {"energy": sum(n > made["threshold"] for n in one["scores"])}
    assert data_of(Path("q.html"))["detectors"][0]["expected"] == []


def test_a_damaged_calibration_is_an_error(small: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert oodcli("score", small / "c.h5", "-d", "msp", "-o", "s.csv").status == 0
    made = json.loads(Path("s.csv.json").read_text())
    good = {"images": "3 real images", "rate": 0.1, "threshold": "inf", "quantiles": [1, 2, "inf"]}
    for change in (
        {"quantiles": [2, 1]},
        {"quantiles": 3},
        {"threshold": None},
        {"rate": "x"},
        {"images": 3},
        {},
    ):
        about = {**made, "calibration": {"msp": {**good, **change}}}
        Path("s.csv.json").write_text(json.dumps(about))
        if change:
            fails("is damaged (calibration)", "show", "s.csv")
    assert oodcli("show", "s.csv").status == 0


def test_noise_is_drawn_again() -> None:
    preprocessing = {"input_size": [8, 8], "mean": [0.5], "std": [0.2]}
    found = []
    for seed in (0, 1):
        made = {"source": f"noise:uniform?n=9&seed={seed}", "preprocessing": preprocessing}
        source, size = noise_of(made)
        found.append(read_thumbnails(["noise:uniform[3]", "noise:uniform[9]"], source, size))
    assert [each.keys() for each in found] == [{"noise:uniform[3]"}] * 2
    assert found[0] != found[1]
    with Image.open(io.BytesIO(found[0]["noise:uniform[3]"])) as image:
        assert image.size == (8, 8)
    for other in (None, {"source": "noise:none"}, {**made, "source": "photos"}):
        assert noise_of(other)[0] is None


def test_as_many_images_are_expected_as_there_are(tmp_path: Path) -> None:
    """Also where scores of the calibration lie beyond the axis."""
    path = write(tmp_path / "s.csv", {"a": range(50)}, flags={"a": [0] * 50})
    quantiles = [-1e9, *range(10, 30), 1e9, math.inf]
    about = {"images": "i", "rate": 0.1, "threshold": 60, "quantiles": quantiles}
    found = replace(listed(path), made={"calibration": {"a": about}})
    [one] = overviews(found)
    assert sum(one.expected) == pytest.approx(50, abs=0.1)
    assert (one.low, one.high) == pytest.approx((-27.75, 66.75))
    assert one.expected[0] > 0
    assert one.calibration is not None
    np.testing.assert_allclose(
        one.calibration.below(np.array([-2e9, 10, 10.5, 29, 2e9])),
        np.array([0, 1, 1.5, 20, 21]) / 22,
    )
