"""CoP (Fang et al. 2024): what kernel PCA with a cosine kernel cannot reconstruct."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Self

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks
from oodcli.detectors.hyperparameters import require_fraction
from oodcli.detectors.knn import unit
from oodcli.detectors.peak_energy import positive_energy
from oodcli.detectors.principal import leading_directions, mean_and_covariance
from oodcli.features import Features, recorded

SHARE = "share of the variance in the principal space, 0 to 1; by default 0.9, not tuned"
FUSED = "multiply 1 − s by the energy; by default not, as in the paper's first form"
"""Meanings of settings."""


def reconstruction_error(rows: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """(N,) ‖(I − VVᵀ)(φ − φ̄)‖ (Fang et al. 2024). rows: φ, (N, M) float64; mean: φ̄, (M,);
    basis: V, (M, q), orthonormal."""
    centred = rows - mean
    error: Tensor = (centred - (centred @ basis) @ basis.T).norm(dim=1)
    return error


@dataclass(frozen=True)
class CoP(Detector):
    """Distance of φ = u/‖u‖ from the principal space V of the rows fitted on, about their mean.
    ``fused``: (s − 1) log(1 + Σ exp z) in its place, the energy times what is reconstructed.

    mean: (M,); basis: V, (M, q).
    """

    name = "cop"
    source = "Fang et al. 2024 (NeurIPS), arXiv 2402.02949"
    about = "reconstruction error of the normalised embedding in its principal subspace"
    formula = r"""
        s = \lVert (I - V V^\top) (\varphi - \bar\varphi) \rVert, \qquad
        \varphi = \frac{u}{\lVert u \rVert}
    """
    needs = frozenset({"embedding"})
    fitted = True
    better_on_real = True
    heavy = True

    mean: Tensor
    basis: Tensor
    fused: bool

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        share: Annotated[float, SHARE] = 0.9,
        fused: Annotated[bool, FUSED] = False,
    ) -> Self:
        """One pass; one (D, D) sum is kept. Raises DetectorError for a share outside 0 … 1, and
        when there is no row."""
        return cls(*cls._principal(train, share, unit), fused)

    @classmethod
    def _principal(
        cls, train: Blocks, share: float, change: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        require_fraction(cls.name, share=share)
        mean, covariance = mean_and_covariance(
            train, cls.needs, cls.name, lambda block: change(recorded(block.embedding))
        )
        return mean, leading_directions(covariance, share)

    @property
    def score_needs(self) -> frozenset[str]:
        return self.needs | ({"logits", "logits.level"} if self.fused else set())

    def _mapped(self, embedding: Tensor) -> Tensor:
        return unit(embedding)

    def _score(self, test: Features) -> Tensor:
        error = reconstruction_error(self._mapped(recorded(test.embedding)), self.mean, self.basis)
        return (error - 1) * positive_energy(recorded(test.logits)) if self.fused else error
