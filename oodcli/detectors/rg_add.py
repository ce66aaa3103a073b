"""RG as a sum: free energy plus the clipped length of the embedding, balanced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.class_statistics import column_moments
from oodcli.detectors.energy import energy
from oodcli.detectors.hyperparameters import require_positive
from oodcli.detectors.rg import clipped_length
from oodcli.features import Features, recorded


def rg_add(logits: Tensor, embedding: Tensor, alpha: float, k: float = 1.0) -> Tensor:
    """−(logsumexp z + α Σ min(u, k)) (RG, eq. 12).

    logits: (N, K), embedding: (N, D). Returns (N,) float64, higher = more OOD.
    """
    return energy(logits) - alpha * clipped_length(embedding, k)


@dataclass(frozen=True)
class RGAdd(Detector):
    """Free energy minus α times the sum of the embedding clipped at k > 0.

    α = ``ratio`` · α_s, where α_s makes the two terms vary alike: std(logsumexp z)/std(Σ min(u, k))
    over the first ``rows`` rows fitted on. The paper draws 1,000 at random (§4.2). Where rows are
    sorted by class the first ones are of few classes, whose spread differs: more ``rows`` make it
    that of all.
    """

    name = "rg-add"
    source = "RG, eq. 12"
    about = "free energy plus the clipped norm of the embedding, scaled to equal spread"
    formula = r"""
        s = -\Bigl(\log \sum_c e^{z_c} + \alpha \sum_j \min(u_j, k)\Bigr)

        \alpha = \text{ratio} \cdot
        \frac{\operatorname{std}\bigl(\log \sum_c e^{z_c}\bigr)}
        {\operatorname{std}\bigl(\sum_j \min(u_j, k)\bigr)}
    """
    needs = frozenset({"logits", "embedding", "head"})
    fitted = True

    alpha: float
    k: float

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        ratio: Annotated[float, "share of the α at which both terms vary alike"] = 0.6,
        k: Annotated[float, "upper bound of each component of the embedding, above 0"] = 1.0,
        rows: Annotated[int, "α comes from this many rows, the first ones"] = 1000,
    ) -> Self:
        """Less than one pass; two numbers a row are kept. A term that is the same for all rows has
        a spread of 1. Raises DetectorError when there is no row."""
        require_positive(cls.name, ratio=ratio, k=k, rows=rows)
        terms = torch.zeros((0, 2), dtype=torch.float64)
        for block in finite_rows(train, cls.needs, cls.name):
            u = energy(recorded(block.logits))
            v = clipped_length(recorded(block.embedding), k)
            terms = torch.cat([terms, torch.stack([u, v], 1).cpu()])
            if len(terms) >= rows:
                break
        _, spread = column_moments(terms[:rows])
        return cls(alpha=ratio * float(spread[0] / spread[1]), k=k)

    def _score(self, test: Features) -> Tensor:
        return rg_add(recorded(test.logits), recorded(test.embedding), self.alpha, self.k)
