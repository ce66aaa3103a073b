"""The report: what is counted and left out, what is in each file, and that all of them appear."""

from __future__ import annotations

import csv
import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from oodcli import metrics
from oodcli.errors import FileError
from oodcli.files.scores import Scores
from oodcli.metrics import CONVENTIONS
from oodcli.report import figures, tables
from oodcli.report.evaluation import Counts, Evaluation, evaluate_files
from oodcli.report.files import NAMES, refuse_existing_report, write_report


def scores(
    detectors: Mapping[str, Iterable[float]],
    *,
    source: str = "s.csv",
    labels: Iterable[str] | None = None,
    errors: Iterable[str] | None = None,
) -> Scores:
    columns = {name: np.array(list(column), float) for name, column in detectors.items()}
    rows = len(next(iter(columns.values())))
    reasons = tuple(errors) if errors is not None else ("",) * rows
    rows = len(reasons)
    return Scores(
        source=source,
        paths=tuple(f"{i}.png" for i in range(rows)),
        labels=tuple(labels) if labels is not None else ("",) * rows,
        predicted=("cat",) * rows,
        confidence=np.full(rows, 0.5),
        detectors=columns,
        errors=reasons,
    )


def sample(sets: int, detectors: int, rows: int = 60) -> tuple[Scores, dict[str, Scores]]:
    rng = np.random.default_rng(0)
    names = [f"detector-{k}" for k in range(detectors)]
    ood = {
        f"imagenet-samples-{s}": scores(
            {name: rng.normal(0.2 * k + 0.3 * s, size=rows) for k, name in enumerate(names)}
        )
        for s in range(sets)
    }
    return scores({name: rng.normal(size=2 * rows) for name in names}), ood


def evaluated(sets: int, detectors: int, resamples: int = 0) -> Evaluation:
    return evaluate_files(*sample(sets, detectors), resamples=resamples)


# Two detectors: a perfect one and its opposite; on "near", b is as good as a coin.
ID_SCORES = scores({"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]}, labels=["cat", "dog", "", "cat"])
OOD_SCORES = {
    "far": scores({"a": [4, 5], "b": [-1, -2]}),
    "near": scores({"a": [4, 9], "b": [1, 2]}),
}


def by_hand() -> Evaluation:
    return evaluate_files(ID_SCORES, OOD_SCORES, resamples=20)


def test_every_metric_of_every_set() -> None:
    evaluation = by_hand()
    assert evaluation.detectors == ("a", "b")
    assert evaluation.sets == ("far", "near")
    assert [(r.detector, r.set, r.metric) for r in evaluation.rows] == [
        (detector, name, metric)
        for detector in "ab"
        for name in ("far", "near", "mean")
        for metric in CONVENTIONS
    ]
    assert evaluation.get("a", "mean", "auroc") == (1.0, 1.0, 1.0)
    assert evaluation.get("b", "far", "auroc").value == 0.0
    assert evaluation.get("b", "near", "auroc").value == 0.5
    assert evaluation.get("b", "mean", "auroc").value == 0.25
    assert evaluation.get("b", "far", "tnr95").value == metrics.tnr95([0, 1, 2, 3], [-1, -2])


def test_accuracy_is_of_the_labelled_rows() -> None:
    evaluation = by_hand()
    assert (evaluation.accuracy, evaluation.labelled) == (2 / 3, 3)
    assert tables.accuracy_line(evaluation).endswith("3 labelled ID rows: 66.67 %.")


def test_no_labels_no_accuracy() -> None:
    evaluation = evaluated(1, 1)
    assert (evaluation.accuracy, evaluation.labelled) == (None, 0)
    assert tables.accuracy_line(evaluation) == ""


def test_labels_of_another_kind_are_no_accuracy_of_zero() -> None:
    numbered = replace(ID_SCORES, labels=("3", "5", "", "3"))
    evaluation = evaluate_files(numbered, OOD_SCORES, resamples=0)
    assert evaluation.accuracy is None
    assert any("no label (3, …) is among the predicted" in note for note in evaluation.notes)


def test_unreadable_and_infinite_rows_are_counted() -> None:
    id_scores = scores({"a": [0, math.inf], "b": [0, 1]}, source="i.csv", errors=["", "gone", ""])
    ood = {"far": scores({"a": [math.inf], "b": [math.inf]}, source="f.csv")}
    evaluation = evaluate_files(id_scores, ood, resamples=0)
    assert evaluation.counts == (
        Counts("ID", "i.csv", rows=3, unreadable=1, infinite={"a": 1}),
        Counts("far", "f.csv", rows=1, unreadable=0, infinite={"a": 1, "b": 1}),
    )
    assert evaluation.get("a", "far", "auroc").value == 0.75
    assert evaluation.notes == (
        "ID: 1 of 3 rows could not be read and are left out.",
        "ID: infinite scores, counted as the most OOD: a 1.",
        "far: infinite scores, counted as the most OOD: a 1, b 1.",
        "ID: only 2 rows; 95 % of fewer than 20 rows is all of them, so the thresholds at 95 % "
        "are single rows.",
    )


def test_a_detector_that_is_missing_somewhere_is_left_out_and_named() -> None:
    ood = OOD_SCORES | {"odd": scores({"b": [1.0], "c": [1.0]})}
    evaluation = evaluate_files(ID_SCORES, ood, resamples=0)
    assert evaluation.detectors == ("b",)
    assert "a is left out: it is not in the scores of odd." in evaluation.notes
    assert "c is left out: it is not in the scores of ID, far, near." in evaluation.notes


def test_refused() -> None:
    with pytest.raises(FileError, match="no OOD set"):
        evaluate_files(ID_SCORES, {})
    with pytest.raises(FileError, match=r"no detector is in all files \(.*x\.csv: c\)"):
        evaluate_files(ID_SCORES, {"far": scores({"c": [1]}, source="x.csv")})
    for name in ("mean", "ID"):
        with pytest.raises(FileError, match=f"--ood {name}=…: .* choose another"):
            evaluate_files(ID_SCORES, {name: OOD_SCORES["far"]})
    empty = scores({"a": []}, source="e.csv", errors=["no such file"])
    with pytest.raises(FileError, match=r"e\.csv: none of its 1 rows has scores; .* no such file"):
        evaluate_files(ID_SCORES, {"far": empty})


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    evaluate_files(*sample(1, 3), resamples=0, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_one_set_has_no_mean_in_the_tables_but_in_the_rows() -> None:
    evaluation = evaluated(1, 1)
    assert evaluation.columns == evaluation.sets
    assert evaluation.rows[-1].set == "mean"
    assert evaluated(2, 1).columns[-1] == "mean"


def test_the_best_share_the_honour_where_the_table_shows_one_number() -> None:
    evaluation = by_hand()
    assert evaluation.best("far", "auroc") == {"a"}
    assert evaluation.best("far", "fpr95") == {"a"}  # lower is better
    close = [
        replace(r, value=r.value - 4e-6) if r.detector == "a" else replace(r, value=1.0)
        for r in evaluation.rows
    ]
    assert replace(evaluation, rows=tuple(close)).best("far", "auroc") == {"a", "b"}


def test_table_rows_are_percents() -> None:
    header, rows = tables.table_rows(by_hand(), "auroc")
    assert header == ["detector", "far", "near", "mean"]
    assert rows == [["a", "100.00", "100.00", "100.00"], ["b", "0.00", "50.00", "25.00"]]


def test_csv_are_fractions_of_six_digits(tmp_path: Path) -> None:
    tables.write_csv(by_hand(), tmp_path / "m.csv")
    with (tmp_path / "m.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["detector", "set", "metric", "value", "low", "high"]
    assert rows[1] == ["a", "far", "auroc", "1", "1", "1"]
    assert len(rows) == 1 + 2 * 3 * len(CONVENTIONS)
    evaluation = evaluated(1, 1)
    tables.write_csv(evaluation, tmp_path / "m.csv")
    line = (tmp_path / "m.csv").read_text().splitlines()[1]
    value = evaluation.rows[0].value
    assert line == f"detector-0,imagenet-samples-0,auroc,{value:.6f},,"


def test_json_says_everything(tmp_path: Path) -> None:
    tables.write_json(by_hand(), tmp_path / "m.json")
    got = json.loads((tmp_path / "m.json").read_text())
    assert got["unit"] == "fraction"
    assert got["conventions"] == CONVENTIONS
    assert got["interval"]["resamples"] == 20
    assert got["counts"][1] == {
        "set": "far",
        "source": "s.csv",
        "rows": 2,
        "unreadable": 0,
        "infinite": {},
    }
    assert got["metrics"][0] == {
        "detector": "a",
        "set": "far",
        "metric": "auroc",
        "value": 1.0,
        "low": 1.0,
        "high": 1.0,
    }
    tables.write_json(evaluated(1, 1), tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text())["metrics"][0]["low"] is None


def test_markdown() -> None:
    text = tables.markdown(by_hand())
    assert "| detector | far | near | mean |\n| --- | ---: | ---: | ---: |\n" in text
    assert "| a | **100.00** | **100.00** | **100.00** [100.00, 100.00] |" in text
    assert "## FPR95 (ID positive) ↓" in text
    assert "## FPR95 (OOD positive) ↓" in text
    for meaning in CONVENTIONS.values():
        assert meaning in text
    assert "\n* ID: only 4 rows;" in text
    assert "[" not in tables.markdown(evaluated(2, 1)).split("## AUROC")[1]  # no resamples


def test_names_cannot_break_the_tables() -> None:
    ood = {"a|b_c": scores({"50%_&*": [1.0, 2.0]})}
    evaluation = evaluate_files(scores({"50%_&*": [0.0]}), ood, resamples=0)
    assert r"| detector | a\|b\_c |" in tables.markdown(evaluation)
    text = tables.latex(evaluation)
    assert r"detector & a\textbar{}b\_c \\" in text
    assert r"50\%\_\&{*} & \textbf{100.00} \\" in text


SEEN = {
    "ID": replace(ID_SCORES, saw={"b": "OOD images (x_1.h5)"}),
    "far": replace(OOD_SCORES["far"], saw={"b": "OOD images (x_1.h5)"}),
    "near": replace(OOD_SCORES["near"], saw={"b": "OOD images (x_1.h5)"}),
}
NOTE = "* has learnt from OOD data, unlike the others: b from OOD images (x_1.h5)."


def seen(**files: Scores) -> Evaluation:
    """The detectors of ``by_hand``, of which b has learnt from OOD images."""
    files = SEEN | files
    return evaluate_files(files.pop("ID"), files, resamples=0)


def test_a_detector_that_saw_ood_data_is_marked_in_every_table(tmp_path: Path) -> None:
    evaluation = seen()
    assert evaluation.footnote == NOTE
    markdown = tables.markdown(evaluation)
    assert markdown.count("\n| b\\* |") == markdown.count("\n| a |") == len(CONVENTIONS)
    assert markdown.count("\n" + NOTE.replace("*", "\\*").replace("_", "\\_")) == len(CONVENTIONS)
    latex = tables.latex(evaluation)
    assert latex.count("\nb{*} & ") == latex.count("\na & ") == len(CONVENTIONS)
    assert latex.count(NOTE.replace("*", "{*}").replace("_", r"\_") + "}\n") == len(CONVENTIONS)
    tables.write_csv(evaluation, tmp_path / "m.csv")
    with (tmp_path / "m.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["detector", "set", "metric", "value", "low", "high", "saw"]
    assert {(row["detector"], row["saw"]) for row in rows} == {
        ("a", ""),
        ("b", "OOD images (x_1.h5)"),
    }
    assert tables.as_json(evaluation)["saw_ood"] == {"b": "OOD images (x_1.h5)"}
    assert [line.split()[0] for line in rendered(evaluation, 80)[-2:]] == ["a", "b*"]
    for figure in drawings(evaluation, SEEN["ID"], {"far": SEEN["far"], "near": SEEN["near"]}):
        texts = [text.get_text().replace("\n", " ") for text in figure.findobj(Text)]
        assert NOTE in texts
        assert any(re.fullmatch(r"b\*( .*)?", text) for text in texts)
        assert not any(re.match(r"a\*|b( |$)", text) for text in texts)


def test_nothing_is_marked_where_no_detector_saw_ood_data(tmp_path: Path) -> None:
    evaluation = by_hand()
    assert (evaluation.footnote, evaluation.saw) == ("", {})
    assert tables.as_json(evaluation)["saw_ood"] == {}
    for text in (tables.markdown(evaluation), tables.latex(evaluation)):
        assert "learnt" not in text
        assert not re.search(r"[ab]\\?\{?\*", text.partition("AUROC")[2])
    for figure in drawings(evaluation, ID_SCORES, OOD_SCORES):
        assert not any("*" in text.get_text() for text in figure.findobj(Text))


def test_what_was_seen_is_listed_where_the_files_differ() -> None:
    other = replace(OOD_SCORES["near"], saw={"b": "OOD images (y.h5)"})
    assert "b from OOD images (x_1.h5) | OOD images (y.h5)." in seen(near=other).footnote
    without = seen(near=OOD_SCORES["near"])
    assert without.footnote.endswith("b from OOD images (x_1.h5) | none.")
    assert without.marked("b") == "b*"
    everyone = {
        name: replace(scores, saw={"a": "OOD images (z.h5)", "b": "OOD images (z.h5)"})
        for name, scores in SEEN.items()
    }
    assert seen(**everyone).footnote == (
        "* has learnt from OOD data: a from OOD images (z.h5), b from OOD images (z.h5)."
    )


def test_latex_is_balanced() -> None:
    text = tables.latex(evaluated(3, 2))
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == len(CONVENTIONS)
    assert text.count(r"\begin{tabular}{lrrrr}") == len(CONVENTIONS)
    assert text.count(r" \\") == len(CONVENTIONS) * 3
    assert all(line.count("&") == 4 for line in text.splitlines() if line.endswith(r"\\"))
    assert text.count("{") == text.count("}")
    assert not re.search(r"(?<!\\)%", text), "an unescaped % swallows the rest of its line"
    assert r"\label{tab:ood-fpr95-ood}" in text


def test_the_report_appears_whole(tmp_path: Path) -> None:
    id_scores, ood = sample(2, 2)
    evaluation = evaluate_files(id_scores, ood, resamples=5)
    paths = write_report(evaluation, id_scores, ood, tmp_path / "new" / "report")
    assert [path.name for path in paths] == list(NAMES)
    assert sorted(path.name for path in (tmp_path / "new" / "report").iterdir()) == sorted(NAMES)
    for path in paths:
        assert path.stat().st_size > 100
    assert (tmp_path / "new" / "report" / "roc.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_overwritten_and_nothing_left_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    id_scores, ood = sample(1, 1)
    evaluation = evaluate_files(id_scores, ood, resamples=0)
    (tmp_path / "roc.png").write_text("mine")
    with pytest.raises(FileError, match=r"roc\.png exists: .*--force"):
        write_report(evaluation, id_scores, ood, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["roc.png"]

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(figures, "heatmap_figure", fail)
        with pytest.raises(FileError, match="No space left"):
            write_report(evaluation, id_scores, ood, tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["roc.png"]
    assert (tmp_path / "roc.png").read_text() == "mine"

    write_report(evaluation, id_scores, ood, tmp_path, force=True)
    assert len(list(tmp_path.iterdir())) == len(NAMES)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("")
    with pytest.raises(FileError, match="report is a file, expected a folder"):
        refuse_existing_report(tmp_path / "report", force=True)
    refuse_existing_report(tmp_path / "other")
    (tmp_path / "folder").mkdir()
    refuse_existing_report(tmp_path / "folder")


def drawings(
    evaluation: Evaluation, id_scores: Scores, ood: Mapping[str, Scores]
) -> tuple[Figure, ...]:
    return (
        figures.roc_figure(evaluation, id_scores, ood),
        figures.histogram_figure(evaluation, id_scores, ood),
        figures.heatmap_figure(evaluation),
    )


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(
    ("sets", "detectors"),
    [(1, 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((5, 6), (2, 14)))],
)
@pytest.mark.slow
def test_figures_cut_nothing_off(sets: int, detectors: int, marked: bool) -> None:
    """All that is drawn lies on the page, and no panel with its labels on another."""
    id_scores, ood = sample(sets, detectors)
    if marked:
        saw = dict.fromkeys(id_scores.detectors, "OOD images (of a $long$ name_.h5)")
        id_scores = replace(id_scores, saw=saw)
    evaluation = evaluate_files(id_scores, ood, resamples=0)
    for figure in drawings(evaluation, id_scores, ood):
        figure.canvas.draw()
        drawn = figure.get_tightbbox()  # inches
        assert drawn.x0 >= 0
        assert drawn.y0 >= 0
        assert drawn.x1 <= figure.get_figwidth()
        assert drawn.y1 <= figure.get_figheight()
        panels = [axes.get_tightbbox() for axes in figure.axes]  # with their labels
        for k, one in enumerate(panels):
            assert not any(one.overlaps(other) for other in panels[k + 1 :])


@pytest.mark.slow
def test_figures_of_awkward_scores(tmp_path: Path) -> None:
    """Infinite, constant, or huge scores, and names that matplotlib reads as something else."""
    columns = {
        "$x^$": [1.0, 1.0, 1.0],
        "_hidden": [0.0, math.inf, math.inf],
        "all-inf": [math.inf] * 3,
        "huge": [-1e300, 0.0, 1e300],
    }
    id_scores, ood = scores(columns), {"_雪": scores(columns)}
    evaluation = evaluate_files(id_scores, ood, resamples=0)
    write_report(evaluation, id_scores, ood, tmp_path)
    figure = figures.histogram_figure(evaluation, id_scores, ood)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[1:3] == [" _hidden (4 infinite)", "all-inf (6 infinite)"]


def test_histograms_hold_every_row() -> None:
    column = np.array([0.0, 0.5, 1.0, 50.0, math.inf])
    edges = np.linspace(0.0, 1.0, 5)
    np.testing.assert_allclose(figures._shares(column, edges), [20, 0, 20, 60])


def test_roc_has_the_area_of_auroc() -> None:
    rng = np.random.default_rng(0)
    id_scores, ood_scores = rng.normal(size=500).round(1), rng.normal(1, size=300).round(1)
    id_scores[:3] = math.inf
    x, y = figures._roc(id_scores, ood_scores)
    assert (x[0], y[0], x[-1], y[-1]) == (1, 1, 0, 0)
    assert np.trapezoid(y[::-1], x[::-1]) == pytest.approx(
        metrics.auroc(id_scores, ood_scores), abs=1e-3
    )


def rendered(evaluation: Evaluation, width: int) -> list[str]:
    from rich.console import Console

    table = importlib.import_module("oodcli.cli.tables").evaluation_table(evaluation, width)
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.mark.parametrize(
    ("sets", "detectors", "width", "columns"),
    [(1, 1, 80, 2), (2, 33, 80, 6), (5, 33, 80, 7), (5, 6, 200, 12), (5, 6, 40, 2), (12, 2, 80, 2)],
)
def test_the_terminal_table_fits(sets: int, detectors: int, width: int, columns: int) -> None:
    lines = rendered(evaluated(sets, detectors), width)
    assert max(map(len, lines)) <= width
    rows = [line.split() for line in lines if line.startswith("detector-")]
    assert len(rows) == detectors
    assert all(len(row) == 1 + columns for row in rows)
    assert all(re.fullmatch(r"\d+\.\d\d", cell) for row in rows for cell in row[1:])
    assert "…" not in "".join(lines)


def test_the_terminal_table_has_room_for_the_mark() -> None:
    id_scores, ood = sample(3, 2)
    saw = {"detector-1": "OOD images (x.h5)"}
    evaluation = evaluate_files(replace(id_scores, saw=saw), ood, resamples=0)
    for width in range(30, 100):
        lines = rendered(evaluation, width)
        assert max(map(len, lines)) <= width
        assert [line.split()[0] for line in lines[-2:]] == ["detector-0", "detector-1*"]


def test_the_terminal_table_takes_names_literally() -> None:
    ood = {"[red]far": scores({"[bold]x": [1.0]})}
    lines = "\n".join(rendered(evaluate_files(scores({"[bold]x": [0.0]}), ood, resamples=0), 80))
    assert "[red]far" in lines
    assert "[bold]x" in lines


def test_importing_the_report_is_cheap() -> None:
    code = (
        "import sys, oodcli.report.files\n"
        "slow = {'matplotlib', 'sklearn', 'pyarrow', 'torch', 'scipy'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
