"""The page of the report: self-contained, harmless whatever the files hold, and the same twice."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import oodcli
from pages import EVIL, Page
from PIL import Image

from oodcli import metrics
from oodcli.errors import FileError
from oodcli.files.scores import Scores, read_scores
from oodcli.report import figures, page
from oodcli.report.evaluation import evaluate_files
from oodcli.report.files import CALIBRATION, NAMES, refuse_existing_report, write_report
from oodcli.report.thresholds import (
    Threshold,
    accepting_threshold,
    flagged_shares,
    verdict_threshold,
)
from oodcli.report.thumbnails import SIDE, read_thumbnails


def made(
    detectors: Mapping[str, Sequence[float]],
    paths: Sequence[str] | None = None,
    source: str = "s.csv",
    predicted: str = "cat",
) -> Scores:
    columns = {name: np.array(column, float) for name, column in detectors.items()}
    rows = len(next(iter(columns.values())))
    return Scores(
        source=source,
        paths=tuple(paths or (f"gone/{i}.png" for i in range(rows))),
        labels=("",) * rows,
        predicted=(predicted,) * rows,
        confidence=np.full(rows, 0.5),
        detectors=columns,
        errors=("",) * rows,
    )


def sample(rows: int = 40) -> tuple[Scores, dict[str, Scores]]:
    random = np.random.default_rng(0)
    names = ("weak", "strong")
    id_scores = made({name: random.normal(size=2 * rows) for name in names}, source="id.csv")
    ood = {
        place: made({name: random.normal(k + s, size=rows) for k, name in enumerate(names)})
        for s, place in enumerate(("near", "far"))
    }
    return id_scores, ood


def written(
    folder: Path, id_scores: Scores, ood: Mapping[str, Scores], resamples: int = 5, **more: bool
) -> str:
    evaluation = evaluate_files(id_scores, ood, resamples=resamples)
    write_report(evaluation, id_scores, ood, folder, **more)
    return (folder / "report.html").read_text(encoding="utf-8")


def with_p_values(scores: Scores) -> Scores:
    ranks = scores.detectors["strong"].argsort().argsort()
    p = 1 - ranks / len(ranks)
    flagged = int((p <= 0.1).sum())
    words = "200 real images; nominal 0.1"
    return replace(scores, p_values={"strong": p}, verdicts={"strong": (flagged, words)})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("report"), *sample())


def test_it_needs_nothing_else(text: str) -> None:
    parsed = Page(text)
    for _, attributes in parsed.tags:
        for name in ("src", "href", "data", "action", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#"))
        assert not any(name.startswith("on") for name in attributes)
    assert not parsed.all("link")
    assert not re.search(r"url\(|@import|https?:", text)
    drawings = [image for image in parsed.all("img") if "svg" in (image["src"] or "")]
    assert len(drawings) == 2 + 2 * 2  # heat map, ROC curves, and two of each detector
    for image in drawings:
        svg = base64.b64decode((image["src"] or "").split(",")[1]).decode("utf-8")
        assert svg.startswith("<svg")
        assert not re.search(r'(?:href|src)="(?!#|data:)|url\((?!#)', svg)
        assert image["alt"]


def test_the_policy_lets_our_script_run_and_no_other(text: str) -> None:
    parsed = Page(text)
    policy = next(m["content"] for m in parsed.all("meta") if "http-equiv" in m)
    (script,) = parsed.text["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )


def test_what_a_reader_looks_for(text: str) -> None:
    parsed = Page(text)
    assert [s["id"] for s in parsed.all("section")] == [
        *("summary", "heatmap", "metrics", "roc", "detectors", "images", "made")
    ]
    assert "prefers-color-scheme:dark" in text
    assert "@media print" in text
    headings = {" ".join(data.split()) for data in parsed.text["th"]}
    assert {"FPR95 (ID positive) ↓", "FPR95 (OOD positive) ↓"} <= headings
    assert "FPR95 with OOD as the positive class (OpenOOD, pytorch-ood)" in text
    assert "<dt>Best by mean AUROC</dt><dd>strong<small>of 2 detectors" in text
    assert "<dt>Hardest set</dt><dd>near<small>" in text
    assert "95 %, percentile bootstrap, 5 resamples, seed 0" in text


def test_tables_can_be_sorted(text: str) -> None:
    parsed = Page(text)
    tables = [table for table in parsed.all("table") if table.get("class") == "sortable"]
    assert len(tables) == 4  # the mean, two sets, the files
    assert 'querySelectorAll("table.sortable")' in parsed.text["script"][0]
    evaluation = evaluate_files(*sample(), resamples=5)
    value = evaluation.get("weak", "mean", "auroc").value
    assert f'data-value="{value:.6g}">{100 * value:.2f} <small>[' in text


def test_the_best_detector_comes_first_and_open(text: str) -> None:
    section = text.partition('<section id="detectors">')[2].partition("</section>")[0]
    found = re.findall(r"<details( open)?><summary>(\w+) ", section)
    assert found == [(" open", "strong"), ("", "weak")]


def test_one_set_without_intervals(tmp_path: Path) -> None:
    id_scores, ood = sample()
    text = written(tmp_path, id_scores, {"near": ood["near"]}, resamples=0)
    Page(text)
    assert "<dt>Best by AUROC</dt>" in text
    assert "Hardest set" not in text
    assert "nan" not in re.sub(r'src="[^"]*"', "", text)
    assert "none (0 resamples" in text


def test_nothing_in_a_file_can_run(tmp_path: Path) -> None:
    evil = {EVIL: [1.0, 2.0, 3.0]}
    id_scores = made({EVIL: [0.0, 1.0, math.inf]}, [EVIL + ".png"] * 3, EVIL, EVIL)
    id_scores = replace(
        id_scores,
        labels=(EVIL,) * 3,
        saw={EVIL: EVIL},
        verdicts={EVIL: (1, EVIL)},
        p_values={EVIL: np.array([0.9, 0.5, 0.1])},
        made={"command": EVIL, "source": EVIL},
    )
    ood = {EVIL: made(evil, [f"{EVIL}{i}\udcff.png" for i in range(3)], EVIL, EVIL)}
    evaluation = replace(evaluate_files(id_scores, ood, resamples=2), command=EVIL)
    write_report(evaluation, id_scores, ood, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert len(parsed.all("script")) == 1
    assert all("onerror" not in attributes for _, attributes in parsed.tags)
    assert text.count("&lt;script&gt;alert(1)") > 20
    assert "alert(1)</script>" not in text
    for svg in tmp_path.glob("*.svg"):
        assert "<script" not in svg.read_text(encoding="utf-8")


def picture(path: Path, colour: tuple[int, int, int]) -> str:
    Image.new("RGB", (40, 20), colour).save(path)
    return path.as_posix()


def test_thumbnails_of_every_kind_of_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In relative and absolute folders; what cannot be opened again is left out."""
    monkeypatch.chdir(tmp_path)
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    (tmp_path / "sub").mkdir()
    alone = picture(tmp_path / "sub" / "a [1].png", red)
    with zipfile.ZipFile("z.zip", "w") as archive:
        archive.write(alone, "in/side.png")
    array = np.zeros((3, 8, 8, 3), np.uint8)
    array[2] = green
    np.savez("f.npz", images=array, labels=np.arange(3))
    picture(tmp_path / "blue.png", blue)
    Path("bad.png").write_bytes(b"no image")
    Path("bad.npz").write_bytes(b"no archive")
    os.mkfifo("pipe.png")
    expected = {
        alone: red,
        "sub/a [1].png": red,
        "z.zip/in/side.png": red,
        f"{tmp_path.as_posix()}/z.zip/in/side.png": red,
        "f.npz[2]": green,
        "blue.png": blue,
    }
    unreadable = [
        *("bad.png", "bad.npz[0]", "f.npz[3]", "f.npz[99999999]", "z.zip/none.png", "gone.png"),
        *("noise:uniform[0]", "torchvision:CIFAR10[1]", "", "-", "-[1]", "nul\0.png", "\udcff.png"),
        *("x" * 5000, "sub", "pipe.png", "http://example.org/a.png", "z.zip"),
    ]
    found = read_thumbnails([*expected, *unreadable, "blue.png"])
    assert list(found.keys() - expected.keys()) == []
    for path, colour in expected.items():
        with Image.open(io.BytesIO(found[path])) as image:
            assert (image.format, image.size) == ("JPEG", (SIDE, SIDE))
            np.testing.assert_allclose(np.asarray(image)[48, 48], colour, atol=3)


def test_a_file_with_the_name_of_something_else_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-", "noise:uniform?n=1"):
        Path(name).write_bytes(b"")
    monkeypatch.setattr("sys.stdin", None)  # whoever read it would fail
    assert read_thumbnails(["-/a.png", "noise:uniform?n=1/noise:uniform[0]", "-[0]"]) == {}


def test_large_archives_are_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.npz"
    np.savez(path, images=np.zeros((1, 8, 8, 3), np.uint8))
    assert read_thumbnails([f"{path}[0]"])
    monkeypatch.setattr("oodcli.report.thumbnails.LARGEST", 10)
    assert read_thumbnails([f"{path}[0]"]) == {}


def thumbnails_of(text: str) -> list[dict[str, str | None]]:
    images = Page(text).all("img")
    return [image for image in images if (image["src"] or "").startswith("data:image/jpeg")]


def test_the_page_shows_what_can_be_read(tmp_path: Path) -> None:
    names = [picture(tmp_path / f"{k:02}.png", (9 * k, 0, 0)) for k in range(20)]
    id_scores = made({"d": np.arange(3.0)}, ["gone.png", names[0], "gone/too.png"])
    ood = {"far": made({"d": np.arange(20.0)}, names)}
    text = written(tmp_path / "report", id_scores, ood)
    assert len(thumbnails_of(text)) == 1 + 2 * page.SHOWN
    for heading, first, last in (
        ("far: the most OOD", "19.png", "12.png"),
        ("far: the least OOD", "00.png", "07.png"),
    ):
        strip = text.partition(f"<h3>{heading}</h3>")[2].partition("</div>")[0]
        shown = re.findall(r"<span>([^<]*)</span>", strip)
        assert (shown[0], shown[-1], len(shown)) == (first, last, 8)
        assert f"in {tmp_path.as_posix()}/" in strip
    assert "<b>2</b><br>predicted cat<br><span>gone/too.png</span>" in text
    none = written(tmp_path / "none", id_scores, ood, thumbnails=False)
    assert thumbnails_of(none) == []
    assert "<span>19.png</span>" in none


@pytest.mark.slow
def test_few_rows_are_shown_once(tmp_path: Path) -> None:
    text = written(tmp_path, made({"d": [0.0]}), {"far": made({"d": np.arange(10.0)})})
    assert re.findall(r"<h3>far: [^<]*</h3>.*?</div>", text)
    assert text.count("<span>9.png</span>") == 1
    assert text.count("<span>1.png</span>") == 1
    small = written(tmp_path / "small", made({"d": [0.0]}), {"far": made({"d": [1.0]})})
    assert "the least OOD" not in small


@pytest.mark.slow
def test_the_same_bytes(tmp_path: Path) -> None:
    id_scores, ood = sample()
    id_scores = with_p_values(id_scores)
    for name in ("a", "b"):
        written(tmp_path / name, id_scores, ood)
    for name in NAMES + CALIBRATION:
        one, other = ((tmp_path / folder / name).read_bytes() for folder in "ab")
        assert one == other, name
        if name.endswith(".svg"):
            Page(one.decode("utf-8").partition("?>")[2])
            assert b"<dc:date>" not in one


def test_every_figure_is_there_twice() -> None:
    names = set(NAMES + CALIBRATION)
    drawn = {name.removesuffix(".png") for name in names if name.endswith(".png")}
    assert drawn == {"roc", "histograms", "heatmap", "calibration"}
    assert {f"{name}.svg" for name in drawn} <= names


@pytest.mark.slow
def test_calibration_only_with_p_values(tmp_path: Path) -> None:
    id_scores, ood = sample()
    text = written(tmp_path, with_p_values(id_scores), ood)
    assert '<section id="calibration">' in text
    assert {path.name for path in tmp_path.iterdir()} == set(NAMES + CALIBRATION)
    assert re.search(r'<td data-value="0.1">10\.00</td></tr>', text)
    with pytest.raises(FileError, match=r"exists: .*--force"):
        written(tmp_path, id_scores, ood)
    again = written(tmp_path, id_scores, ood, force=True)
    assert "calibration" not in re.sub(r'src="[^"]*"', "", again).lower()
    assert {path.name for path in tmp_path.iterdir()} == set(NAMES)  # none of the other rows left


def test_a_calibration_figure_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "calibration.svg").write_text("mine")
    with pytest.raises(FileError, match=r"calibration\.svg exists"):
        refuse_existing_report(tmp_path)


def test_flagged_shares_by_hand() -> None:
    scores = replace(
        made({"a": [1.0, 2.0, math.inf, 3.0]}),
        p_values={"a": np.array([0.5, 0.05, 1.0, math.nan])},
    )
    got = flagged_shares(scores, "a", np.array([0.0, 0.05, 0.5, 1.0]))
    np.testing.assert_array_equal(got, [0.25, 0.5, 0.75, 0.75])


@pytest.mark.parametrize("n", [1, 2, 19, 20, 21, 100])
def test_the_threshold_is_that_of_tnr95(n: int) -> None:
    random = np.random.default_rng(n)
    id_scores, ood = random.normal(size=n).round(1), random.normal(size=50).round(1)
    threshold = accepting_threshold(id_scores)
    assert (ood > threshold).mean() == metrics.tnr95(id_scores, ood)
    assert (id_scores <= threshold).mean() >= 0.95
    assert threshold in id_scores


def judged(scores: Sequence[float], flagged: int, basis: str = "b") -> Scores:
    return replace(made({"a": scores}), verdicts={"a": (flagged, basis)})


def test_the_verdicts_threshold_lies_between_what_was_accepted_and_what_was_not() -> None:
    one, other = judged([0, 1, 5], 1), judged([2, 4, 9], 2)
    assert verdict_threshold("a", [one, other]) == Threshold(2, 4)
    assert Threshold(2, 4).middle == 3
    assert verdict_threshold("a", [one, made({"a": [1.0]})]) == Threshold(1, 5)
    stated = judged([0, 9], 1, "score above 3.25")
    assert verdict_threshold("a", [stated]) == Threshold(3.25, 3.25)


def test_no_threshold_where_none_can_be_known() -> None:
    assert verdict_threshold("a", [made({"a": [1.0]})]) is None
    assert verdict_threshold("a", [judged([0, 1], 0)]) is None
    assert verdict_threshold("a", [judged([0, 1], 2)]) is None
    assert verdict_threshold("a", [judged([0, math.inf], 1)]) is None
    assert verdict_threshold("a", [judged([0, 1], 1), judged([0, 1], 1, "c")]) is None
    assert verdict_threshold("a", [judged([0, 5], 1), judged([0, 6, 7], 1)]) is None
    for word in ("x", "inf", "nan"):
        assert verdict_threshold("a", [judged([0, 1], 1, f"score above {word}")]) is None


def test_thresholds_are_drawn() -> None:
    id_scores, ood = sample()
    id_scores = with_p_values(id_scores)
    evaluation = evaluate_files(id_scores, ood, resamples=0)
    verdict = verdict_threshold("strong", [id_scores])
    assert verdict is not None
    panel, _ = figures.detector_figures(evaluation, id_scores, ood, "strong")
    upright = [x[0] for x in (line.get_xdata() for line in panel.axes[0].lines) if x[0] == x[1]]
    assert upright == [accepting_threshold(id_scores.detectors["strong"]), verdict.middle]
    whole = figures.histogram_figure(evaluation, id_scores, ood)
    assert [len(axes.lines) for axes in whole.axes[:2]] == [1, 2]


@pytest.mark.parametrize("sets", [1, 7])
def test_small_figures_cut_nothing_off(sets: int) -> None:
    random = np.random.default_rng(0)
    names = [f"imagenet-samples-with-a-long-name-{s}" for s in range(sets)]
    id_scores = with_p_values(made({"strong": 1e6 * random.normal(size=90)}))
    ood = {name: made({"strong": 1e6 * random.normal(size=30)}) for name in names}
    evaluation = evaluate_files(id_scores, ood, resamples=3)
    both = (*figures.detector_figures(evaluation, id_scores, ood, "strong"),)
    for figure in (*both, figures.calibration_figure(evaluation, id_scores)):
        figure.canvas.draw()
        drawn = figure.get_tightbbox()
        assert drawn.x0 >= 0
        assert drawn.y0 >= 0
        assert drawn.x1 <= figure.get_figwidth()
        assert drawn.y1 <= figure.get_figheight()
        legends = [legend.get_window_extent() for legend in figure.legends]
        panels = [axes.get_tightbbox() for axes in figure.axes]
        assert not any(legend.overlaps(panel) for legend in legends for panel in panels)


HEADER = "path,label,predicted,confidence,a,a.p,error\n"


def test_p_values_are_read(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text(f"{HEADER}1.png,,cat,0.5,1,0.25,\n2.png,,,,,,gone\n3.png,,cat,0.5,2,,\n")
    got = read_scores(path)
    assert got.p_values.keys() == {"a"}
    np.testing.assert_array_equal(got.p_values["a"], [0.25, math.nan])
    for cell, words in (("x", "expected a number"), ("1.5", "expected 0 to 1")):
        path.write_text(f"{HEADER}1.png,,cat,0.5,1,{cell},\n")
        with pytest.raises(FileError, match=rf"s\.csv, line 2: a\.p is .*{words}"):
            read_scores(path)


def test_evaluate_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = Path(picture(tmp_path / "x.png", (1, 2, 3))).name
    for file, score in (("id.csv", 0), ("ood.csv", 1)):
        Path(file).write_text(f"{HEADER}{name},,cat,0.5,{score},0.5,\n")
    command = ("evaluate", "--id", "id.csv", "--ood", "far=ood.csv", "-o", "report")
    done = oodcli(*command)
    assert (done.status, "wrote 13 files to report" in done.err) == (0, True)
    text = Path("report", "report.html").read_text(encoding="utf-8")
    assert len(thumbnails_of(text)) == 2
    assert "oodcli evaluate --id id.csv --ood far=ood.csv -o report" in text
    refused = oodcli(*command)
    assert (refused.status, "exists" in refused.err) == (1, True)
    assert oodcli(*command, "--force", "--no-thumbnails").status == 0
    assert thumbnails_of(Path("report", "report.html").read_text(encoding="utf-8")) == []
