"""What duo, trio and c2ir-peak share: detectors that err on different images, on a common scale and
added."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.c2ir_z import C2IRZ
from oodcli.errors import DetectorError
from oodcli.features import Features


def on_common_scale(scores: Tensor, median: Tensor, spread: Tensor) -> Tensor:
    """(s − median)/interquartile range. scores: (N, P); median, spread: (P,). Returns (N, P)."""
    return (scores - median) / spread


def median_and_spread(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Median and interquartile range of each column, quantiles interpolated between neighbouring
    ranks as numpy does. scores: (N, P) float64, finite, N ≥ 1. Returns (P,), (P,)."""
    ranked = scores.sort(0).values
    place = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64) * (len(ranked) - 1)
    low, high = ranked[place.floor().long()], ranked[place.ceil().long()]  # (3, P)
    first, median, third = low + (high - low) * (place % 1)[:, None]
    return median, third - first


@dataclass(frozen=True)
class Summed(Detector):
    """Σ r(part), r(s) = (s − median)/interquartile range over a pool of virtual images that the
    network errs on as often as on real ones. Nothing is tuned, and no image is real.

    deviation: fitted on virtual images. median, spread: (P,), of the parts' scores on the pool.
    usual: (T,), medians of what the scores are sums of, for explanations.
    """

    fitted = True
    needs_pool = True
    explains = True

    deviation: C2IRZ
    median: Tensor
    spread: Tensor
    usual: Tensor

    @classmethod
    def fit_needs(cls, **hyperparameters: Any) -> frozenset[str]:
        return C2IRZ.fit_needs()

    @property
    def layers_read(self) -> frozenset[str] | None:
        return frozenset(self.deviation.layers)

    @property
    def every_class(self) -> bool:
        return self.deviation.every_class

    @property
    def strict_on_virtual(self) -> bool:
        return self.deviation.strict_on_virtual

    @property
    @abstractmethod
    def parts(self) -> tuple[Detector, ...]:
        """P detectors, fitted."""

    def contributions(self, test: Features) -> tuple[Sequence[str], Tensor]:
        """What the scores are the sums of, each from its median on the pool and in the unit of the
        sum: a score is their sum and a constant."""
        parts = [part.contributions(test) for part in self.parts]
        names = [name for words, _ in parts for name in words]
        pairs = zip(self.spread, parts, strict=True)
        units = torch.cat([unit.expand(terms.shape[1]) for unit, (_, terms) in pairs])
        return names, on_common_scale(
            torch.cat([terms for _, terms in parts], 1), self.usual, units
        )

    def _score(self, test: Features) -> Tensor:
        scores = _scores_of(self.parts, test)
        return on_common_scale(scores, self.median, self.spread).sum(1)

    @classmethod
    def _on_pool(cls, parts: Sequence[Detector], pool: Blocks) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores (N, P) of the rows of the pool that all parts have finite scores of; and median,
        spread and usual. Raises DetectorError when there is none, or when a score does not vary
        over them."""
        kept: list[tuple[Tensor, Tensor]] = []
        for block in finite_rows(pool, cls.needs, cls.name):
            scores = _scores_of(parts, block)
            good = torch.isfinite(scores).all(1)
            kept.append((scores[good], _terms_of(parts, block)[good]))
        rows, terms = (torch.cat(each) for each in zip(*kept, strict=True))
        if not len(rows):
            raise DetectorError(f"{cls.name}: no row of the pool has finite scores")
        median, spread = median_and_spread(rows)
        for part, value in zip(parts, spread.tolist(), strict=True):
            if not value > 0:
                raise DetectorError(
                    f"{cls.name}: {part.name} gives half of the {len(rows)} rows of the pool or "
                    "more the same score, so it has no scale: calibrate on more and different "
                    "images"
                )
        usual = median_and_spread(terms)[0]
        return rows, {"median": median, "spread": spread, "usual": usual}


def _scores_of(parts: Sequence[Detector], block: Features) -> Tensor:
    """(N, P)."""
    return torch.stack([part.score(block) for part in parts], 1)


def _terms_of(parts: Sequence[Detector], block: Features) -> Tensor:
    """(N, T), part by part."""
    return torch.cat([part.contributions(block)[1] for part in parts], 1)
