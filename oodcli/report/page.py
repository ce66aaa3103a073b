"""The report of ``evaluate`` as one page: ``page.html.jinja``."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

import numpy as np

from oodcli._version import __version__
from oodcli.files.scores import Scores
from oodcli.metrics import CONVENTIONS, MEAN, Estimate
from oodcli.report import figures, html
from oodcli.report.evaluation import ID, Evaluation
from oodcli.report.html import Cell, Shown, TableRows
from oodcli.report.tables import accuracy_line, title
from oodcli.report.thresholds import accepting_threshold, flagged_shares, verdict_threshold
from oodcli.report.thumbnails import noise_of, read_thumbnails

SHOWN = 8
"""So many images of each kind."""
RATES = (0.01, 0.05, 0.1)
"""Nominal rates in the table of the calibration."""


def page(
    evaluation: Evaluation,
    id_scores: Scores,
    ood_scores: Mapping[str, Scores],
    drawn: Mapping[str, str],
    *,
    thumbnails: bool = True,
) -> str:
    """drawn: the SVG of the figures by name; calibration is there where ID has p-values.
    thumbnails: whether images are opened."""
    files = {ID: id_scores, **ood_scores}
    best = figures.ranked(evaluation)[0]
    calibrated = "calibration" in drawn
    return html.render(
        "page.html.jinja",
        ("base.css", "page.css"),
        ("tables.js", "strips.js"),
        sets=", ".join(evaluation.sets),
        drawn={name: _drawing(svg) for name, svg in drawn.items()},
        best=evaluation.marked(best),
        summary=_summary(evaluation, best),
        notes=evaluation.notes,
        metrics=_metrics(evaluation),
        footnote=evaluation.footnote,
        detectors=_detectors(evaluation, files),
        calibration=_calibration(evaluation, id_scores) if calibrated else None,
        strips=_strips(evaluation, files, best, thumbnails),
        made=_made(evaluation, files),
    )


def _drawing(svg: str) -> str:
    """As an image, which keeps the ids in one drawing from those in another, and scripts out."""
    return f"data:image/svg+xml;base64,{html.encoded(svg[svg.index('<svg') :].encode('utf-8'))}"


def _summary(evaluation: Evaluation, best: str) -> dict[str, object]:
    several = len(evaluation.sets) > 1
    mean = "mean " if several else ""
    auroc = evaluation.get(best, MEAN, "auroc")
    tnr = evaluation.get(best, MEAN, "tnr95")
    hardest = min(evaluation.sets, key=lambda name: evaluation.get(best, name, "auroc").value)
    low_tnr = evaluation.get(best, hardest, "tnr95")
    cards = [
        (
            f"Best by {mean}AUROC",
            evaluation.marked(best),
            f"of {html.counted(len(evaluation.detectors), 'detector')}",
        ),
        ("Mean AUROC" if several else "AUROC", f"{100 * auroc.value:.2f} %", _interval(auroc)),
        ("Mean TNR95" if several else "TNR95", f"{100 * tnr.value:.2f} %", _interval(tnr)),
    ]
    if several:
        on_hardest = evaluation.get(best, hardest, "auroc")
        cards.append(
            (
                "Hardest set",
                hardest,
                f"AUROC {100 * on_hardest.value:.2f} % {_interval(on_hardest)}",
            )
        )
    rejects = f"rejects {100 * tnr.value:.1f} % of the OOD rows" + (
        f" (mean over the sets), and {100 * low_tnr.value:.1f} % on {hardest}, the set that it "
        "separates worst."
        if several
        else "."
    )
    sentences = []
    if evaluation.get(best, hardest, "auroc").value < 0.5:
        sentences.append(
            f"On {hardest} even this detector ranks the wrong way round: OOD rows tend to "
            "score lower than ID rows."
        )
    rivals = [
        detector
        for detector in evaluation.detectors
        if detector != best and evaluation.get(detector, MEAN, "auroc").high >= auroc.low
    ]
    if rivals:  # none without intervals: NaN is at least nothing
        sentences.append(f"Intervals of {mean}AUROC that overlap its own: {', '.join(rivals)}.")
    if len(evaluation.detectors) > 1:
        sentences.append(
            "The best of several detectors is chosen on these same rows, so its numbers are "
            "somewhat optimistic."
        )
    if best in evaluation.saw:
        others = [name for name in figures.ranked(evaluation) if name not in evaluation.saw]
        if others:
            area = evaluation.get(others[0], MEAN, "auroc").value
            sentences.append(
                f"The best that has not learnt from OOD data: {others[0]}, {mean}AUROC "
                f"{100 * area:.2f} %."
            )
    sentences += [line for line in (evaluation.footnote, accuracy_line(evaluation)) if line]
    return {"cards": cards, "rejects": rejects, "sentences": sentences}


def _interval(estimate: Estimate) -> str:
    if math.isnan(estimate.low):
        return ""
    return f"[{100 * estimate.low:.2f}, {100 * estimate.high:.2f}]"


def _metrics(evaluation: Evaluation) -> dict[str, object]:
    *sets, last = evaluation.columns
    return {
        "resamples": evaluation.resamples,
        "seed": evaluation.seed,
        "heading": "Mean over the sets" if last == MEAN else f"On {last}",
        "header": ["Detector", *map(title, CONVENTIONS)],
        "overall": _metrics_of(evaluation, last),
        "of_sets": [(name, _metrics_of(evaluation, name)) for name in sets],
        "meanings": [(title(metric), meaning) for metric, meaning in CONVENTIONS.items()],
    }


def _metrics_of(evaluation: Evaluation, name: str) -> TableRows:
    best = {metric: evaluation.best(name, metric) for metric in CONVENTIONS}

    def cell(detector: str, metric: str) -> Cell:
        estimate = evaluation.get(detector, name, metric)
        return Cell(
            f"{100 * estimate.value:.2f}",
            f"{estimate.value:.6g}",
            _interval(estimate),
            detector in best[metric],
        )

    return [
        (evaluation.marked(detector), [cell(detector, metric) for metric in CONVENTIONS])
        for detector in figures.ranked(evaluation)
    ]


def _detectors(evaluation: Evaluation, files: Mapping[str, Scores]) -> list[dict[str, str]]:
    ood = {name: files[name] for name in evaluation.sets}
    found = []
    for detector in figures.ranked(evaluation):
        histograms, curves = figures.detector_figures(evaluation, files[ID], ood, detector)
        area = evaluation.get(detector, evaluation.columns[-1], "auroc").value
        found.append(
            {
                "name": detector,
                "marked": evaluation.marked(detector),
                "auroc": f"{100 * area:.2f}",
                "thresholds": _thresholds(detector, files),
                "histograms": _drawing(figures.svg(histograms)),
                "curves": _drawing(figures.svg(curves)),
            }
        )
    return found


def _thresholds(detector: str, files: Mapping[str, Scores]) -> str:
    accepted = accepting_threshold(files[ID].detectors[detector])
    words = f"95 % of the ID rows score at most {accepted:.6g}."
    verdict = verdict_threshold(detector, files.values())
    if verdict is not None and verdict.low == verdict.high:
        words += f" Verdicts: OOD above {verdict.low:.6g}."
    elif verdict is not None:
        words += (
            f" Verdicts: scores up to {verdict.low:.6g} are accepted, those from "
            f"{verdict.high:.6g} on are OOD."
        )
    elif any(detector in scores.verdicts for scores in files.values()):
        words += " The threshold of its verdicts cannot be derived from the rows."
    return words


def _calibration(evaluation: Evaluation, id_scores: Scores) -> dict[str, object]:
    rates = np.array(RATES)
    rows: TableRows = []
    for detector in evaluation.detectors:
        if detector in id_scores.p_values:
            shares = flagged_shares(id_scores, detector, rates).tolist()
            cells = [Cell(f"{100 * share:.2f}", f"{share:.6g}") for share in shares]
            rows.append((evaluation.marked(detector), cells))
    return {
        "rows": int(id_scores.readable.sum()),
        "some_unjudged": any(name in id_scores.unjudged for name in evaluation.detectors),
        "header": ["ID flagged, %", *(f"nominal {100 * rate:g} %" for rate in RATES)],
        "table": rows,
    }


def _strips(
    evaluation: Evaluation, files: Mapping[str, Scores], best: str, thumbnails: bool
) -> list[dict[str, object]]:
    strips = []
    for name in (ID, *evaluation.sets):
        most, least = _extremes(files[name], best)
        groups = {"the most OOD": most, "the least OOD": least}
        if name == ID:
            groups = {"the highest scores": most}
        found: Mapping[str, bytes] = {}
        if thumbnails:
            paths = [one.path for group in groups.values() for one in group]
            found = read_thumbnails(paths, *noise_of(files[name].made))
        strips += [
            _strip(f"{name}: {words}", group, found) for words, group in groups.items() if group
        ]
    return strips


def _extremes(scores: Scores, detector: str) -> tuple[list[Shown], list[Shown]]:
    """The highest scores, highest first, and the lowest of the others, lowest first."""
    rows = np.flatnonzero(scores.readable)
    column = scores.detectors[detector]
    order = np.argsort(-column, kind="stable")

    def shown(places: Iterable[int]) -> list[Shown]:
        return [
            Shown(scores.paths[rows[k]], scores.predicted[rows[k]], float(column[k]))
            for k in places
        ]

    return shown(order[:SHOWN]), shown(order[SHOWN:][: -SHOWN - 1 : -1])


def _strip(heading: str, group: Sequence[Shown], found: Mapping[str, bytes]) -> dict[str, object]:
    images = [
        one._replace(picture=html.jpeg(found[one.path])) if one.path in found else one
        for one in group
    ]
    # Long folders in common are said once.
    prefix = html.shared_folder([one.path for one in group])
    return {"heading": heading, "prefix": prefix, "images": images}


def _made(evaluation: Evaluation, files: Mapping[str, Scores]) -> dict[str, object]:
    facts = {
        "Command": evaluation.command,
        "Versions": f"oodcli {__version__}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("numpy", "matplotlib")),
        "Intervals": f"95 %, percentile bootstrap, {evaluation.resamples} resamples, "
        f"seed {evaluation.seed}"
        if evaluation.resamples
        else f"none (0 resamples, seed {evaluation.seed})",
    }
    rows: TableRows = []
    for count in evaluation.counts:
        numbers = (count.rows, count.unreadable, sum(count.infinite.values()))
        rows.append((count.set, [Cell(count.source), *(Cell(n, str(n)) for n in numbers)]))
    return {
        "facts": list(facts.items()),
        "header": ["Set", "Scores", "Rows", "Unreadable", "Infinite scores"],
        "files": rows,
        "scores": [
            (name, html.origin(scores.made))
            for name, scores in files.items()
            if scores.made is not None
        ],
    }
