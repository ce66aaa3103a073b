"""Figures as PNG and SVG: ROC curves, histograms of the scores, AUROC as a heat map, calibration.

Drawn with matplotlib's objects, not with pyplot, which keeps every figure in a global list. Colours
are those of Okabe & Ito (2008) and cividis: told apart with any kind of colour vision.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from oodcli.files.scores import Scores
from oodcli.report.evaluation import ID, Evaluation
from oodcli.report.thresholds import (
    Threshold,
    accepting_threshold,
    flagged_shares,
    verdict_threshold,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Without their yellow: too pale for a thin line on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_GREY = "#BBBBBB"
_ID_COLOUR = "#888888"
_MARKERS = ("s", "^", "D", "v", "P", "X")
_SHOWN = 10
"""So many ROC curves are coloured; more cannot be told apart."""
_BINS = 40
_LETTERS = 14
"""Of 7 points, so many are an inch wide."""
_DPI = 150
_SALT = "oodcli"
"""For the ids in an SVG, which would be drawn by lot."""
_ACCEPTED: dict[str, Any] = {"color": "black", "linewidth": 1.0, "linestyle": "-"}
_VERDICT: dict[str, Any] = {"color": "black", "linewidth": 1.0, "linestyle": (0, (4, 2))}
_FIVE: dict[str, Any] = {"color": "#555555", "linewidth": 0.7, "linestyle": (0, (4, 2))}
_CHANCE: dict[str, Any] = {"color": _GREY, "linewidth": 0.8, "linestyle": (0, (1, 2))}
_ROC_LABELS = ("false positives: ID flagged, %", "true positives: OOD flagged, %")


def roc_figure(
    evaluation: Evaluation, id_scores: Scores, ood_scores: Mapping[str, Scores]
) -> Figure:
    """A panel for each set, a curve for each detector; OOD is the positive class. With more than
    ten detectors the ten best by AUROC (the mean over the sets) have colours, the rest is grey.
    A line marks where 5 % of ID is flagged, the threshold at 95 % TPR of ID."""
    order = ranked(evaluation)
    shown = order[:_SHOWN]
    figure, panels, rest = _grid(len(evaluation.sets), columns=3, width=3.1, height=3.1, legend=2.1)
    for panel, name in zip(panels, evaluation.sets, strict=True):
        _roc_axes(panel)
        panel.axvline(0.05, zorder=1, **_FIVE)
        for detector in reversed(order):
            pair = (id_scores.detectors[detector], ood_scores[name].detectors[detector])
            if detector in shown:
                panel.plot(*_roc(*pair), linewidth=1.5, zorder=3, **_line(shown.index(detector)))
            else:
                panel.plot(*_roc(*pair, steps=250), color=_GREY, linewidth=0.6, zorder=2)
        panel.set_title(_label(name, 30), fontsize=10)
        panel.set_xlabel(_ROC_LABELS[0], fontsize=8)
        panel.set_ylabel(_ROC_LABELS[1], fontsize=8)

    from matplotlib.lines import Line2D

    last = evaluation.columns[-1]
    handles = []
    for k, name in enumerate(shown):
        area = 100 * evaluation.get(name, last, "auroc").value
        label = f"{_marked(evaluation, name, 20)}  {area:.2f}"
        handles.append(Line2D([], [], linewidth=1.5, label=label, **_line(k)))
    if len(order) > len(shown):
        others = f"{len(order) - len(shown)} others"
        handles.append(Line2D([], [], color=_GREY, linewidth=0.8, label=others))
    handles.append(Line2D([], [], label="chance  50.00", **_CHANCE))
    handles.append(Line2D([], [], label="95 % of ID accepted", **_FIVE))
    which = "AUROC, %" if len(evaluation.sets) == 1 else "mean AUROC, %"
    rest.legend(handles=handles, loc="upper left", fontsize=8, title=which, title_fontsize=8)
    figure.suptitle("ROC curves, OOD is the positive class", fontsize=11)
    _footnote(evaluation, figure)
    return figure


def histogram_figure(
    evaluation: Evaluation, id_scores: Scores, ood_scores: Mapping[str, Scores]
) -> Figure:
    """A panel for each detector: the share of rows in each bin, ID filled, each set an outline.

    The axis ends at the 0.5 % and 99.5 % quantiles of the finite scores of all rows (each file
    with the same weight); rows beyond it, and infinite ones, are in the outermost bins. A panel
    says how many scores are infinite. Lines mark the thresholds: that which accepts 95 % of ID, and
    that of the verdicts where it can be known.
    """
    figure, panels, rest = _grid(
        len(evaluation.detectors),
        columns=3 if len(evaluation.detectors) <= 12 else 5,
        width=3.1,
        height=2.1,
        legend=2.0,
    )
    judged = False
    for panel, detector in zip(panels, evaluation.detectors, strict=True):
        verdict = _verdict(detector, id_scores, ood_scores)
        infinite = _histogram(panel, evaluation, id_scores, ood_scores, detector, verdict)
        judged = judged or verdict is not None
        title = _marked(evaluation, detector, 24) + (f" ({infinite} infinite)" if infinite else "")
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("score, higher = more OOD", fontsize=7)
        panel.set_ylabel("rows per bin, %", fontsize=7)

    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=_GREY, label=ID)]
    handles += [
        Line2D([], [], linewidth=1.2, label=_label(name, 20), **_line(k))
        for k, name in enumerate(evaluation.sets)
    ]
    handles.append(Line2D([], [], label="95 % of ID accepted", **_ACCEPTED))
    if judged:
        handles.append(Line2D([], [], label="verdict's threshold", **_VERDICT))
    rest.legend(handles=handles, loc="upper left", fontsize=8)
    figure.suptitle("Scores; the outermost bins hold what lies beyond, and infinity", fontsize=11)
    _footnote(evaluation, figure)
    return figure


def heatmap_figure(evaluation: Evaluation) -> Figure:
    """AUROC in percent, detector by set, the best detector on top; below 50 all one colour. With
    resamples the 95 % interval stands below each number."""
    order, columns = ranked(evaluation), evaluation.columns
    values = np.array(
        [[100 * evaluation.get(d, name, "auroc").value for name in columns] for d in order]
    )  # (detectors, columns)
    size = (
        2.8 + 0.95 * len(columns),
        1.8 + (0.4 if evaluation.resamples else 0.27) * max(len(order), 3),
    )
    figure = _figure(size)
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="cividis", vmin=50, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        _, low, high = evaluation.get(order[row], columns[column], "auroc")
        middle: dict[str, Any] = {
            "ha": "center",
            "va": "center",
            "color": "black" if value > 75 else "white",
        }
        if evaluation.resamples:
            axes.text(column, row - 0.16, f"{value:.1f}", fontsize=8, **middle)
            interval = f"{100 * low:.1f}–{100 * high:.1f}"
            axes.text(column, row + 0.24, interval, fontsize=6.5, **middle)
        else:
            axes.text(column, row, f"{value:.1f}", fontsize=8, **middle)
    folded = ["\n".join(textwrap.wrap(_label(name, 36), 12)) for name in columns]
    axes.set_xticks(range(len(columns)), folded, fontsize=8)
    names = [_marked(evaluation, name, 24) for name in order]
    axes.set_yticks(range(len(order)), names, fontsize=8)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False, bottom=False)
    if len(columns) > 1:  # the mean is no set
        axes.axvline(len(columns) - 1.5, color="white", linewidth=3)
    bar = figure.colorbar(image, ax=axes, extend="min" if values.min() < 50 else "neither")
    bar.set_label("AUROC, %", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    title = "AUROC, %" if len(columns) == 1 else "AUROC, %, best mean first"
    if evaluation.resamples:
        title += "; below: 95 % interval"
    figure.suptitle(title, fontsize=11)
    _footnote(evaluation, figure)
    return figure


def calibration_figure(evaluation: Evaluation, id_scores: Scores) -> Figure:
    """The share of ID rows that a verdict at each nominal rate would flag, a curve for each
    detector with p-values; on the diagonal the verdicts keep what they promise. The grey band is
    where 95 % of the shares lie by the luck of drawing so many rows."""
    figure, panels, rest = _grid(2, columns=2, width=3.1, height=3.1, legend=2.1)
    calibrated = [name for name in evaluation.detectors if name in id_scores.p_values]
    for panel, end in zip(panels, (1.0, 0.1), strict=True):
        rates = np.linspace(0, end, 201)
        luck = 1.96 * np.sqrt(rates * (1 - rates) / int(id_scores.readable.sum()))
        panel.fill_between(rates, rates - luck, rates + luck, color=_GREY, alpha=0.5, linewidth=0)
        panel.plot([0, end], [0, end], **_CHANCE)
        for k, detector in enumerate(calibrated):
            panel.plot(rates, flagged_shares(id_scores, detector, rates), **_line(k), linewidth=1.2)
        panel.set(xlim=(0, end), ylim=(0, end if end == 1 else 2 * end))
        ticks = np.linspace(0, end, 6)
        panel.set_xticks(ticks, [f"{100 * tick:g}" for tick in ticks])
        ticks = np.linspace(0, end if end == 1 else 2 * end, 6)
        panel.set_yticks(ticks, [f"{100 * tick:g}" for tick in ticks])
        panel.set_title("all rates" if end == 1 else f"up to {100 * end:g} %", fontsize=10)
        panel.set_xlabel("nominal rate of false alarms, %", fontsize=8)
        panel.set_ylabel("ID flagged, %", fontsize=8)

    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linewidth=1.2, label=_marked(evaluation, name, 24), **_line(k))
        for k, name in enumerate(calibrated)
    ]
    handles.append(Line2D([], [], label="as promised", **_CHANCE))
    rest.legend(handles=handles, loc="upper left", fontsize=8)
    figure.suptitle("Calibration: ID rows flagged at each nominal rate", fontsize=11)
    _footnote(evaluation, figure)
    return figure


def detector_figures(
    evaluation: Evaluation, id_scores: Scores, ood_scores: Mapping[str, Scores], detector: str
) -> tuple[Figure, Figure]:
    """Histograms and ROC curves of one detector, a colour for each set; small, for the report's
    page. Dots on a curve are the thresholds that the histogram marks."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    verdict = _verdict(detector, id_scores, ood_scores)
    marks = [(accepting_threshold(id_scores.detectors[detector]), _ACCEPTED, "o")]
    handles: list[Any] = [
        Patch(color=_GREY, label=ID),
        Line2D([], [], label="95 % of ID accepted", **_ACCEPTED),
    ]
    if verdict is not None:
        marks.append((verdict.middle, _VERDICT, "D"))
        handles.append(Line2D([], [], label="verdict's threshold", **_VERDICT))
    lines = [
        Line2D([], [], linewidth=1.2, label=_label(name, 16), **_line(k))
        for k, name in enumerate(evaluation.sets)
    ]
    left, panel = _small([*handles, *lines])
    _histogram(panel, evaluation, id_scores, ood_scores, detector, verdict)
    panel.set_title("score, higher = more OOD; rows per bin, %", fontsize=8)

    for line, name in zip(lines, evaluation.sets, strict=True):
        area = 100 * evaluation.get(detector, name, "auroc").value
        line.set_label(f"{_label(name, 16)}  {area:.2f}")
    lines.append(Line2D([], [], label="chance  50.00", **_CHANCE))
    right, panel = _small(lines)
    _roc_axes(panel)
    for k, name in enumerate(evaluation.sets):
        pair = (id_scores.detectors[detector], ood_scores[name].detectors[detector])
        panel.plot(*_roc(*pair, steps=250), linewidth=1.2, zorder=3, **_line(k))
        for threshold, _, marker in marks:
            x, y = (float((column > threshold).mean()) for column in pair)
            panel.plot([x], [y], marker, markersize=4, zorder=4, color=_line(k)["color"])
    panel.set_title("OOD flagged, % over ID flagged, %; AUROC below", fontsize=8)
    return left, right


def save(figure: Figure, path: Path) -> None:
    """As PNG. A letter that the font lacks is drawn as a box, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, format="png", dpi=_DPI)
    figure.set_layout_engine("none")  # it has been laid out


def svg(figure: Figure) -> str:
    """The same bytes every time. Text stays text: it can be searched, and a page with many figures
    stays small; where the font is missing, it is drawn in another."""
    import matplotlib

    stream = io.BytesIO()
    settings: Any = {
        "svg.hashsalt": _SALT,
        "svg.fonttype": "none",
        "font.sans-serif": ["DejaVu Sans", "Verdana"],  # every text names them all
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(
            stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Type", "Format"))
        )
    text = re.sub(r"\n *", "\n", stream.getvalue().decode("utf-8"))
    return re.sub(r' d="[^"]*"', _shorter, text)


def _shorter(path: re.Match[str]) -> str:
    """A path in tenths of a point and on one line: less than half the size."""
    return re.sub(r"(\.\d)\d+", r"\1", " ".join(path[0].split())).join((" ", ""))


def _verdict(
    detector: str, id_scores: Scores, ood_scores: Mapping[str, Scores]
) -> Threshold | None:
    return verdict_threshold(detector, [id_scores, *ood_scores.values()])


def _histogram(
    panel: Axes,
    evaluation: Evaluation,
    id_scores: Scores,
    ood_scores: Mapping[str, Scores],
    detector: str,
    verdict: Threshold | None,
) -> int:
    """Returns how many scores are infinite."""
    columns = [
        id_scores.detectors[detector],
        *(ood_scores[name].detectors[detector] for name in evaluation.sets),
    ]
    edges = np.linspace(*_span(columns), _BINS + 1)
    shares = [_shares(column, edges) for column in columns]
    panel.stairs(shares[0], edges, fill=True, color=_GREY)
    for k, share in enumerate(shares[1:]):
        panel.stairs(share, edges, linewidth=1.2, **_line(k))
    accepted = accepting_threshold(columns[0])
    if math.isfinite(accepted):
        panel.axvline(accepted, **_ACCEPTED)
    if verdict is not None:
        panel.axvline(verdict.middle, **_VERDICT)
    panel.set_xlim(edges[0], edges[-1])
    panel.set_ylim(bottom=0)
    panel.locator_params(axis="both", nbins=5)
    return sum(int(np.isinf(column).sum()) for column in columns)


def _roc_axes(panel: Axes) -> None:
    panel.plot([0, 1], [0, 1], zorder=1, **_CHANCE)
    panel.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    panel.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    panel.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])


def ranked(evaluation: Evaluation) -> list[str]:
    """The detectors, best AUROC in the last column first."""
    last = evaluation.columns[-1]
    return sorted(evaluation.detectors, key=lambda d: -evaluation.get(d, last, "auroc").value)


def _line(k: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[k % len(_COLOURS)],
        "linestyle": _STYLES[k // len(_COLOURS) % len(_STYLES)],
    }


def _label(name: str, length: int) -> str:
    """Cut to the length, and nothing in it taken for a formula or, as a leading underscore is in a
    legend, for a wish to be left out."""
    shown = name if len(name) <= length else name[: length - 1] + "…"
    return (" " + shown if shown.startswith("_") else shown).replace("$", r"\$")


def _marked(evaluation: Evaluation, detector: str, length: int) -> str:
    """Its label, cut so that the asterisk of one that has learnt from OOD data stays."""
    mark = evaluation.marked(detector)[len(detector) :]
    return _label(detector, length - len(mark)) + mark


def _footnote(evaluation: Evaluation, figure: Figure) -> None:
    """Below all panels, where an asterisk must be explained."""
    if evaluation.footnote:
        lines = textwrap.wrap(evaluation.footnote, int(_LETTERS * figure.get_figwidth()))
        figure.supxlabel("\n".join(lines).replace("$", r"\$"), fontsize=7)


def _figure(size: tuple[float, float], *, engine: bool = True) -> Figure:
    """size: width and height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08) if engine else None
    figure = Figure(figsize=size, dpi=_DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _grid(
    panels: int, *, columns: int, width: float, height: float, legend: float
) -> tuple[Figure, Sequence[Axes], Axes]:
    """As many panels, at most ``columns`` a row, and an empty one on the right for the legend.
    width, height: of a panel, legend: of that column, in inches."""
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure = _figure((columns * width + legend, rows * height + 0.5))
    grid = figure.add_gridspec(rows, columns + 1, width_ratios=[width] * columns + [legend])
    axes = [figure.add_subplot(grid[k // columns, k % columns]) for k in range(panels)]
    for one in axes:
        one.tick_params(labelsize=7)
    rest = figure.add_subplot(grid[0, -1])
    rest.axis("off")
    return figure, axes, rest


def _small(handles: Sequence[Any]) -> tuple[Figure, Axes]:
    """A panel as wide as a telephone, the legend below. Laid out by hand: that is twice as fast."""
    rows = math.ceil(len(handles) / 2)
    height = 2.7 + 0.17 * rows
    figure = _figure((3.6, height), engine=False)
    axes = figure.add_axes((0.12, 1 - 2.3 / height, 0.83, 2.05 / height))
    axes.tick_params(labelsize=7)
    figure.legend(
        handles=handles, loc="lower center", ncols=2, fontsize=7, frameon=False, borderaxespad=0.1
    )
    return figure, axes


def _roc(
    id_scores: NDArray[np.float64], ood_scores: NDArray[np.float64], steps: int = 1000
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(points,) false and true positive rates from (1, 1) to (0, 0), a point for each threshold;
    those that fall on one thousandth (one of ``steps``) of the axes are left out, they cannot be
    seen."""
    thresholds = np.unique(np.concatenate([id_scores, ood_scores]))
    rates = [
        1 - np.searchsorted(np.sort(scores), thresholds, side="right") / scores.size
        for scores in (id_scores, ood_scores)
    ]
    points = np.vstack([[1.0, 1.0], np.column_stack(rates)])  # (points, 2)
    seen = np.any(np.diff((steps * points).round(), axis=0, prepend=2.0 * steps), axis=1)
    return points[seen, 0], points[seen, 1]


def _span(columns: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """What most finite scores lie in; never empty."""
    finite = [column[np.isfinite(column)] for column in columns]
    ends = [np.quantile(column, (0.005, 0.995)) for column in finite if column.size]
    if not ends:
        return 0.0, 1.0
    low, high = float(min(low for low, _ in ends)), float(max(high for _, high in ends))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _shares(column: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """(bins,) percent of the rows."""
    counts, _ = np.histogram(np.clip(column, edges[0], edges[-1]), edges)
    return 100 * counts / column.size
