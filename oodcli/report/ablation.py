"""C2IR's ablation from feature caches: its weights, and the statistics that it compares with
(paper "C2IR", fig. 2d)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from oodcli.detectors.c2ir import C2IR, Statistics, Weights
from oodcli.errors import DetectorError
from oodcli.files.cache import FeatureCache
from oodcli.metrics import MEAN, auroc
from oodcli.report.figures import _CHANCE, _MARKERS, _grid, _label, _line
from oodcli.report.layers import VIRTUAL, LayerInputs, _require_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WEIGHTS: tuple[Weights, ...] = ("mgi", "uniform", "penultimate", "random")
STATISTICS: tuple[Statistics, ...] = ("virtual", "batchnorm")

Ablation = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Statistics → weights → OOD set → AUROC, and last ``mean`` → their mean."""

_WIDTH = 0.38
_BARS: Mapping[str, dict[str, Any]] = {
    VIRTUAL: {"facecolor": "white", "edgecolor": "black", "linewidth": 1.2},
    "batchnorm": {"facecolor": "#DDDDDD", "edgecolor": "black", "linestyle": ":"},
}


def ablate(inputs: LayerInputs, seed: int) -> tuple[Ablation, list[str]]:
    """AUROC of ``c2ir`` fitted on the virtual images with each of ``WEIGHTS`` and ``STATISTICS``,
    as ``score`` and ``evaluate`` have it: a row that is not finite is the most OOD one. Nothing
    where there are no virtual images, or no OOD set. Notes say what is left out because it was not
    recorded.

    seed: of the random weights. Two detectors are held at a time, and two scores a row. Raises
    FileError when a set has no readable row.
    """
    if inputs.virtual is None or not inputs.ood:
        return {}, []
    lacking = inputs.lacking(C2IR.needs, C2IR.name)
    if lacking:
        return {}, [f"no figure 'ablation': {lacking}"]
    notes = []
    chosen = list(WEIGHTS)
    missing = sorted(C2IR.fit_needs(weights="mgi") - inputs.virtual.recorded)
    if missing:
        chosen.remove("mgi")
        notes.append(
            f"figure 'ablation' without mgi: {inputs.virtual.path} has no {', '.join(missing)}: "
            "record it with: oodcli extract CHECKPOINT VIRTUAL.h5 --for c2ir"
        )
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in STATISTICS}
    try:
        for weights in chosen:
            needs = C2IR.fit_needs(weights=weights)
            fitted = [
                C2IR.fit(inputs.virtual.rows(needs), weights=weights, statistics=each, seed=seed)
                for each in STATISTICS
            ]
            ours = _scores(inputs.id, fitted)
            areas: dict[str, list[float]] = {}
            for name, cache in inputs.ood.items():
                pairs = zip(ours, _scores(cache, fitted), strict=True)
                areas[name] = [auroc(*pair) for pair in pairs]
            for k, statistics in enumerate(STATISTICS):
                of_sets = {name: each[k] for name, each in areas.items()}
                mean = float(np.mean(list(of_sets.values())))
                found[statistics][weights] = {**of_sets, MEAN: mean}
    except DetectorError as error:
        return {}, [f"no figure 'ablation': {error.text}"]
    return found, notes


def _scores(cache: FeatureCache, fitted: Sequence[C2IR]) -> NDArray[np.float64]:
    """(detectors, N) of the readable rows."""
    blocks = [
        torch.stack([detector.score(block) for detector in fitted])
        for block in cache.rows(C2IR.needs)
    ]
    _require_rows(cache, sum(block.shape[1] for block in blocks))
    return torch.cat(blocks, 1).numpy()


def ablation_figure(found: Ablation) -> Figure:
    """For each of the weights two bars, from 50 to the mean AUROC: the means of virtual images of
    the class, and BatchNorm's own averages in their place. A mark for each set, where there are
    several. See C2IR, fig. 2d."""
    figure, (panel,), rest = _grid(1, columns=1, width=4.6, height=3.4, legend=2.0)
    weights = list(found[VIRTUAL])
    sets = [name for name in found[VIRTUAL][weights[0]] if name != MEAN]
    places, means = [], []
    for side, (statistics, by_weights) in zip((-0.5, 0.5), found.items(), strict=True):
        for k, areas in enumerate(by_weights.values()):
            place, mean = k + side * _WIDTH, 100 * areas[MEAN]
            panel.bar(place, mean - 50, 0.9 * _WIDTH, bottom=50, **_BARS[statistics])
            for i, name in enumerate(sets if len(sets) > 1 else ()):
                aside = 0.8 * _WIDTH * ((i + 0.5) / len(sets) - 0.5)
                panel.plot([place + aside], [100 * areas[name]], **_mark(i))
            places.append(place)
            means.append(f"{mean:.1f}")
    panel.axhline(50, **{**_CHANCE, "color": "black"})
    lowest = min(
        area for each in found.values() for areas in each.values() for area in areas.values()
    )
    panel.set_ylim(min(45, 100 * lowest - 5), 102)
    panel.set_xticks(places, means, minor=True, fontsize=7)
    panel.set_xticks(range(len(weights)), weights, fontsize=9)
    panel.tick_params(axis="x", which="major", length=0, pad=15)
    panel.tick_params(axis="x", which="minor", length=2)
    panel.set_ylabel("AUROC, %" if len(sets) == 1 else "AUROC, %; bars: mean", fontsize=8)
    panel.set_xlabel("weights of layers and channels; above them the bars' height", fontsize=8)

    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    titles = {"virtual": "means of virtual images", "batchnorm": "BatchNorm's averages"}
    handles: list[Any] = [Patch(label=titles[name], **_BARS[name]) for name in found]
    if len(sets) > 1:
        handles += [
            Line2D([], [], label=_label(name, 18), **_mark(i)) for i, name in enumerate(sets)
        ]
    rest.legend(handles=handles, loc="upper left", fontsize=8)
    title = "C2IR: weights and statistics"
    figure.suptitle(f"{title}, {_label(sets[0], 24)}" if len(sets) == 1 else title, fontsize=11)
    return figure


def _mark(k: int) -> dict[str, Any]:
    """k: the number of an OOD set."""
    look = {"marker": _MARKERS[k % len(_MARKERS)], "color": _line(k)["color"]}
    edge = {"markeredgewidth": 0.5, "markeredgecolor": "white"}
    return look | edge | {"linestyle": "none", "markersize": 5.5, "zorder": 3}
