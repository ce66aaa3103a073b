"""Box plots of the sample-free indicators from feature caches (Begon & Geurts 2021, appendix D)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from oodcli import detectors
from oodcli.detectors.one_class_sum import SUMMED, OneClassSum, indicators
from oodcli.files.cache import FeatureCache
from oodcli.report.evaluation import ID
from oodcli.report.figures import _ID_COLOUR, _figure, _label, _line
from oodcli.report.layers import VIRTUAL, LayerInputs, _require_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""The ends of the whiskers, the quartiles and the median."""

Boxes = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Indicator → set → quantile, such as ``0.25`` → the score below which that share of rows is."""

_COLUMNS = 4
_SQUARES = ("dms", "dms-aos", "dss")
"""Means of squares: in images far from the network's own they are larger by orders of magnitude."""
_WIDE = 30.0
"""From so many times the least of these on, their axis is logarithmic."""


def indicator_boxes(inputs: LayerInputs) -> tuple[Boxes, list[str]]:
    """``QUANTILES`` of the indicators of 1c-sum in each set, and a note where a cache lacks what
    some of them need: these are left out. Rows with a score that is not finite do not count.

    Reads the caches in blocks; of one set at a time, one number a row and indicator is kept. Raises
    FileError when a set has no finite row.
    """
    shown = [name for name in SUMMED if not inputs.lacking(detectors.get(name).needs, name)]
    left_out = [name for name in SUMMED if name not in shown]
    notes = []
    if left_out:
        what = f"figure 'indicators' without {', '.join(left_out)}" if shown else ""
        lacking = inputs.lacking(OneClassSum.needs, OneClassSum.name)
        notes.append((what or "no figure 'indicators'") + f": {lacking}")
    boxes: dict[str, dict[str, dict[str, float]]] = {name: {} for name in shown}
    if shown:
        for set_, cache in inputs.named.items():
            for name, quantiles in _quantiles(cache, shown).items():
                boxes[name][set_] = quantiles
    return boxes, notes


def _quantiles(cache: FeatureCache, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Indicator → quantile → score."""
    needs = frozenset().union(*(detectors.get(name).needs for name in names))
    scores = np.empty((len(names), cache.count))
    count = 0
    for block in cache.rows(needs):
        rows = indicators(block, names)  # (N, I)
        good = rows[torch.isfinite(rows).all(1)]
        scores[:, count : count + len(good)] = good.T.numpy()
        count += len(good)
    _require_rows(cache, count)
    found = {}
    for name, row in zip(names, scores[:, :count], strict=True):
        values = np.quantile(row, QUANTILES, overwrite_input=True).tolist()
        found[name] = dict(zip(map(str, QUANTILES), values, strict=True))
    return found


def indicators_figure(boxes: Boxes) -> Figure:
    """A panel for each indicator, in it a box for each set from the first quartile to the third
    with a line at the median, and whiskers to the 5 % and 95 % quantiles, which the grey band shows
    of ID. See Begon & Geurts 2021, appendix D."""
    sets = list(next(iter(boxes.values())))
    columns = min(_COLUMNS, len(boxes))
    rows = math.ceil(len(boxes) / columns)
    figure = _figure((1.95 * columns + 1.3, (0.19 * len(sets) + 0.55) * rows + 0.7))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel, (name, box) in zip(panels, boxes.items(), strict=False):
        lows, highs = ([each[end] for each in box.values()] for end in ("0.05", "0.95"))
        if name in _SQUARES and min(lows) > 0 and max(highs) > _WIDE * min(lows):
            panel.set_xscale("log")
        else:
            panel.ticklabel_format(axis="x", useOffset=False)
            panel.locator_params(axis="x", nbins=4)
        panel.use_sticky_edges = False  # a box at the end of the axis would be cut
        _boxes(panel, box)
        panel.set_title(name, fontsize=9, pad=3)
        panel.tick_params(labelsize=7)
    for panel in panels[len(boxes) :]:
        panel.axis("off")
    panels[0].set_yticks(range(len(sets)), [_label(name, 16) for name in sets])
    panels[0].set_ylim(len(sets) - 0.4, -0.6)
    figure.suptitle("Sample-free indicators, higher = more OOD", fontsize=11)
    note = "box: quartiles and median; whiskers: 5 % and 95 %; grey band: 5 % to 95 % of ID"
    figure.supxlabel(note, fontsize=7)
    return figure


def _boxes(panel: Axes, box: Mapping[str, Mapping[str, float]]) -> None:
    from matplotlib.colors import to_rgb

    for k, (name, quantiles) in enumerate(box.items()):
        low, first, median, third, high = quantiles.values()
        edge = {ID: _ID_COLOUR, VIRTUAL: "black"}.get(name) or _line(k - 1)["color"]
        if name == ID:
            panel.axvspan(low, high, color="#EEEEEE", linewidth=0, zorder=0)
        panel.hlines([k, k], [low, third], [first, high], color=edge, linewidth=1)
        panel.vlines([low, high], k - 0.15, k + 0.15, color=edge, linewidth=1)
        face = "white" if name == VIRTUAL else tuple(0.7 + 0.3 * part for part in to_rgb(edge))
        panel.barh(k, third - first, 0.6, left=first, edgecolor=edge, facecolor=face)
        panel.vlines(median, k - 0.3, k + 0.3, color=edge, linewidth=1.8)
