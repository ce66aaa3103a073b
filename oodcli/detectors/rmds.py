"""Relative Mahalanobis distance (Ren et al. 2021): what is far from the classes, but not from all
rows."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks
from oodcli.detectors.hyperparameters import require_between
from oodcli.detectors.layer_choice import EMBEDDING
from oodcli.detectors.tied_gaussians import (
    NORMALIZE,
    WhiteMeans,
    mahalanobis,
    scatters,
    shortened,
    white_means,
)
from oodcli.detectors.widened import WIDEN, widened
from oodcli.features import Features, recorded

log = logging.getLogger(__name__)

DEAD = 1e-10
"""Directions whose variance is less than this share of the largest do not count."""


def pseudo_whitened(covariance: Tensor, where: str) -> Tensor:
    """A, (D, r), with A Aᵀ = Σ⁺, the pseudo-inverse; left-out directions are said. A ridge, which
    ``mds`` takes, would leave the difference of two huge numbers along them. covariance: (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    alive = values > DEAD * values[-1].clamp_min(0)
    if not alive.all():
        log.info(
            f"{where}: {int((~alive).sum())} of {len(values)} directions hardly vary over the rows "
            "fitted on, and do not count"
        )
    found: Tensor = vectors[:, alive] / values[alive].sqrt()
    return found.contiguous()


@dataclass(frozen=True)
class RMDS(Detector):
    """Squared Mahalanobis distance to the nearest class mean μ_c, with the covariance Σ that all
    classes share, minus that to the mean μ of all rows, with their covariance Σ₀. With β > 0 it is
    that of x = u/‖u‖^β. Classes are the labels, where unknown the predicted ones.

    mean: (C, D), a row for each class that was fitted on; whitening: (D, r), A with A Aᵀ = Σ⁺;
    overall, overall_whitening: the same of all rows, (1, D) and (D, r₀).
    """

    name = "rmds"
    source = "Ren et al. 2021, arXiv 2106.09022"
    about = "mds, minus the Mahalanobis distance to the mean of all classes"
    formula = r"""
        s = \min_c \, (u - \mu_c)^\top \Sigma^+ (u - \mu_c) - (u - \mu)^\top \Sigma_0^+ (u - \mu)
    """
    needs = frozenset({"embedding"})
    fit_also = frozenset({"logits"})
    fitted = True
    better_on_real = True
    heavy = True
    widens = True

    mean: Tensor
    whitening: Tensor
    overall: Tensor
    overall_whitening: Tensor
    normalize: float

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        normalize: Annotated[float, NORMALIZE] = 0.0,
        widen: Annotated[float | None, WIDEN] = None,
    ) -> Self:
        """One pass, two more to widen; a (D, D) and a (K, D) sum are kept. Raises DetectorError for
        a β or a share outside 0 … 1, and when there is no row."""
        require_between(cls.name, 0, 1, normalize=normalize)
        train = widened(train, cls.fit_needs(), cls.name, widen)
        found = scatters(train, cls.fit_needs(), [EMBEDDING], cls.name, normalize=normalize)
        sums = found[EMBEDDING]
        least = len(sums.square) + len(sums.means)
        if sums.count.sum() < least:
            log.info(
                f"{cls.name}: {int(sums.count.sum())} rows fitted on, of which at least {least} "
                "are needed for the covariance of the classes"
            )
        return cls(
            sums.means,
            pseudo_whitened(sums.within, f"{cls.name} within classes"),
            sums.mean,
            pseudo_whitened(sums.covariance, f"{cls.name} over all classes"),
            normalize,
        )

    @cached_property
    def _white(self) -> WhiteMeans:
        return white_means(self.mean, self.whitening)

    def _score(self, test: Features) -> Tensor:
        rows = shortened(recorded(test.embedding).double(), self.normalize)
        overall = mahalanobis(rows, self.overall, self.overall_whitening)
        return mahalanobis(rows, self.mean, self.whitening, self._white) - overall


@dataclass(frozen=True)
class RMDSPlusPlus(RMDS):
    """Squared Mahalanobis distance of x = u/‖u‖^β to the nearest class mean μ_c, with the
    covariance Σ that all classes share, minus that to the mean μ of all rows, with their covariance
    Σ₀. β = 1 makes it the one of the direction alone."""

    name = "rmds++"
    source = "Müller & Hein 2025 (ICML), arXiv 2505.18032"
    about = "rmds, on embeddings of length 1"
    formula = r"""
        s = \min_c \, (x - \mu_c)^\top \Sigma^+ (x - \mu_c) - (x - \mu)^\top \Sigma_0^+ (x - \mu),
        \qquad x = \frac{u}{\lVert u \rVert^\beta}
    """

    widens = False  # it would change nothing: embeddings have length 1

    @classmethod
    def fit(  # type: ignore[override]
        cls, train: Blocks, *, normalize: Annotated[float, NORMALIZE] = 1.0
    ) -> Self:
        return super().fit(train, normalize=normalize)
