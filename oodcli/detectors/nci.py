"""NCI (Liu & Qin 2025): how near the embedding is to the predicted class's weights, and how far
from the origin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, by_rows, finite_rows
from oodcli.detectors.class_statistics import column_moments, mean_of_rows
from oodcli.detectors.hyperparameters import require_between
from oodcli.detectors.latent_space import TINY
from oodcli.features import Features, recorded

SHARE = 0.1
"""With ``alpha=scaled``, the spread of the second term as a share of that of the first."""

ALPHA = 1e-4
"""The default of ``alpha``."""


def nearness(u: Tensor, k: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
    """(N, 2) float64: w_k·(u − μ)/‖u − μ‖, 0 where u = μ, and ‖u‖₁ (Liu & Qin 2025). u: (N, D); k:
    (N,); weight: (K, D); mean: μ, (D,)."""

    def some(u: Tensor, k: Tensor) -> Tensor:
        u = u.double()
        v = u - mean
        along = (v * weight[k]).sum(1) / v.norm(dim=1).clamp_min(TINY)
        return torch.stack([along, u.abs().sum(1)], 1)

    return by_rows(some, u, k)


@dataclass(frozen=True)
class NCI(Detector):
    """Minus the length of the predicted class's weights along u − μ, μ the mean of the rows fitted
    on, minus α times the L1 length of u.

    mean: μ, (D,).
    """

    name = "nci"
    source = "Liu & Qin 2025 (CVPR), arXiv 2311.01479"
    about = "minus the predicted class's weights along the centred embedding, minus α times its L1"
    formula = r"""
        s = -\frac{w_k^\top (u - \mu)}{\lVert u - \mu \rVert} - \alpha \lVert u \rVert_1
    """
    needs = frozenset({"logits", "embedding", "head"})
    fitted = True

    mean: Tensor
    alpha: float

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        alpha: Annotated[
            float | Literal["scaled"],
            "α, 0 to 1e9; by default OpenOOD's; scaled: the second term varies a tenth as much "
            "as the first over the rows fitted on",
        ] = ALPHA,
    ) -> Self:
        """One pass, two where α is scaled. Raises DetectorError when there is no row, or for an α
        that is not in 0 … 1e9."""
        if alpha != "scaled":
            require_between(cls.name, 0, 1e9, alpha=alpha)
        rows = finite_rows(train, cls.needs, cls.name)
        mean = mean_of_rows(recorded(block.embedding) for block in rows)
        if alpha == "scaled":
            terms = [_terms(block, mean) for block in finite_rows(train, cls.needs, cls.name)]
            _, spread = column_moments(torch.cat(terms))
            alpha = SHARE * float(spread[0] / spread[1])
        return cls(mean, float(alpha))

    def _score(self, test: Features) -> Tensor:
        return -(_terms(test, self.mean) @ self.mean.new_tensor([1.0, self.alpha]))


def _terms(block: Features, mean: Tensor) -> Tensor:
    k = recorded(block.logits).argmax(1)
    return nearness(recorded(block.embedding), k, recorded(block.head).weight, mean)
