"""Fused PCA (Guan et al. 2023): the energy of the clipped embedding, times the part of the
embedding that its principal subspace reconstructs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks
from oodcli.detectors.caref import FLOOR
from oodcli.detectors.cop import reconstruction_error
from oodcli.detectors.hyperparameters import require_fraction
from oodcli.detectors.peak_energy import positive_energy
from oodcli.detectors.principal import leading_directions, mean_and_covariance
from oodcli.detectors.react import PERCENTILE, C, upper_bound
from oodcli.features import Features, recorded


@dataclass(frozen=True)
class PCAFused(Detector):
    """Free energy of the head on min(u, c), beside a logit that is 0, times the share that is
    reconstructed: 1 minus the distance of u from the principal space V of the rows fitted on, about
    their mean μ, by the length of min(u, c).

    c is the ``percentile`` of all entries of the embeddings fitted on, or what is given. The
    paper's energy has no logit that is 0; without it the product changes its order where the energy
    is negative. mean: μ, (D,); basis: V, (D, q).
    """

    name = "pca-fused"
    source = "Guan et al. 2023 (ICCV), with ReAct"
    about = "free energy on the clipped embedding times the share that its principal subspace holds"
    formula = r"""
        s = -\log\Bigl(1 + \sum_c e^{z'_c}\Bigr)
        \left(1 - \frac{\lVert (I - V V^\top) (u - \mu) \rVert}
        {\lVert \min(u, c) \rVert}\right), \qquad z' = W \min(u, c) + b
    """
    needs = frozenset({"embedding", "head"})
    fitted = True
    better_on_real = True
    heavy = True

    c: float
    mean: Tensor
    basis: Tensor

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        share: Annotated[
            float,
            "share of the variance in the principal space, 0 to 1; by default cop's, not tuned "
            "(the paper: 256 of ResNet-50's 2,048 directions)",
        ] = 0.9,
        c: Annotated[float | None, C] = None,
        percentile: Annotated[float, PERCENTILE] = 90.0,
    ) -> Self:
        """Three passes, one where c is given; one (D, D) sum is kept. Raises DetectorError for a
        share outside 0 … 1, a percentile outside 0 … 100, a c that is not positive, and when there
        is no row."""
        require_fraction(cls.name, share=share)
        c = upper_bound(train, cls.needs, cls.name, c, percentile)
        mean, covariance = mean_and_covariance(
            train, cls.needs, cls.name, lambda block: recorded(block.embedding).double()
        )
        return cls(c, mean, leading_directions(covariance, share))

    def _score(self, test: Features) -> Tensor:
        u, head = recorded(test.embedding).double(), recorded(test.head)
        clipped = u.clamp_max(self.c)
        error = reconstruction_error(u, self.mean, self.basis)
        logits = clipped @ head.double.weight.T + head.double.bias
        score: Tensor = -positive_energy(logits) * (
            1 - error / clipped.norm(dim=1).clamp_min(FLOOR)
        )
        return score
