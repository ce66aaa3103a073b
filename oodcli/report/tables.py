"""Metrics as files: CSV and JSON for programs (fractions), Markdown and LaTeX for people (percent).

The tables for people have a detector a row and an OOD set a column, the best value of a column in
bold, what the metric means below.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict
from pathlib import Path

from oodcli._version import __version__
from oodcli.metrics import CONVENTIONS, LOWER_IS_BETTER, Estimate
from oodcli.report.evaluation import Evaluation

TITLES = {
    "auroc": "AUROC",
    "fpr95": "FPR95 (ID positive)",
    "tnr95": "TNR95 (ID positive)",
    "fpr95-ood": "FPR95 (OOD positive)",
    "aupr-in": "AUPR-In",
    "aupr-out": "AUPR-Out",
    "detection-accuracy": "Detection accuracy",
    "tpr10": "TPR at 10 % FPR (OOD positive)",
}


def table_rows(evaluation: Evaluation, metric: str) -> tuple[list[str], list[list[str]]]:
    """The header (``detector``, the sets, ``mean`` where there are several) and a row of cells for
    each detector: percent with two decimals."""
    header = ["detector", *evaluation.columns]
    rows = [
        [detector, *(percent(evaluation.get(detector, s, metric)) for s in evaluation.columns)]
        for detector in evaluation.detectors
    ]
    return header, rows


def percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.2f}"


def write_csv(evaluation: Evaluation, path: Path) -> None:
    """``detector,set,metric,value,low,high``: fractions, 6 significant digits; low and high empty
    without resamples. Where a detector has learnt from OOD data, a last column ``saw``: which."""
    last = ["saw"] if evaluation.saw else []
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["detector", "set", "metric", "value", "low", "high", *last])
        for row in evaluation.rows:
            numbers = ["" if math.isnan(x) else f"{x:.6g}" for x in (row.value, row.low, row.high)]
            saw = [evaluation.saw.get(row.detector, "") for _ in last]
            writer.writerow([row.detector, row.set, row.metric, *numbers, *saw])


def as_json(evaluation: Evaluation) -> dict[str, object]:
    """Everything that is in the evaluation, ready for ``json.dumps``; metrics are fractions."""
    return {
        "format": "oodcli-metrics",
        "version": 1,
        "oodcli_version": __version__,
        "command": evaluation.command,
        "unit": "fraction",
        "interval": {
            "level": 0.95,
            "method": "percentile bootstrap",
            "resamples": evaluation.resamples,
            "seed": evaluation.seed,
        },
        "conventions": dict(CONVENTIONS),
        "id_accuracy": evaluation.accuracy,
        "id_labelled": evaluation.labelled,
        "counts": [asdict(count) for count in evaluation.counts],
        "notes": list(evaluation.notes),
        "saw_ood": dict(evaluation.saw),
        "metrics": [
            {key: _json_value(value) for key, value in asdict(row).items()}
            for row in evaluation.rows
        ],
    }


def _json_value(value: str | float) -> str | float | None:
    if isinstance(value, str):
        return value
    return None if math.isnan(value) else float(f"{value:.6g}")


def write_json(evaluation: Evaluation, path: Path) -> None:
    text = json.dumps(as_json(evaluation), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_markdown(evaluation: Evaluation, path: Path) -> None:
    path.write_text(markdown(evaluation), encoding="utf-8")


def markdown(evaluation: Evaluation) -> str:
    """A table for each metric; the last column with its 95 % interval."""
    lines = ["# Evaluation", "", "All values in percent; bold: the best of a column."]
    if evaluation.resamples:
        lines[-1] += (
            f" In brackets: 95 % bootstrap interval ({evaluation.resamples} resamples,"
            f" seed {evaluation.seed})."
        )
    lines += ["", "| file | rows | unreadable |", "| --- | ---: | ---: |"]
    lines += [f"| {_md(c.set)} | {c.rows} | {c.unreadable} |" for c in evaluation.counts]
    if accuracy := accuracy_line(evaluation):
        lines += ["", accuracy]
    if evaluation.notes:
        lines += ["", *(f"* {_md(note)}" for note in evaluation.notes)]
    for metric, meaning in CONVENTIONS.items():
        lines += ["", f"## {title(metric)}", "", *_markdown_table(evaluation, metric)]
        lines += ["", f"{TITLES[metric]}: {_md(meaning)}."]
        if evaluation.footnote:
            lines += ["", _md(evaluation.footnote)]
    return "\n".join(lines) + "\n"


def accuracy_line(evaluation: Evaluation) -> str:
    """A sentence; empty where the accuracy is not known."""
    if evaluation.accuracy is None:
        return ""
    return (
        f"Accuracy on the {evaluation.labelled} labelled ID rows: "
        f"{100 * evaluation.accuracy:.2f} %."
    )


def title(metric: str) -> str:
    """With an arrow to where better is."""
    return f"{TITLES[metric]} {'↓' if metric in LOWER_IS_BETTER else '↑'}"


def _markdown_table(evaluation: Evaluation, metric: str) -> list[str]:
    header, rows = table_rows(evaluation, metric)
    best = [evaluation.best(name, metric) for name in evaluation.columns]
    last = evaluation.columns[-1]
    lines = [
        "| " + " | ".join(map(_md, header)) + " |",
        "| --- |" + " ---: |" * (len(header) - 1),
    ]
    for detector, *cells in rows:
        cells = [
            f"**{cell}**" if detector in top else cell
            for cell, top in zip(cells, best, strict=True)
        ]
        if evaluation.resamples:
            _, low, high = evaluation.get(detector, last, metric)
            cells[-1] += f" [{100 * low:.2f}, {100 * high:.2f}]"
        lines.append("| " + " | ".join([_md(evaluation.marked(detector)), *cells]) + " |")
    return lines


def _md(text: str) -> str:
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def write_latex(evaluation: Evaluation, path: Path) -> None:
    path.write_text(latex(evaluation), encoding="utf-8")


def latex(evaluation: Evaluation) -> str:
    """A ``table`` for each metric, to be taken in with ``\\input``. Plain LaTeX, UTF-8: no package
    is needed, so the rules are ``\\hline``, not those of booktabs."""
    return "\n\n".join(_latex_table(evaluation, metric) for metric in CONVENTIONS) + "\n"


def _latex_table(evaluation: Evaluation, metric: str) -> str:
    header, rows = table_rows(evaluation, metric)
    best = [evaluation.best(name, metric) for name in evaluation.columns]
    arrow = r"$\downarrow$" if metric in LOWER_IS_BETTER else r"$\uparrow$"
    caption = (
        f"{_tex(TITLES[metric])} {arrow} in percent: {_tex(CONVENTIONS[metric])}. "
        r"The best of a column is bold."
    )
    if evaluation.footnote:
        caption += f" {_tex(evaluation.footnote)}"
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\label{{tab:ood-{metric}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"\hline",
        " & ".join(map(_tex, header)) + r" \\",
        r"\hline",
    ]
    for detector, *cells in rows:
        cells = [
            rf"\textbf{{{cell}}}" if detector in top else cell
            for cell, top in zip(cells, best, strict=True)
        ]
        lines.append(" & ".join([_tex(evaluation.marked(detector)), *cells]) + r" \\")
    lines += [r"\hline", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines)


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    **{sign: "\\" + sign for sign in "&%$#_{}"},
    **{
        sign: "{" + sign + "}" for sign in "[]*"
    },  # the \\\\ of the row above takes them for its own
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in " ".join(text.split()))
