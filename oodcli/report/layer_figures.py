"""The papers' figures from feature caches: means by layer, a map of the features, transitions of
LSGM's components, virtual images beside real ones, and those of ``indicators`` and ``ablation``."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from oodcli.detectors.lsgm import LSGM
from oodcli.errors import FileError, OodcliError
from oodcli.files.atomic import atomic, make_folder
from oodcli.report.ablation import Ablation, ablate, ablation_figure
from oodcli.report.evaluation import ID
from oodcli.report.figures import (
    _CHANCE,
    _ID_COLOUR,
    _LETTERS,
    _MARKERS,
    _figure,
    _grid,
    _label,
    _line,
    save,
    svg,
)
from oodcli.report.indicators import Boxes, indicator_boxes, indicators_figure
from oodcli.report.layers import (
    _FEATURES,
    _MEANS,
    BATCHNORM,
    METHODS,
    VIRTUAL,
    Curves,
    LayerInputs,
    Map,
    feature_map,
    image_paths,
    layer_curves,
    paths_of_half,
    transitions,
)
from oodcli.report.thumbnails import SIDE, read_thumbnails

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = ("layers", "map", "transitions", "impressions", "indicators", "ablation")
SUFFIXES = (".png", ".svg")

_TICKS = 24
"""So many layers have their name on the axis."""
_CLASSES = 10
"""So many classes have their name on the map, or a row among the impressions."""
_GAP = 6
"""Pixels between two images."""


@dataclass(frozen=True)
class LayerReport:
    """paths: the files written. curves, boxes, ablation: what their figures show; None or empty
    where those are left out. notes: what was left out, and why."""

    paths: list[Path]
    curves: Curves | None
    boxes: Boxes
    ablation: Ablation
    notes: list[str]


def refuse_existing_figures(directory: Path, *, force: bool = False) -> None:
    """Raises FileError when ``directory`` is a file, or one of the files that may be written
    exists."""
    if directory.exists() and not directory.is_dir():
        raise FileError(f"{directory} is a file, expected a folder: choose another -o")
    for name in FIGURES:
        for suffix in SUFFIXES:
            path = directory / (name + suffix)
            if path.exists() and not force:
                raise FileError(f"{path} exists: choose another -o, or overwrite it with --force")


def write_layer_figures(
    inputs: LayerInputs,
    directory: Path,
    *,
    method: str = "pca",
    seed: int = 0,
    force: bool = False,
) -> LayerReport:
    """Writes the figures as .png and .svg into ``directory``, which is made where it is missing:
    all of them appear, or none. ``layers``, ``map``, ``indicators`` and ``ablation`` are left out,
    with a note, where a cache lacks what they show; ``transitions``, ``impressions`` and
    ``ablation`` where nobody gave an artefact, images or features of virtual images. Those of a run
    before that are not drawn now are taken away.

    method: of the map. seed: of t-SNE and of the ablation's random weights. Raises FileError when a
    figure exists and ``force`` is not set, when none can be drawn, or when the disk refuses.
    """
    if method not in METHODS:
        raise OodcliError(f"--map {method}: expected {' or '.join(METHODS)}")
    refuse_existing_figures(directory, force=force)
    notes = []
    drawn: dict[str, Figure] = {}
    curves = None
    for name, needs, who in (("layers", _MEANS, "dms"), ("map", _FEATURES, "knn")):
        lacking = inputs.lacking(needs, who)
        if lacking:
            notes.append(f"no figure '{name}': {lacking}")
        elif name == "layers":
            curves = layer_curves(inputs)
            drawn[name] = layers_figure(curves)
        else:
            names = inputs.id.provenance.class_names
            drawn[name] = map_figure(feature_map(inputs, method, seed), names)
    if inputs.lsgm is not None and isinstance(inputs.lsgm.detector, LSGM):
        detector = inputs.lsgm.detector
        if len(detector.layer_names) > 1:
            found = transitions(inputs, detector)
            drawn["transitions"] = transitions_figure(found, detector.layer_names)
        else:
            notes.append("no figure 'transitions': lsgm was fitted on a single layer")
    if inputs.images is not None:
        drawn["impressions"], note = _impressions(inputs)
        notes += [note] if note else []
    boxes, more = indicator_boxes(inputs)
    notes += more
    if boxes:
        drawn["indicators"] = indicators_figure(boxes)
    ablation, more = ablate(inputs, seed)
    notes += more
    if ablation:
        drawn["ablation"] = ablation_figure(ablation)
    if not drawn:
        raise FileError(f"no figure can be drawn: {'; '.join(notes)}")
    paths = [directory / (name + suffix) for name in drawn for suffix in SUFFIXES]
    with make_folder(directory), ExitStack() as stack:
        # All are moved into place when the last is written: the stack unwinds only then.
        for name, figure in drawn.items():
            png, text = (
                stack.enter_context(atomic(directory / (name + suffix), force=force))
                for suffix in SUFFIXES
            )
            save(figure, png)
            text.write_text(svg(figure), encoding="utf-8")
    for name in FIGURES:
        if name not in drawn:
            for suffix in SUFFIXES:
                (directory / (name + suffix)).unlink(missing_ok=True)
    return LayerReport(paths, curves, boxes, ablation, notes)


def layers_figure(curves: Curves) -> Figure:
    """A point for each BatchNorm layer, in the network's order, a line for each set. Left: how far
    the set's means of the channels lie from BatchNorm's running means. Right: how far its means of
    a class lie from those of the ID images of that class. Both in BatchNorm's standard deviations,
    averaged over channels (and classes). See C2IR, fig. 2c."""
    figure, panels, rest = _grid(2, columns=2, width=4.4, height=3.7, legend=1.8)
    layers = list(curves.from_batchnorm[ID])
    sets = (curves.from_batchnorm, curves.from_id_class)
    titles = ("from BatchNorm's running means", "from ID images of the same class")
    over = ("channels", "channels, classes")
    for panel, lines, title, mean in zip(panels, sets, titles, over, strict=True):
        for k, name in enumerate(lines):
            heights = [lines[name].get(layer, math.nan) for layer in layers]
            panel.plot(range(len(layers)), heights, **_set_line(name, k - 1))
        step = math.ceil(len(layers) / _TICKS)
        panel.set_xticks(
            range(0, len(layers), step),
            [_label(layer, 24) for layer in layers[::step]],
            rotation=90,
            fontsize=6,
        )
        panel.set_ylim(bottom=-0.02 * panel.get_ylim()[1])
        panel.grid(axis="y", color="#EEEEEE", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.set_title(f"distance {title}", fontsize=9)
        panel.set_xlabel("BatchNorm layer, its input", fontsize=8)
        panel.set_ylabel(f"|difference of means| / σ, mean over {mean}", fontsize=7)
    panels[0].axhline(0, **_set_line(BATCHNORM, 0))

    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=_label(name, 18), **_set_line(name, k - 1))
        for k, name in enumerate(curves.from_batchnorm)
    ]
    handles.append(Line2D([], [], label="BatchNorm's averages", **_set_line(BATCHNORM, 0)))
    rest.legend(handles=handles, loc="upper left", fontsize=8)
    figure.suptitle(
        "Activation means by layer; σ: BatchNorm's running standard deviation", fontsize=11
    )
    return figure


def _set_line(name: str, k: int) -> dict[str, Any]:
    """k: the number of an OOD set."""
    if name == ID:
        return {"color": _ID_COLOUR, "linestyle": "-", "linewidth": 2.2}
    if name == BATCHNORM:
        return {**_CHANCE, "color": "black", "linewidth": 1.2}
    if name == VIRTUAL:
        return {"color": "black", "linestyle": "-", "linewidth": 1.2, "marker": "o"} | {
            "markersize": 3.5,
            "markerfacecolor": "white",
        }
    return {**_line(k), "linewidth": 1.4}


def map_figure(found: Map, class_names: Sequence[str]) -> Figure:
    """A dot for each row: ID grey, with the names of at most ten classes where the middle of their
    rows is; each OOD set and the virtual images with a mark of their own. See LSGM, fig. 2."""
    figure, (panel,), rest = _grid(1, columns=1, width=5.6, height=5.2, legend=1.8)
    for k, (name, points) in enumerate(found.points.items()):
        panel.plot(*points.T, **_dots(name, k - 1))
    _name_classes(panel, found, class_names)
    panel.set_aspect("equal", adjustable="datalim")
    if found.share is None:
        panel.set_xticks([])
        panel.set_yticks([])
        title = "Penultimate features, t-SNE"
    else:
        panel.set_xlabel("first principal axis", fontsize=8)
        panel.set_ylabel("second principal axis", fontsize=8)
        title = f"Penultimate features: two axes with {100 * found.share:.0f} % of the variance"

    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            label=f"{_label(name, 16)} ({len(points)})",
            **{**_dots(name, k - 1), "alpha": 1, "markersize": 5},
        )
        for k, (name, points) in enumerate(found.points.items())
    ]
    rest.legend(handles=handles, loc="upper left", fontsize=8, title="rows", title_fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _dots(name: str, k: int) -> dict[str, Any]:
    usual: dict[str, Any] = {"linestyle": "none", "markeredgewidth": 0, "alpha": 0.7}
    if name == ID:
        return usual | {"marker": "o", "color": "#AAAAAA", "markersize": 3.5}
    if name == VIRTUAL:
        edge = {"markeredgewidth": 0.8, "markeredgecolor": "black", "markerfacecolor": "none"}
        return usual | edge | {"marker": "o", "markersize": 4.5, "alpha": 1, "zorder": 4}
    colour = _line(k)["color"]
    return usual | {"marker": _MARKERS[k % len(_MARKERS)], "color": colour, "markersize": 3}


def _name_classes(panel: Axes, found: Map, class_names: Sequence[str]) -> None:
    if len(class_names) > _CLASSES:
        return
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.5, "linewidth": 0}
    for label, name in enumerate(class_names):
        points = found.points[ID][found.classes == label]
        if len(points):
            x, y = np.median(points, axis=0)
            place: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 5}
            panel.text(x, y, _label(name, 14), fontsize=7, bbox=box, **place)


def transitions_figure(
    found: Mapping[str, Mapping[str, NDArray[np.float64]]], layers: Sequence[str]
) -> Figure:
    """A row for each set, a column for each step from layer to layer: in each cell the share of the
    set's rows that take that path between two components, all on one scale; above it on how few
    paths half of the rows are. See LSGM, fig. 3."""
    steps = list(pairwise(layers))
    most = max(float(shares.max()) for one in found.values() for shares in one.values())
    figure = _figure((2.8 * len(steps) + 1.2, 2.7 * len(found) + 0.7))
    panels = figure.subplots(len(found), len(steps), squeeze=False)
    image = None
    for row, (name, matrices) in zip(panels, found.items(), strict=True):
        for panel, (before, after) in zip(row, steps, strict=True):
            shares = 100 * matrices[after]
            image = panel.imshow(
                shares, cmap="cividis", vmin=0, vmax=100 * most, interpolation="nearest"
            )
            half = paths_of_half(matrices[after])
            panel.set_title(f"{_label(name, 14)}: half on {half} of {shares.size}", fontsize=7.5)
            panel.set_xlabel(f"component of {_label(after, 16)}", fontsize=7)
            panel.set_ylabel(f"component of {_label(before, 16)}", fontsize=7)
            panel.tick_params(labelsize=6)
            panel.locator_params(integer=True, nbins=6)
    if image is not None:
        bar = figure.colorbar(image, ax=panels, shrink=0.6)
        bar.set_label("share of the set's rows, %", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    figure.suptitle("LSGM: paths between components", fontsize=11)
    note = "half on n of m: the n most frequent of m paths have half of the set's rows"
    figure.supxlabel(
        "\n".join(textwrap.wrap(note, int(_LETTERS * figure.get_figwidth()))), fontsize=7
    )
    return figure


def _impressions(inputs: LayerInputs) -> tuple[Figure, str]:
    """And a note, where no real image could be opened. Raises FileError when no virtual one can."""
    paths = dict(list(image_paths(inputs).items())[:_CLASSES])
    names = [inputs.id.provenance.class_names[label] for label in paths]
    opened = read_thumbnails(path for pair in paths.values() for one in pair for path in one)
    blocks = {}
    for title, which in (("real images", 0), ("virtual images", 1)):
        rows = [[opened[path] for path in pair[which] if path in opened] for pair in paths.values()]
        if any(rows):
            blocks[title] = rows
    if "virtual images" not in blocks:
        raise FileError(f"{inputs.images}: no virtual image of these classes can be opened")
    note = ""
    if len(blocks) == 1:
        note = f"impressions without real images: {inputs.id.path} names none of these classes "
        note += "that can be opened"
    return impressions_figure(blocks, names), note


def impressions_figure(
    blocks: Mapping[str, Sequence[Sequence[bytes]]], class_names: Sequence[str]
) -> Figure:
    """A row for each class, its real images on the left and its virtual ones on the right. See
    C2IR, fig. 2a and 2b. blocks: title → class → images as JPEG."""
    widths = [max(map(len, rows)) for rows in blocks.values()]
    figure = _figure((0.62 * sum(widths) + 1.2, 0.62 * len(class_names) + 0.8))
    panels = figure.subplots(1, len(blocks), squeeze=False, width_ratios=widths)[0]
    for panel, (title, rows), width in zip(panels, blocks.items(), widths, strict=True):
        panel.imshow(_tiles(rows, width), interpolation="lanczos")
        panel.set_title(title, fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
        for spine in panel.spines.values():
            spine.set_visible(False)
    middles = [(SIDE + _GAP) * row + SIDE / 2 for row in range(len(class_names))]
    panels[0].set_yticks(middles, [_label(name, 16) for name in class_names], fontsize=8)
    panels[0].tick_params(length=0)
    return figure


def _tiles(rows: Sequence[Sequence[bytes]], width: int) -> NDArray[np.uint8]:
    """(H, W, 3): a row of tiles for each row, white where there is no image."""
    from PIL import Image

    step = SIDE + _GAP
    sheet = np.full((len(rows) * step - _GAP, width * step - _GAP, 3), 255, dtype=np.uint8)
    for top, images in enumerate(rows):
        for left, data in enumerate(images):
            tile = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            sheet[top * step :, left * step :][:SIDE, :SIDE] = tile
    return sheet
