"""Where scores become decisions: thresholds to mark in figures, and what nominal rates achieve."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oodcli.files.scores import Scores

_WORDS = re.compile(r"score above ([^\s;]+)(?:;.*)?", re.DOTALL)
"""The basis of a verdict without a calibration (``stages.verdict.Rule``)."""


_RATE = re.compile(r"; nominal ([^\s;]+)")
"""The same of one with a calibration."""


class Threshold(NamedTuple):
    """Scores up to low are accepted, those from high on are flagged; between them nothing is
    known. Both are the same where a file states the threshold."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        return self.low + (self.high - self.low) / 2


def accepting_threshold(id_scores: NDArray[np.float64], percent: int = 95) -> float:
    """The smallest number such that at least ``percent`` % of the ID scores are at most that: the
    threshold of ``metrics.tnr95``. id_scores: (n,)."""
    rank = -(-percent * id_scores.size // 100)  # rounded up
    return float(np.partition(id_scores, rank - 1)[rank - 1])


def verdict_threshold(detector: str, files: Iterable[Scores]) -> Threshold | None:
    """The threshold of the verdicts ``<detector>.ood``: as the file states it, or as the rows show
    it. The rules of ``oodcli score`` never flag a score and accept a higher one.

    None where there is no verdict, where files have other rules, or where all rows, or none with a
    finite score, are flagged.
    """
    low, high = -math.inf, math.inf
    bases = set()
    for scores in files:
        if detector in scores.verdicts:
            flagged, basis = scores.verdicts[detector]
            bases.add(basis)
            column = np.sort(scores.detectors[detector][judged(scores, detector)])
            kept = column.size - flagged
            if kept:
                low = max(low, float(column[kept - 1]))
            if flagged:
                high = min(high, float(column[kept]))
    if len(bases) != 1:
        return None
    basis = bases.pop()
    if (stated := stated_threshold(basis)) is not None:
        return Threshold(stated, stated)
    if _WORDS.fullmatch(basis):
        return None
    return Threshold(low, high) if -math.inf < low < high < math.inf else None


def stated_threshold(basis: str) -> float | None:
    """The number in the basis of verdicts without a calibration; None in that of others."""
    return _finite(_WORDS.fullmatch(basis))


def stated_rate(basis: str) -> float | None:
    """The nominal false-alarm rate in the basis of verdicts with a calibration."""
    return _finite(_RATE.search(basis))


def _finite(found: re.Match[str] | None) -> float | None:
    try:
        number = float(found[1]) if found else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def flagged_shares(
    id_scores: Scores, detector: str, rates: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The share of ID rows that a verdict at each nominal rate flags, of those that have a verdict:
    those with p ≤ rate and those whose score is infinite. rates: (r,). Returns (r,)."""
    known = judged(id_scores, detector)
    p = id_scores.p_values[detector][known]
    p = np.sort(np.where(np.isinf(id_scores.detectors[detector][known]), 0.0, p))  # NaN at the end
    return np.searchsorted(p, rates, side="right") / max(p.size, 1)


def judged(scores: Scores, detector: str) -> NDArray[np.bool_]:
    """(R,) which of the readable rows have a verdict of this detector."""
    rows = scores.detectors[detector].size
    return ~scores.unjudged.get(detector, np.zeros(rows, np.bool_))
