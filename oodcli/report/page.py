"""The report as one page that needs nothing else: no network, no framework, no script to be read.

Everything that comes from a file goes through ``html.escape``. A browser is told, besides, to load
nothing and to run no script but ours (``Content-Security-Policy``).
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from oodcli._version import __version__
from oodcli.files.scores import Scores
from oodcli.metrics import CONVENTIONS, MEAN, Estimate
from oodcli.report import figures
from oodcli.report.evaluation import ID, Evaluation
from oodcli.report.tables import accuracy_line, title
from oodcli.report.thresholds import accepting_threshold, flagged_shares, verdict_threshold
from oodcli.report.thumbnails import SIDE, read_thumbnails

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
    sections = [
        ("summary", "Summary", _summary(evaluation, best)),
        ("heatmap", "AUROC of every detector on every set", _drawing(drawn["heatmap"], "AUROC")),
        ("metrics", "Metrics", _metrics(evaluation)),
        ("roc", "ROC curves", _drawing(drawn["roc"], "ROC curves")),
        ("detectors", "Scores of each detector", _detectors(evaluation, files)),
        ("images", "Images", _images(evaluation, files, best, thumbnails)),
        ("made", "How it was made", _made(evaluation, files)),
    ]
    if "calibration" in drawn:
        content = _calibration(evaluation, id_scores, drawn["calibration"])
        sections.insert(5, ("calibration", "Calibration", content))
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{_base64(hashlib.sha256(SCRIPT.encode()).digest())}'"
    )
    contents = "".join(f'<a href="#{name}">{_e(heading)}</a>' for name, heading, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{_e(heading)}</h2>{content}</section>'
        for name, heading, content in sections
    )
    sets = ", ".join(evaluation.sets)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_e(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>OOD detection: {_e(sets)}</title><style>{STYLE}</style></head>\n"
        f"<body><header><h1>Out-of-distribution detection</h1>"
        f"<p>ID against {_e(sets)}</p><nav>{contents}</nav></header>"
        f"<main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _e(text: object) -> str:
    """Escaped, also for an attribute; what is no UTF-8 is spelt out."""
    return html.escape(str(text).encode("utf-8", "backslashreplace").decode("utf-8"))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _drawing(svg: str, words: str, kind: str = "wide") -> str:
    """As an image, which keeps the ids in one drawing from those in another, and scripts out."""
    content = _base64(svg[svg.index("<svg") :].encode("utf-8"))
    return (
        f'<figure class="{kind}"><img alt="{_e(words)}" '
        f'src="data:image/svg+xml;base64,{content}"></figure>'
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, sortable: bool = False) -> str:
    """header, rows: HTML; the first cell of a row is its heading. A cell that is no number has no
    ``data-value`` and is sorted as text."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(
        "<tr>"
        + "".join(
            cell
            if cell.startswith("<td")
            else (f"<td>{cell}</td>" if k else f'<th scope="row">{cell}</th>')
            for k, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll" tabindex="0"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _percent(estimate: Estimate) -> str:
    """With the interval, where there is one."""
    interval = (
        ""
        if math.isnan(estimate.low)
        else f" <small>[{100 * estimate.low:.2f}, {100 * estimate.high:.2f}]</small>"
    )
    return f"{100 * estimate.value:.2f}{interval}"


def _summary(evaluation: Evaluation, best: str) -> str:
    several = len(evaluation.sets) > 1
    mean = "mean " if several else ""
    auroc = evaluation.get(best, MEAN, "auroc")
    tnr = evaluation.get(best, MEAN, "tnr95")
    hardest = min(evaluation.sets, key=lambda name: evaluation.get(best, name, "auroc").value)
    low_tnr = evaluation.get(best, hardest, "tnr95")
    cards = [
        (
            f"Best by {mean}AUROC",
            _e(evaluation.marked(best)),
            f"of {_count(evaluation.detectors, 'detector')}",
        ),
        ("Mean AUROC" if several else "AUROC", f"{100 * auroc.value:.2f} %", _interval(auroc)),
        ("Mean TNR95" if several else "TNR95", f"{100 * tnr.value:.2f} %", _interval(tnr)),
    ]
    if several:
        on_hardest = evaluation.get(best, hardest, "auroc")
        cards.append(
            (
                "Hardest set",
                _e(hardest),
                f"AUROC {100 * on_hardest.value:.2f} % {_interval(on_hardest)}",
            )
        )
    shown = "".join(
        f"<div><dt>{heading}</dt><dd>{value}<small>{words}</small></dd></div>"
        for heading, value, words in cards
    )
    sentences = [
        f"At the threshold that accepts 95 % of the ID rows, <b>{_e(evaluation.marked(best))}</b> "
        f"rejects {100 * tnr.value:.1f} % of the OOD rows"
        + (
            f" (mean over the sets), and {100 * low_tnr.value:.1f} % on {_e(hardest)}, "
            "the set that it tells apart worst."
            if several
            else "."
        )
    ]
    if evaluation.get(best, hardest, "auroc").value < 0.5:
        sentences.append(
            f"On {_e(hardest)} even that detector ranks the wrong way round: OOD rows tend to "
            "score lower than ID rows."
        )
    rivals = [
        detector
        for detector in evaluation.detectors
        if detector != best and evaluation.get(detector, MEAN, "auroc").high >= auroc.low
    ]
    if rivals:  # none without intervals: NaN is at least nothing
        sentences.append(f"Intervals of {mean}AUROC that overlap its own: {_e(', '.join(rivals))}.")
    if len(evaluation.detectors) > 1:
        sentences.append(
            "The best of several detectors was chosen on these very rows, so that its numbers are "
            "somewhat too good."
        )
    if best in evaluation.saw:
        others = [name for name in figures.ranked(evaluation) if name not in evaluation.saw]
        if others:
            area = evaluation.get(others[0], MEAN, "auroc").value
            sentences.append(
                f"The best that has not learnt from OOD data: {_e(others[0])}, {mean}AUROC "
                f"{100 * area:.2f} %."
            )
    sentences += [_e(line) for line in (evaluation.footnote, accuracy_line(evaluation)) if line]
    said = "".join(f"<p>{sentence}</p>" for sentence in sentences)
    notes = "".join(f"<li>{_e(note)}</li>" for note in evaluation.notes)
    listed = f'<div class="notes"><h3>Notes</h3><ul>{notes}</ul></div>' if notes else ""
    return f'<dl class="cards">{shown}</dl>{said}{listed}'


def _count(things: Sequence[object], word: str) -> str:
    return f"{len(things)} {word}" + ("s" if len(things) != 1 else "")


def _interval(estimate: Estimate) -> str:
    if math.isnan(estimate.low):
        return ""
    return f"[{100 * estimate.low:.2f}, {100 * estimate.high:.2f}]"


def _metrics(evaluation: Evaluation) -> str:
    words = "<p>All values in percent; bold: the best of a column."
    if evaluation.resamples:
        words += (
            f" In brackets: 95 % bootstrap interval ({evaluation.resamples} resamples, seed "
            f"{evaluation.seed})."
        )
    words += "</p>"
    parts = [_metrics_of(evaluation, name) for name in evaluation.columns]
    parts = [parts[-1]] + [
        f"<details><summary>On {_e(name)}</summary>{part}</details>"
        for name, part in zip(evaluation.columns[:-1], parts[:-1], strict=True)
    ]
    last = evaluation.columns[-1]
    heading = "Mean over the sets" if last == MEAN else f"On {last}"
    meanings = "".join(
        f"<dt>{_e(title(metric))}</dt><dd>{_e(meaning)}</dd>"
        for metric, meaning in CONVENTIONS.items()
    )
    footnote = f"<p>{_e(evaluation.footnote)}</p>" if evaluation.footnote else ""
    return (
        f"{words}<h3>{_e(heading)}</h3>{''.join(parts)}{footnote}"
        f"<details><summary>What they mean</summary><dl>{meanings}</dl></details>"
    )


def _metrics_of(evaluation: Evaluation, name: str) -> str:
    best = {metric: evaluation.best(name, metric) for metric in CONVENTIONS}
    rows = []
    for detector in figures.ranked(evaluation):
        cells = [_e(evaluation.marked(detector))]
        for metric in CONVENTIONS:
            estimate = evaluation.get(detector, name, metric)
            kind = ' class="best"' if detector in best[metric] else ""
            cells.append(f'<td{kind} data-value="{estimate.value:.6g}">{_percent(estimate)}</td>')
        rows.append(cells)
    header = ["Detector", *(_e(title(metric)) for metric in CONVENTIONS)]
    return _table(header, rows, sortable=True)


def _detectors(evaluation: Evaluation, files: Mapping[str, Scores]) -> str:
    ood = {name: files[name] for name in evaluation.sets}
    parts = [
        "<p>Grey: ID. A solid line, and a dot on each curve, is the threshold that accepts 95 % of "
        "ID; a dashed line and a diamond that of the verdicts, where it is known. The outermost "
        "bins hold what lies beyond, and infinity.</p>"
    ]
    for k, detector in enumerate(figures.ranked(evaluation)):
        drawn = "".join(
            _drawing(figures.svg(figure), f"{words} of {detector}", "small")
            for words, figure in zip(
                ("Histograms", "ROC curves"),
                figures.detector_figures(evaluation, files[ID], ood, detector),
                strict=True,
            )
        )
        area = evaluation.get(detector, evaluation.columns[-1], "auroc").value
        parts.append(
            f"<details{'' if k else ' open'}><summary>{_e(evaluation.marked(detector))} "
            f"<small>AUROC {100 * area:.2f} %</small></summary>"
            f"<p>{_thresholds(detector, files)}</p>"
            f'<div class="pair">{drawn}</div></details>'
        )
    return "".join(parts)


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
        words += " The threshold of its verdicts cannot be told from the rows."
    return words


def _calibration(evaluation: Evaluation, id_scores: Scores, svg: str) -> str:
    rates = np.array(RATES)
    n = int(id_scores.readable.sum())
    some = any(detector in id_scores.unjudged for detector in evaluation.detectors)
    left = " Rows without a verdict of a detector do not count for it." if some else ""
    rows = []
    for detector in evaluation.detectors:
        if detector in id_scores.p_values:
            shares = flagged_shares(id_scores, detector, rates)
            cells = [
                f'<td data-value="{share:.6g}">{100 * share:.2f}</td>' for share in shares.tolist()
            ]
            rows.append([_e(evaluation.marked(detector)), *cells])
    header = ["ID flagged, %", *(f"nominal {100 * rate:g} %" for rate in RATES)]
    return (
        f"<p>Which share of the {n} ID rows would be called OOD at each nominal rate of false "
        "alarms. On the diagonal a verdict keeps its promise; above it there are more false alarms "
        "than promised. Only ID rows that the calibration has not seen count as a test of it."
        f"{left}</p>"
        f"{_drawing(svg, 'Calibration')}{_table(header, rows, sortable=True)}"
    )


class _Shown(NamedTuple):
    """One image. score: of the best detector."""

    path: str
    predicted: str
    score: float


def _images(
    evaluation: Evaluation, files: Mapping[str, Scores], best: str, thumbnails: bool
) -> str:
    chosen: list[tuple[str, list[_Shown]]] = [
        ("ID: the highest scores", _extremes(files[ID], best)[0])
    ]
    for name in evaluation.sets:
        most, least = _extremes(files[name], best)
        chosen += [(f"{name}: the most OOD", most), (f"{name}: the least OOD", least)]
    found = read_thumbnails(one.path for _, group in chosen for one in group) if thumbnails else {}
    parts = [
        f"<p>By the scores of <b>{_e(evaluation.marked(best))}</b>, the best detector by AUROC. "
        "Pictures are of what lies under the paths now, cut to a square; an image that cannot be "
        "opened has none.</p>"
    ]
    return "".join(parts) + "".join(_strip(heading, group, found) for heading, group in chosen)


def _extremes(scores: Scores, detector: str) -> tuple[list[_Shown], list[_Shown]]:
    """The highest scores, highest first, and the lowest of the others, lowest first."""
    rows = np.flatnonzero(scores.readable)
    column = scores.detectors[detector]
    order = np.argsort(-column, kind="stable")

    def shown(places: Iterable[int]) -> list[_Shown]:
        return [
            _Shown(scores.paths[rows[k]], scores.predicted[rows[k]], float(column[k]))
            for k in places
        ]

    return shown(order[:SHOWN]), shown(order[SHOWN:][: -SHOWN - 1 : -1])


def _strip(heading: str, group: Sequence[_Shown], found: Mapping[str, bytes]) -> str:
    if not group:
        return ""
    # Long folders in common are said once.
    prefix = os.path.commonprefix([one.path for one in group])  # noqa: RUF071, cut at a slash below
    prefix = prefix[: prefix.rfind("/") + 1] if len(group) > 1 else ""
    items = []
    for one in group:
        picture = ""
        if one.path in found:
            content = _base64(found[one.path])
            picture = (
                f'<img alt="" width="{SIDE}" height="{SIDE}" '
                f'src="data:image/jpeg;base64,{content}">'
            )
        predicted = f"<br>predicted {_e(one.predicted)}" if one.predicted else ""
        items.append(
            f'<figure title="{_e(one.path)}">{picture}<figcaption><b>{one.score:.4g}</b>'
            f"{predicted}<br><span>{_e(one.path[len(prefix) :])}</span></figcaption></figure>"
        )
    below = f"<p><small>in {_e(prefix)}</small></p>" if prefix else ""
    return f'<h3>{_e(heading)}</h3>{below}<div class="strip">{"".join(items)}</div>'


def _made(evaluation: Evaluation, files: Mapping[str, Scores]) -> str:
    facts = {
        "Command": evaluation.command,
        "Versions": f"oodcli {__version__}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("numpy", "matplotlib")),
        "Intervals": f"95 %, percentile bootstrap, {evaluation.resamples} resamples, "
        f"seed {evaluation.seed}"
        if evaluation.resamples
        else f"none (0 resamples, seed {evaluation.seed})",
    }
    listed = "".join(f"<dt>{key}</dt><dd>{_e(text)}</dd>" for key, text in facts.items() if text)
    rows = [
        [
            _e(count.set),
            _e(count.source),
            f'<td data-value="{count.rows}">{count.rows}</td>',
            f'<td data-value="{count.unreadable}">{count.unreadable}</td>',
            f'<td data-value="{sum(count.infinite.values())}">{sum(count.infinite.values())}</td>',
        ]
        for count in evaluation.counts
    ]
    header = ["Set", "Scores", "Rows", "Unreadable", "Infinite scores"]
    scored = "".join(
        f"<dt>Scores of {_e(name)}</dt><dd>{_e(_origin(scores.made))}</dd>"
        for name, scores in files.items()
        if scores.made is not None
    )
    return f"<dl>{listed}</dl>{_table(header, rows, sortable=True)}<dl>{scored}</dl>"


def _origin(made: Mapping[str, Any]) -> str:
    """What is beside a scores file, as far as a reader of the report needs it."""
    words = {
        "command": "",
        "source": "images",
        "arch": "architecture",
        "checkpoint_sha256": "checkpoint SHA-256",
        "oodcli_version": "oodcli",
        "torch_version": "torch",
        "seed": "seed",
    }
    return "; ".join(f"{word} {made[key]}".strip() for key, word in words.items() if key in made)


STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--soft:#5b6570;--line:#dde1e6;--page:#fff;
--panel:#f5f6f8;--mark:#0b5cad;--warn:#fff6e0;--warn-line:#e3b341}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#a3acb5;--line:#363c43;--page:#16191d;
--panel:#1f2429;--mark:#79b8ff;--warn:#2d2715;--warn-line:#9a7a20}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
header,main{max-width:66rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2rem}
h1{font-size:1.7rem;line-height:1.2;margin:0}
h2{font-size:1.25rem;margin:0 0 .75rem}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
p{margin:.5rem 0;max-width:46rem}
header p{color:var(--soft);margin:.25rem 0 1rem}
h1,h2,h3,p,li,dd,summary{overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;font-size:.9rem}
a{color:var(--mark);text-decoration:none}a:hover{text-decoration:underline}
section{padding:1.5rem 0;border-top:1px solid var(--line);margin-top:1.5rem}
small{color:var(--soft);font-size:.8em;font-weight:400}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.75rem;
margin:0 0 1rem}
.cards div{background:var(--panel);border-radius:8px;padding:.75rem 1rem}
.cards dt{color:var(--soft);font-size:.85rem;font-weight:400}
.cards dd{margin:0;font-size:1.45rem;line-height:1.3}
.cards small{display:block;font-size:.8rem}
.notes{background:var(--warn);border-left:4px solid var(--warn-line);border-radius:4px;
padding:.6rem 1rem;margin-top:1rem}
.notes h3{margin:0}.notes ul{margin:.25rem 0;padding-left:1.1rem}
dl{margin:.5rem 0}dt{font-weight:600}dd{margin:0 0 .5rem}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px;margin:.5rem 0}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .7rem;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
tbody tr:last-child>*{border-bottom:0}
thead th{background:var(--panel);vertical-align:bottom;line-height:1.25}
th:first-child{text-align:left;position:sticky;left:0;background:var(--page)}
thead th:first-child{background:var(--panel)}
td:not([data-value]){text-align:left;overflow-wrap:anywhere}
tbody th{font-weight:500;white-space:nowrap;max-width:16rem;overflow:hidden;text-overflow:ellipsis}
td small{display:block;white-space:nowrap}
td.best{font-weight:700}
th button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer;
text-align:inherit}
th button:hover{text-decoration:underline}
th[aria-sort=ascending] button::after{content:" \\25B2";font-size:.7em}
th[aria-sort=descending] button::after{content:" \\25BC";font-size:.7em}
#made th:nth-child(2){text-align:left}
figure{margin:0}
.wide{overflow-x:auto}
.wide img,.small img{background:#fff;border-radius:8px;display:block}
.wide img{border:1px solid var(--line);max-width:100%;min-width:min(100%,40rem);height:auto}
.pair{display:flex;flex-wrap:wrap;gap:.75rem}
.small{flex:0 1 26rem}
.small img{width:100%;height:auto;border:1px solid var(--line)}
details{border:1px solid var(--line);border-radius:8px;margin:.5rem 0;padding:0 .9rem}
details[open]{padding-bottom:.9rem}
summary{cursor:pointer;padding:.5rem 0;font-weight:600}
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(7rem,1fr));gap:.75rem}
.strip figcaption{font-size:.75rem;line-height:1.35;overflow-wrap:anywhere}
.strip span{color:var(--soft)}
.strip img{display:block;border-radius:4px;margin-bottom:.25rem;border:1px solid var(--line)}
@media (max-width:40rem){.wide img{max-width:none;min-width:40rem}
header,main{padding-left:.9rem;padding-right:.9rem}}
@media print{:root{--ink:#000;--soft:#444;--line:#bbb;--page:#fff;--panel:#f2f2f2;--mark:#000;
--warn:#fff;--warn-line:#888}body{font-size:10pt}nav{display:none}header,main{max-width:none;padding:0}
section{break-inside:auto;padding:.75rem 0;margin-top:.75rem}h2,h3,h3+p,summary{break-after:avoid}
.small{flex:0 1 48%}.strip{grid-template-columns:repeat(8,1fr)}.strip img{width:100%;height:auto}
figure,tr,.cards div{break-inside:avoid}.scroll{overflow:visible;border:0}table{font-size:7.5pt}
th,td{padding:.2rem .3rem}th:first-child{position:static}.wide img{min-width:0}
#detectors details{break-inside:avoid}
details::details-content{content-visibility:visible;display:block}}
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const rows = [...table.tBodies[0].rows];
      const numbers = rows.every(row => row.cells[column].dataset.value !== undefined);
      const was = head.getAttribute("aria-sort");
      const up = was ? was === "descending" : !numbers;
      const order = (a, b) => numbers
        ? a.cells[column].dataset.value - b.cells[column].dataset.value
        : a.cells[column].textContent.localeCompare(b.cells[column].textContent);
      rows.sort((a, b) => up ? order(a, b) : order(b, a));
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      table.tBodies[0].append(...rows);
    });
  });
}
"""
