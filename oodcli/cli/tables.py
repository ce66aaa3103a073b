"""Tables for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from oodcli.api import Evaluation

_NAME = 20  # a longer detector's name is folded: it may be an artefact's
_CELL = 6  # "100.00"
_GAP = 2


def evaluation_table(
    evaluation: Evaluation, width: int, metrics: Sequence[str] = ("auroc", "tnr95")
) -> Table:
    """A row per detector, in percent, the best of a column in bold; at most ``width`` wide.

    It has as many columns as fit: all metrics of all sets, or the first metric of all sets and the
    others of the mean only, or the mean of all metrics. Names of sets wrap, preferably at hyphens.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from oodcli.report.tables import TITLES, percent

    columns, widths = _layout(evaluation, width, metrics)
    table = Table(
        title="percent, best in bold",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, _GAP - 1, 0, 0),  # and the line between columns, which SIMPLE_HEAD leaves blank
    )
    table.add_column("detector", max_width=_NAME, overflow="fold", vertical="bottom")
    for (set_, metric), room in zip(columns, widths, strict=True):
        lines = [*textwrap.wrap(set_, room), TITLES[metric].split(" ")[0]]
        table.add_column(Text("\n".join(lines)), justify="right", vertical="bottom", no_wrap=True)
    best = [evaluation.best(set_, metric) for set_, metric in columns]
    for detector in evaluation.detectors:
        cells = [
            Text(
                percent(evaluation.get(detector, set_, metric)),
                style="bold" if detector in top else "",
            )
            for (set_, metric), top in zip(columns, best, strict=True)
        ]
        table.add_row(Text(evaluation.marked(detector)), *cells)
    return table


def _layout(
    evaluation: Evaluation, width: int, metrics: Sequence[str]
) -> tuple[list[tuple[str, str]], list[int]]:
    """(set, metric) of each column, and its width."""
    last = evaluation.columns[-1]
    everything = [(set_, metric) for set_ in evaluation.columns for metric in metrics]
    means = [(last, metric) for metric in metrics]
    brief = [(set_, metrics[0]) for set_ in evaluation.columns] + means[1:]
    names = map(evaluation.marked, evaluation.detectors)
    detector = min(_NAME, max(map(len, ("detector", *names))))
    for columns, whole_words in ((everything, True), (brief, True), (brief, False)):
        widths = [max(_CELL, _longest(set_) if whole_words else 0) for set_, _ in columns]
        if detector + sum(widths) + _GAP * len(widths) <= width:
            return columns, widths
    return means, [_CELL] * len(means)


def _longest(name: str) -> int:
    """The longest part of a name that wraps at its hyphens."""
    return max(map(len, textwrap.wrap(name, 1, break_long_words=False)), default=0)
