"""Detection metrics on 1-D arrays of scores, higher = more out of distribution (OOD).

Every metric is exact on the scores as they are: each distinct score is a threshold, rows with equal
scores fall on the same side of it, nothing is interpolated or squashed. ``+inf`` is a score like
any other, the most OOD one. One sort serves all metrics and every bootstrap resample: a resample
changes how often a row counts, never where its score lies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MEAN = "mean"
"""The name that the macro average over the OOD sets has where sets are named."""

CONVENTIONS: Mapping[str, str] = {
    "auroc": "area under the ROC curve; ties count half",
    "fpr95": "FPR95 with ID as the positive class: the share of OOD rows accepted at the smallest "
    "threshold that accepts at least 95 % of the ID rows (1 - tnr95)",
    "tnr95": "share of OOD rows rejected at the smallest threshold that accepts at least 95 % of "
    "the ID rows (ID positive)",
    "fpr95-ood": "FPR95 with OOD as the positive class (OpenOOD, pytorch-ood): the share of ID rows"
    " flagged at the largest threshold that flags at least 95 % of the OOD rows",
    "aupr-in": "average precision (step, not trapezoid), ID positive",
    "aupr-out": "average precision (step, not trapezoid), OOD positive",
    "detection-accuracy": "largest mean of TPR and TNR over all thresholds",
    "tpr10": "share of OOD rows flagged when at most 10 % of the ID rows are (OOD positive)",
}
"""What each metric means, in the order of the files; written under every table."""

LOWER_IS_BETTER = frozenset({"fpr95", "fpr95-ood"})


class Estimate(NamedTuple):
    """A metric and its bootstrap interval; low and high are NaN where none was asked for."""

    value: float
    low: float
    high: float


def auroc(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """P(ood > id) + ½ P(ood = id) of a random OOD row and a random ID row: the area under the ROC
    curve, ties counting half, two infinities being a tie.

    id_scores: (n,), ood_scores: (m,). Raises ValueError when either is empty, not 1-D, or holds NaN
    or −inf; so do all metrics here.
    """
    return _single(_auroc, id_scores, ood_scores)


def tnr95(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """True negative rate at 95 % true positive rate, ID positive.

    The threshold t is the smallest number such that at least 95 % of the ID scores are ≤ t, so the
    ⌈0.95 n⌉-th smallest ID score. A row is accepted as ID when score ≤ t; the result is the share
    of OOD rows with score > t. OOD rows tied with t are accepted. Where more than 5 % of the ID
    scores are infinite, t is infinite and nothing can be rejected: 0.
    """
    return _single(_tnr95, id_scores, ood_scores)


def fpr95(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """False positive rate at 95 % true positive rate, ID positive: 1 − tnr95."""
    return _single(_fpr95, id_scores, ood_scores)


def fpr95_ood(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """False positive rate at 95 % true positive rate, OOD positive (OpenOOD, pytorch-ood).

    The threshold t is the largest number such that at least 95 % of the OOD scores are ≥ t; the
    result is the share of ID rows with score ≥ t. Often a very different number from ``fpr95``.
    """
    return _single(_fpr95_ood, id_scores, ood_scores)


def aupr_in(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Average precision with ID positive: Σ (R_k − R_{k−1}) P_k over the distinct scores from the
    lowest up, a row being called ID when score ≤ threshold. A step function; the trapezoid would be
    optimistic (Davis & Goadrich 2006)."""
    return _single(_aupr_in, id_scores, ood_scores)


def aupr_out(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Average precision with OOD positive: as ``aupr_in``, over the distinct scores from the
    highest down, a row being called OOD when score ≥ threshold."""
    return _single(_aupr_out, id_scores, ood_scores)


def detection_accuracy(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """max over t of ½ (TPR + TNR): share of ID rows with score ≤ t and of OOD rows with score > t.
    Both classes weigh the same whatever their sizes; accepting everything gives ½."""
    return _single(_detection_accuracy, id_scores, ood_scores)


def tpr10(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """True positive rate at 10 % false positive rate, OOD positive: the largest share of OOD rows
    with score > t among the thresholds t for which at most 10 % of the ID rows have score > t."""
    return _single(_tpr10, id_scores, ood_scores)


def evaluate(
    id_scores: ArrayLike, ood_scores: ArrayLike, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Every metric with its 95 % bootstrap interval: ``evaluate_sets`` for a single OOD set."""
    return evaluate_sets(id_scores, {"": ood_scores}, resamples=resamples, seed=seed)[""]


def evaluate_sets(
    id_scores: ArrayLike,
    ood_scores: Mapping[str, ArrayLike],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Estimate]]:
    """Every metric on every OOD set and, under ``mean``, their macro averages.

    id_scores: (n,), each of ood_scores: (m,). Returns {set: {metric: Estimate}}, fractions.

    The intervals are percentile bootstrap intervals (2.5 % and 97.5 %): rows are drawn with
    replacement, ID and each OOD set separately. The ID draw of a resample is shared by all sets,
    so the interval of ``mean`` (the resampled metrics averaged) knows that the sets are compared
    with the same ID rows. The draws depend on the seed and the numbers of rows alone: two detectors
    scored on the same rows are resampled alike. A percentile interval may leave its value out,
    most of all that of ``detection-accuracy``, a maximum. resamples=0: no intervals (NaN).

    Raises ValueError as the metrics do, when there is no set, and when a set is called ``mean``.
    """
    if not ood_scores:
        raise ValueError("expected at least one OOD set, but got none")
    if MEAN in ood_scores:
        raise ValueError(f"a set cannot be called {MEAN!r}: that is the average over the sets")
    if resamples < 0:
        raise ValueError(f"resamples must be 0 or more, but got {resamples}")
    id_values, id_groups = _ranked(id_scores, "id_scores")
    sets = []
    for name, scores in ood_scores.items():
        ood_values, ood_groups = _ranked(scores, f"ood_scores {name}".rstrip())
        sets.append((_Places.of(id_values, ood_values), ood_groups))

    values = np.empty((len(sets), len(_FORMULAS), 1))
    id_counts = np.bincount(id_groups)[None]
    for s, (places, ood_groups) in enumerate(sets):
        values[s] = _all(places, id_counts, np.bincount(ood_groups)[None])

    samples = np.empty((len(sets), len(_FORMULAS), resamples))
    streams = [np.random.default_rng(child) for child in _children(seed, 1 + len(sets))]
    rows = max(len(id_groups), *(len(groups) for _, groups in sets))
    block = max(1, _BLOCK // rows)
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        id_counts = _resampled(streams[0], id_groups, stop - start)
        for s, (places, ood_groups) in enumerate(sets):
            ood_counts = _resampled(streams[1 + s], ood_groups, stop - start)
            samples[s, :, start:stop] = _all(places, id_counts, ood_counts)

    result = {
        name: _estimates(values[s], samples[s]) for s, name in enumerate(ood_scores)
    }  # each (metrics, 1), (metrics, resamples)
    result[MEAN] = _estimates(values.mean(axis=0), samples.mean(axis=0))
    return result


_BLOCK = 2**16
"""Cells of one block of resamples: half a MB an array, which stays in the processor's cache."""


def _checked(scores: ArrayLike, name: str) -> Floats:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected a 1-D array, but got shape {array.shape}")
    if not array.size:
        raise ValueError(f"{name}: expected at least one score, but got none")
    bad = np.isnan(array) | (array == -np.inf)
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(f"{name}: row {row} is {array[row]}: a score is a number or +inf")
    return array


def _ranked(scores: ArrayLike, name: str) -> tuple[Floats, Ints]:
    """The distinct scores, ascending, and the place of each row's score among them."""
    values, groups = np.unique(_checked(scores, name), return_inverse=True)
    return values, groups.astype(np.int64)


def _children(seed: int, count: int) -> list[np.random.SeedSequence]:
    return np.random.SeedSequence(seed).spawn(count)


def _resampled(stream: np.random.Generator, groups: Ints, resamples: int) -> Ints:
    """(resamples, distinct scores): how often each was drawn when as many rows as there are were
    drawn with replacement. groups: (rows,)."""
    distinct = int(groups.max()) + 1
    drawn = groups[stream.integers(groups.size, size=(resamples, groups.size))]
    drawn += distinct * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * distinct)
    return counts.reshape(resamples, distinct)


def _estimates(values: Floats, samples: Floats) -> dict[str, Estimate]:
    """values: (metrics, 1), samples: (metrics, resamples)."""
    if samples.shape[1]:
        low, high = np.quantile(samples, (0.025, 0.975), axis=1)
    else:
        low = high = np.full(len(values), np.nan)
    return {
        name: Estimate(float(values[k, 0]), float(low[k]), float(high[k]))
        for k, name in enumerate(_FORMULAS)
    }


@dataclass(frozen=True)
class _Places:
    """Where the I distinct ID scores and the O distinct OOD scores lie among each other.

    below, upto: (O,), how many distinct ID scores are < and ≤ each OOD score.
    ood_upto: (I,), how many distinct OOD scores are ≤ each ID score.
    """

    below: Ints
    upto: Ints
    ood_upto: Ints

    @classmethod
    def of(cls, id_values: Floats, ood_values: Floats) -> _Places:
        return cls(
            np.searchsorted(id_values, ood_values, side="left"),
            np.searchsorted(id_values, ood_values, side="right"),
            np.searchsorted(ood_values, id_values, side="right"),
        )


@dataclass(frozen=True)
class _Counts:
    """B weightings of the same rows. at: (B, I), rows with each distinct score, ascending;
    under: (B, I + 1), rows with one of the first 0, 1, … I distinct scores. OOD likewise, with O.
    """

    places: _Places
    id_at: Ints
    id_under: Ints
    ood_at: Ints
    ood_under: Ints

    @property
    def n(self) -> int:
        return int(self.id_under[0, -1])

    @property
    def m(self) -> int:
        return int(self.ood_under[0, -1])


def _counts(places: _Places, id_counts: Ints, ood_counts: Ints) -> _Counts:
    return _Counts(places, id_counts, _under(id_counts), ood_counts, _under(ood_counts))


def _under(counts: Ints) -> Ints:
    under = np.zeros((counts.shape[0], counts.shape[1] + 1), dtype=np.int64)
    np.cumsum(counts, axis=1, out=under[:, 1:])
    return under


def _auroc(c: _Counts) -> Floats:
    wins = np.take(c.id_under, c.places.below, axis=1)  # (B, O)
    wins += np.take(c.id_under, c.places.upto, axis=1)  # a win counts twice here, a tie once
    share: Floats = np.einsum("bo,bo->b", c.ood_at, wins) / (2.0 * c.n * c.m)
    return share


def _rejected(c: _Counts, percent: int) -> Floats:
    """(B,): the share of OOD rows above the smallest threshold that accepts percent % of ID."""
    needed = -(-percent * c.n // 100)  # rounded up, in integers: 0.95 n is not exact in binary
    accepted = np.array([np.searchsorted(row, needed) for row in c.id_under[:, 1:]])
    kept = c.ood_under[np.arange(len(accepted)), c.places.ood_upto[accepted]]
    share: Floats = (c.m - kept) / c.m
    return share


def _tnr95(c: _Counts) -> Floats:
    return _rejected(c, 95)


def _fpr95(c: _Counts) -> Floats:
    return 1.0 - _tnr95(c)


def _tpr10(c: _Counts) -> Floats:
    # At most 10 % of ID above the threshold is at least 90 % of ID accepted by it.
    return _rejected(c, 90)


def _fpr95_ood(c: _Counts) -> Floats:
    spare = c.m - -(-95 * c.m // 100)  # OOD rows that may lie below the threshold
    last = np.array([np.searchsorted(row, spare, side="right") for row in c.ood_under[:, :-1]]) - 1
    below = c.id_under[np.arange(len(last)), c.places.below[last]]
    share: Floats = (c.n - below) / c.n
    return share


def _aupr_in(c: _Counts) -> Floats:
    true = c.id_under[:, 1:]
    called = true + np.take(c.ood_under, c.places.ood_upto, axis=1)  # (B, I)
    return _average_precision(c.id_at, true, called) / c.n


def _aupr_out(c: _Counts) -> Floats:
    true = c.m - c.ood_under[:, :-1]
    called = true + (c.n - np.take(c.id_under, c.places.below, axis=1))  # (B, O)
    return _average_precision(c.ood_at, true, called) / c.m


def _average_precision(at: Ints, true: Ints, called: Ints) -> Floats:
    """Σ at · true / called over the thresholds; all (B, T). Nothing called: at is 0 there too."""
    total: Floats = np.einsum("bt,bt->b", at, true / np.maximum(called, 1))
    return total


def _detection_accuracy(c: _Counts) -> Floats:
    # The best thresholds lie just below an OOD score, where no further ID row is to be had for
    # free; below the lowest one the gain is 0 or more. Integers, so that no rounding decides.
    gain = c.m * np.take(c.id_under, c.places.below, axis=1) - c.n * c.ood_under[:, :-1]  # (B, O)
    best: Floats = 0.5 + 0.5 * gain.max(axis=1) / (float(c.n) * c.m)
    return best


_FORMULAS: dict[str, Callable[[_Counts], Floats]] = {
    "auroc": _auroc,
    "fpr95": _fpr95,
    "tnr95": _tnr95,
    "fpr95-ood": _fpr95_ood,
    "aupr-in": _aupr_in,
    "aupr-out": _aupr_out,
    "detection-accuracy": _detection_accuracy,
    "tpr10": _tpr10,
}


def _all(places: _Places, id_counts: Ints, ood_counts: Ints) -> Floats:
    """(metrics, B) from (B, I) and (B, O)."""
    counts = _counts(places, id_counts, ood_counts)
    return np.stack([formula(counts) for formula in _FORMULAS.values()])


def _single(
    formula: Callable[[_Counts], Floats], id_scores: ArrayLike, ood_scores: ArrayLike
) -> float:
    id_values, id_groups = _ranked(id_scores, "id_scores")
    ood_values, ood_groups = _ranked(ood_scores, "ood_scores")
    places = _Places.of(id_values, ood_values)
    counts = _counts(places, np.bincount(id_groups)[None], np.bincount(ood_groups)[None])
    return float(formula(counts)[0])
