"""From a score to a decision: p-values from calibration scores, and thresholds without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oodcli.errors import DetectorError

ROWS_A_CLASS = 5
"""Average calibration rows per class from which a class without rows is not a coincidence."""

POOL_WEIGHT = 30.0
"""Weight of a pool of accuracy-matched virtual images beside real images, in real images."""


@dataclass(frozen=True)
class Calibration:
    """Scores of in-distribution images, and their weights.

    scores: (n,) float64, ascending. weights: (n,), 1 for a real image; the rows of a virtual image
    weigh 1 together, and beside real images a whole pool 30. real, virtual: numbers of rows.
    matched_accuracy: accuracy that the pool was degraded to; None without a pool. classes: number
    of classes of the network; without_rows: classes without a row; 0 and None in older artefacts.
    """

    scores: Tensor
    weights: Tensor
    real: int
    virtual: int
    matched_accuracy: float | None = None
    classes: int = 0
    without_rows: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.scores.ndim != 1 or not len(self.scores) or self.scores.shape != self.weights.shape:
            raise DetectorError("a calibration needs one weight per score, and at least one score")

    @property
    def words(self) -> str:
        """Basis of a verdict, as every table prints it."""
        if not self.virtual:
            return f"{self.real} real images"
        real = f"{self.real} real images" if self.real else "no real data"
        return f"virtual, matched to accuracy {self.matched_accuracy:.4g}, {real}"

    @property
    def images(self) -> str:
        """The images in short, for a line of the terminal."""
        real = f"{self.real} real images"
        if not self.virtual:
            return real
        return f"virtual and {real}" if self.real else "virtual images"

    @property
    def without_verdict(self) -> tuple[int, ...]:
        """Classes without a row, if there are ``ROWS_A_CLASS`` rows per class on average. With
        fewer, a class may lack rows by chance."""
        enough = self.real + self.virtual >= ROWS_A_CLASS * self.classes
        return (self.without_rows or ()) if enough else ()

    @property
    def unit(self) -> float:
        """Weight of the scored image itself: that of a pool image, if there is a pool. A weight of
        1 beside a pool of 30 makes verdicts about two points more lenient (on ResNet-20)."""
        return float(self.weights.min())

    @property
    def mass(self) -> float:
        """Total weight of the rows and of the scored image."""
        return float(self.weights.sum()) + self.unit

    @property
    def resolution(self) -> float:
        """The smallest possible p-value."""
        return self.unit / self.mass

    def p_value(self, scores: Tensor) -> Tensor:
        """p = (unit + Σ weights of scores ≥ s)/mass, on real rows alone (1 + #≥)/(n + 1): how
        probable a score at least as high is on in-distribution images (Vovk et al. 2005,
        conformal). scores: (N,), returns (N,)."""
        after = torch.zeros(len(self.weights) + 1, dtype=torch.float64)
        after[:-1] = self.weights.flip(0).cumsum(0).flip(0)  # (n + 1,), weight from here upwards
        first = torch.searchsorted(self.scores, scores.double(), side="left")
        return (self.unit + after[first]) / self.mass

    def threshold(self, rate: float) -> float:
        """The score t for which p ≤ rate exactly where the score exceeds t. +inf if no finite score
        has so small a p-value, −inf if all have."""
        if self.resolution > rate:
            return torch.inf
        accepted = self.scores[self.p_value(self.scores) > rate]
        return float(accepted[-1]) if len(accepted) else -torch.inf

    def quantiles(self, most: int = 200) -> Tensor:
        """Scores below which equal shares of the weight lie, from the smallest score to the
        largest. Returns (min(n, most) + 1,)."""
        levels = torch.linspace(0, 1, min(len(self.scores), most) + 1, dtype=torch.float64)
        share = self.weights.double().cumsum(0) / self.weights.double().sum()
        return self.scores[torch.searchsorted(share, levels - 1e-12).clamp(max=len(share) - 1)]

    def achieved(self, rate: float, level: float = 0.9) -> tuple[float, float]:
        """Interval of the false-alarm rate that a nominal ``rate`` achieves on new images like the
        calibration rows, given their sampling error: quantiles of a Beta distribution with
        l = ⌊rate·(n + 1)⌋ and n + 1 − l, where n + 1 is the mass (Vovk 2012, prop. 2a)."""
        from scipy.stats import beta

        flagged = int(rate * self.mass + 1e-9)
        if flagged == 0:
            return 0.0, 0.0
        law = beta(flagged, self.mass - flagged)
        return float(law.ppf((1 - level) / 2)), float(law.ppf((1 + level) / 2))


def calibrate(
    real: Sequence[Tensor],
    pools: Sequence[Tensor],
    matched_accuracy: float | None,
    images: int | None = None,
) -> Calibration:
    """Real rows weigh 1 each; a pool weighs 30 in all beside real rows, and 1 per image alone.

    real, pools: scores of each file, (n,). images: of the pools, where each has several rows; None:
    as many as rows. Raises DetectorError without a score.
    """
    nothing = torch.zeros(0, dtype=torch.float64)
    r, v = (torch.cat([nothing, *parts]) for parts in (real, pools))
    if not len(r) + len(v):
        raise DetectorError("no rows to calibrate on")
    share = 1.0 if images is None or not len(v) else min(1.0, images / len(v))
    if len(r) and len(v):
        share = min(share, POOL_WEIGHT / (len(v) + 1))
    weights = torch.cat([torch.ones_like(r), torch.full_like(v, share)])
    scores, order = torch.cat([r, v]).sort()
    return Calibration(scores, weights[order], len(r), len(v), matched_accuracy if len(v) else None)


def split_threshold(scores: Tensor) -> float:
    """The threshold that cuts scores into two groups with the smallest variance within them (Otsu
    1979; Begon & Geurts 2021, §5). scores: (N,). Raises DetectorError with fewer than two distinct
    finite scores."""
    x = scores[torch.isfinite(scores)].double().sort().values
    if len(x) < 2 or x[0] == x[-1]:
        raise DetectorError("--threshold split needs at least two different scores")
    below = torch.arange(1, len(x), dtype=torch.float64)  # (n - 1,), size of the lower group
    total = (x - x.mean()).cumsum(0)[:-1]
    # The variance within is least where that between the groups is greatest.
    between = total.square() / below + total.square() / (len(x) - below)
    between[x[1:] == x[:-1]] = -torch.inf
    cut = int(between.argmax())
    return float((x[cut] + x[cut + 1]) / 2)


def contamination_threshold(scores: Tensor, share: float) -> float:
    """The threshold above which the given share of the scores lies. Infinite scores count among
    the highest. scores: (N,); 0 < share < 1."""
    x = scores.double().sort().values
    kept = min(max(len(x) - round(share * len(x)), 0), len(x))
    if kept == 0:
        return -torch.inf
    low = x[kept - 1]
    high = x[kept] if kept < len(x) else low
    return float((low + high) / 2) if torch.isfinite(high) else float(low)


def labelled_threshold(scores: Tensor, ood: Tensor) -> float:
    """The threshold with the best mean of true positive and true negative rate on labelled rows.
    scores: (N,), ood: (N,) bool. Raises DetectorError when one kind is missing."""
    inside, outside = scores[~ood].double(), scores[ood].double()
    if not len(inside) or not len(outside):
        raise DetectorError(
            "labelled rows must be of both kinds: label some 0 (ID) and some 1 (OOD)"
        )
    values = torch.unique(torch.cat([inside, outside]))  # ascending
    inside, outside = inside.sort().values, outside.sort().values
    accepted = torch.searchsorted(inside, values, side="right") / len(inside)
    rejected = 1 - torch.searchsorted(outside, values, side="right") / len(outside)
    best = int((accepted + rejected).argmax())
    if best + 1 < len(values) and torch.isfinite(values[best + 1]):
        return float((values[best] + values[best + 1]) / 2)
    return float(values[best])
