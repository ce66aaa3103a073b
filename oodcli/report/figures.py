"""Figures as PNG: ROC curves, histograms of the scores, a heat map of AUROC.

Drawn with matplotlib's objects, not with pyplot, which keeps every figure in a global list. Colours
are those of Okabe & Ito (2008) and cividis: told apart with any kind of colour vision.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from oodcli.files.scores import Scores
from oodcli.report.evaluation import ID, Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Without their yellow: too pale for a thin line on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_GREY = "#BBBBBB"
_SHOWN = 10
"""So many ROC curves are coloured; more cannot be told apart."""
_BINS = 40
_LETTERS = 14
"""Of 7 points, so many are an inch wide."""
_DPI = 150


def roc_figure(
    evaluation: Evaluation, id_scores: Scores, ood_scores: Mapping[str, Scores]
) -> Figure:
    """A panel for each set, a curve for each detector; OOD is the positive class. With more than
    ten detectors the ten best by AUROC (the mean over the sets) have colours, the rest is grey."""
    ranked = _ranked(evaluation)
    shown = ranked[:_SHOWN]
    figure, panels, rest = _grid(len(evaluation.sets), columns=3, width=3.1, height=3.1, legend=2.1)
    for panel, name in zip(panels, evaluation.sets, strict=True):
        panel.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
        for detector in reversed(ranked):
            x, y = _roc(id_scores.detectors[detector], ood_scores[name].detectors[detector])
            if detector in shown:
                panel.plot(x, y, linewidth=1.5, zorder=3, **_line(shown.index(detector)))
            else:
                panel.plot(x, y, color=_GREY, linewidth=0.6, zorder=2)
        panel.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        panel.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        panel.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        panel.set_title(_label(name, 30), fontsize=10)
        panel.set_xlabel("false positives: ID flagged, %", fontsize=8)
        panel.set_ylabel("true positives: OOD flagged, %", fontsize=8)

    from matplotlib.lines import Line2D

    last = evaluation.columns[-1]
    handles = []
    for k, name in enumerate(shown):
        area = 100 * evaluation.get(name, last, "auroc").value
        label = f"{_marked(evaluation, name, 20)}  {area:.2f}"
        handles.append(Line2D([], [], linewidth=1.5, label=label, **_line(k)))
    if len(ranked) > len(shown):
        others = f"{len(ranked) - len(shown)} others"
        handles.append(Line2D([], [], color=_GREY, linewidth=0.8, label=others))
    handles.append(
        Line2D([], [], color=_GREY, linewidth=0.8, linestyle=(0, (1, 2)), label="chance  50.00")
    )
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
    says how many scores are infinite.
    """
    figure, panels, rest = _grid(
        len(evaluation.detectors),
        columns=3 if len(evaluation.detectors) <= 12 else 5,
        width=3.1,
        height=2.1,
        legend=2.0,
    )
    for panel, detector in zip(panels, evaluation.detectors, strict=True):
        columns = [
            id_scores.detectors[detector],
            *(ood_scores[name].detectors[detector] for name in evaluation.sets),
        ]
        edges = np.linspace(*_span(columns), _BINS + 1)
        shares = [_shares(column, edges) for column in columns]
        panel.stairs(shares[0], edges, fill=True, color=_GREY)
        for k, share in enumerate(shares[1:]):
            panel.stairs(share, edges, linewidth=1.2, **_line(k))
        infinite = sum(int(np.isinf(column).sum()) for column in columns)
        title = _marked(evaluation, detector, 24) + (f" ({infinite} infinite)" if infinite else "")
        panel.set_title(title, fontsize=9)
        panel.set_xlim(edges[0], edges[-1])
        panel.set_ylim(bottom=0)
        panel.set_xlabel("score, higher = more OOD", fontsize=7)
        panel.set_ylabel("rows per bin, %", fontsize=7)
        panel.locator_params(axis="both", nbins=5)

    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=_GREY, label=ID)]
    handles += [
        Line2D([], [], linewidth=1.2, label=_label(name, 20), **_line(k))
        for k, name in enumerate(evaluation.sets)
    ]
    rest.legend(handles=handles, loc="upper left", fontsize=8)
    figure.suptitle("Scores; the outermost bins hold what lies beyond, and infinity", fontsize=11)
    _footnote(evaluation, figure)
    return figure


def heatmap_figure(evaluation: Evaluation) -> Figure:
    """AUROC in percent, detector by set, the best detector on top; below 50 all one colour."""
    ranked, columns = _ranked(evaluation), evaluation.columns
    values = np.array(
        [[100 * evaluation.get(d, name, "auroc").value for name in columns] for d in ranked]
    )  # (detectors, columns)
    size = (2.8 + 0.95 * len(columns), 1.8 + 0.27 * max(len(ranked), 3))
    figure = _figure(size)
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="cividis", vmin=50, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        axes.text(
            column,
            row,
            f"{value:.1f}",
            ha="center",
            va="center",
            fontsize=8,
            color="black" if value > 75 else "white",
        )
    folded = ["\n".join(textwrap.wrap(_label(name, 36), 12)) for name in columns]
    axes.set_xticks(range(len(columns)), folded, fontsize=8)
    names = [_marked(evaluation, name, 24) for name in ranked]
    axes.set_yticks(range(len(ranked)), names, fontsize=8)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False, bottom=False)
    if len(columns) > 1:  # the mean is no set
        axes.axvline(len(columns) - 1.5, color="white", linewidth=3)
    bar = figure.colorbar(image, ax=axes, extend="min" if values.min() < 50 else "neither")
    bar.set_label("AUROC, %", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle("AUROC, %" if len(columns) == 1 else "AUROC, %, best mean first", fontsize=11)
    _footnote(evaluation, figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """As PNG. A letter that the font lacks is drawn as a box, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, format="png", dpi=_DPI)


def _ranked(evaluation: Evaluation) -> list[str]:
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


def _figure(size: tuple[float, float]) -> Figure:
    """size: width and height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=size, dpi=_DPI, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
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


def _roc(
    id_scores: NDArray[np.float64], ood_scores: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(points,) false and true positive rates from (1, 1) to (0, 0), a point for each threshold;
    those that fall on one thousandth of the axes are left out, they cannot be seen."""
    thresholds = np.unique(np.concatenate([id_scores, ood_scores]))
    rates = [
        1 - np.searchsorted(np.sort(scores), thresholds, side="right") / scores.size
        for scores in (id_scores, ood_scores)
    ]
    points = np.vstack([[1.0, 1.0], np.column_stack(rates)])  # (points, 2)
    seen = np.any(np.diff(points.round(3), axis=0, prepend=2.0), axis=1)
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
