"""What a page of scores shows of one detector: counts, histogram, classes, the most suspicious."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oodcli.report.listing import Column, Listing
from oodcli.report.thresholds import stated_rate, stated_threshold

BINS = 60
STEPS = 200
"""Steps of the threshold where the page has not every score."""
CLASSES = 1_000
"""Classes in the table; those with the fewest rows are counted together."""
REACH = 2.0
"""The axis ends so many widths of the middle 90 % beyond them, unless all scores lie nearer."""


@dataclass(frozen=True)
class Calibration:
    """Scores of the images that a threshold is calibrated on. images: in words. quantiles: (q,),
    ascending, of equal shares."""

    images: str
    quantiles: NDArray[np.float64]

    def below(self, score: NDArray[np.float64]) -> NDArray[np.float64]:
        """The share of these images that scores less, linear between the quantiles."""
        finite = self.quantiles[np.isfinite(self.quantiles)]
        shares = np.linspace(0, 1, len(self.quantiles))[: len(finite)]
        if not len(finite):
            return np.zeros_like(score)
        found: NDArray[np.float64] = np.interp(score, finite, shares, left=0.0)
        return found


@dataclass(frozen=True)
class Threshold:
    """value: scores above it are flagged; None without a verdict. rate: nominal rate of false
    alarms, if there is one. exact: whether it flags the rows that the file flags."""

    value: float | None
    rate: float | None = None
    exact: bool = True


@dataclass(frozen=True)
class Overview:
    """One detector, over all R rows of a file. threshold: where the page starts. flagged, silent,
    infinite: rows above it, without a verdict at any threshold, with an infinite score. low, high:
    the axis. bins: rows in each of the equal bins between; the outermost hold what lies beyond.
    expected: the same of as many images of the calibration. steps: thresholds to choose from, and
    above: (classes, steps) rows above each; empty where the page has every row. classes: median
    score of each class. most, least: rows to show, the most extreme first."""

    name: str
    threshold: Threshold
    calibration: Calibration | None
    flagged: int
    silent: int
    infinite: int
    low: float
    high: float
    bins: Sequence[int]
    expected: Sequence[float]
    steps: Sequence[float]
    above: Sequence[Sequence[int]]
    class_flagged: Sequence[int]
    class_medians: Sequence[float]
    most: Sequence[int]
    least: Sequence[int]


Classes = Sequence[tuple[str | None, NDArray[np.int64]]]
"""Predicted classes and their rows; under None those of several small classes."""


def rows_by_class(listing: Listing) -> Classes:
    """The largest class first; the smallest together where there are more than ``CLASSES``."""
    order = np.argsort(listing.predicted, kind="stable")
    codes, starts = np.unique(listing.predicted[order], return_index=True)
    rows = np.split(order, starts[1:]) if len(codes) else []
    found: list[tuple[str | None, NDArray[np.int64]]] = []
    found += sorted(
        zip([listing.names[code] for code in codes], rows, strict=True),
        key=lambda pair: (-len(pair[1]), pair[0]),
    )
    if len(found) > CLASSES:
        rest = np.concatenate([each for _, each in found[CLASSES - 1 :]])
        found = [*found[: CLASSES - 1], (None, rest)]
    return found


def overview(
    listing: Listing,
    column: Column,
    classes: Classes,
    *,
    most: int,
    least: int,
) -> Overview:
    """classes: those of ``rows_by_class``. most, least: rows to show."""
    scores = column.scores
    silent = np.zeros(len(scores), bool) if column.flags is None else np.isnan(column.flags)
    about = ((listing.made or {}).get("calibration") or {}).get(column.name)
    calibration = None if about is None else _calibration(about)
    threshold = _threshold(column, silent, about)
    flagged = _above(scores, silent, threshold.value)
    low, high = _axis(scores, calibration, threshold.value)
    steps: list[float] = []
    above: list[list[int]] = []
    if not listing.complete:
        wanted = [] if threshold.value is None else [threshold.value]
        steps = sorted({*np.linspace(low, high, STEPS).tolist(), *wanted})
        judged = np.where(silent, -np.inf, scores)
        for _, rows in classes:
            ascending = np.sort(judged[rows])
            below = np.searchsorted(ascending, steps, side="right")
            above.append((len(rows) - below).tolist())
    listed = np.fromiter(listing.listed, np.int64, len(listing.listed))
    order = listed[np.argsort(-scores[listed], kind="stable")]
    return Overview(
        column.name,
        threshold,
        calibration,
        int(flagged.sum()),
        int(silent.sum()),
        int(np.isinf(scores).sum()),
        low,
        high,
        _histogram(scores, low, high),
        _expected(calibration, len(scores), low, high),
        steps,
        above,
        [int(flagged[rows].sum()) for _, rows in classes],
        [_median(scores[rows]) for _, rows in classes],
        order[:most].tolist(),
        order[most:][: -least - 1 : -1].tolist(),
    )


def _calibration(about: Mapping[str, Any]) -> Calibration:
    return Calibration(about["images"], np.array([float(each) for each in about["quantiles"]]))


def _above(
    scores: NDArray[np.float64], silent: NDArray[np.bool_], threshold: float | None
) -> NDArray[np.bool_]:
    """(R,) An infinite score is always OOD, as for ``oodcli score``."""
    high = np.isinf(scores) if threshold is None else (scores > threshold) | np.isinf(scores)
    found: NDArray[np.bool_] = high & ~silent
    return found


def _threshold(
    column: Column, silent: NDArray[np.bool_], about: Mapping[str, Any] | None
) -> Threshold:
    """The threshold as the file states it, where that flags the rows that the file flags;
    otherwise the highest score that the file accepts."""
    if column.flags is None:
        return Threshold(None)
    rate = stated_rate(column.basis) if about is None else float(about["rate"])
    stated = stated_threshold(column.basis) if about is None else float(about["threshold"])
    given = int((column.flags > 0).sum())
    finite = column.scores[np.isfinite(column.scores)]
    lowest, highest = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    lowest -= 1e-6 * max(abs(lowest), 1e-6)
    accepted = column.scores[(column.flags == 0) & np.isfinite(column.scores)]
    found = (
        []
        if stated is None
        else [float(np.clip(stated, lowest, highest)) if math.isinf(stated) else stated]
    )
    found.append(accepted.max() if accepted.size else lowest)
    for value in found:
        if int(_above(column.scores, silent, value).sum()) == given:
            return Threshold(float(value), rate)
    return Threshold(float(found[0]), rate, exact=False)


def _axis(
    scores: NDArray[np.float64], calibration: Calibration | None, threshold: float | None
) -> tuple[float, float]:
    """Where the histogram begins and ends, without far outliers; the threshold lies inside."""
    ends = []
    for values in (scores, calibration.quantiles if calibration else scores[:0]):
        finite = values[np.isfinite(values)]
        if finite.size:
            q5, q95 = np.quantile(finite, [0.05, 0.95])
            reach = REACH * (q95 - q5)
            ends += [max(finite.min(), q5 - reach), min(finite.max(), q95 + reach)]
    if threshold is not None:
        ends.append(threshold)
    low, high = (float(min(ends)), float(max(ends))) if ends else (0.0, 1.0)
    if low == high:
        room = max(abs(low), 1.0) / 2
        return low - room, high + room
    return low, high


def _bins(rows: int) -> int:
    return min(BINS, max(10, round(2 * math.sqrt(rows))))


def _histogram(scores: NDArray[np.float64], low: float, high: float) -> list[int]:
    count = _bins(len(scores))
    inside = np.clip(scores, low, high)
    return [int(each) for each in np.histogram(inside, bins=count, range=(low, high))[0]]


def _expected(calibration: Calibration | None, rows: int, low: float, high: float) -> list[float]:
    if calibration is None or not rows:
        return []
    edges = np.linspace(low, high, _bins(rows) + 1)
    shares = calibration.below(edges)
    shares[0], shares[-1] = 0.0, 1.0
    return [round(each, 3) for each in (rows * np.diff(shares)).tolist()]


def _median(scores: NDArray[np.float64]) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.median(scores))
