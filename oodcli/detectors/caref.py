"""CARef (Ling et al. 2025): the distance from the class's mean, relative to the embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, by_rows, finite_rows
from oodcli.detectors.class_statistics import class_means, predicted_class
from oodcli.features import Features, recorded

FLOOR = torch.finfo(torch.float32).tiny
"""A length of 0 is divided by as the smallest float32, so that the score is finite."""


def relative_errors(u: Tensor, k: Tensor, mean: Tensor, weight: Tensor) -> Tensor:
    """(N, 3) float64: the sums of |u − μ_k| over all components, over those where it has the sign
    of w_k, and over those where it has the other one, by ‖u‖₁ (Ling et al. 2025, as in their code).
    u: (N, D); k: (N,); mean, weight: (K, D)."""
    sign = weight.sign()

    def some(u: Tensor, k: Tensor) -> Tensor:
        u = u.double()
        d = u - mean[k]
        towards = d * sign[k]
        found = [d.abs(), towards.clamp_min(0), (-towards).clamp_min(0)]
        length = u.abs().sum(1).clamp_min(FLOOR)
        return torch.stack([each.sum(1) / length for each in found], 1)

    return by_rows(some, u, k)


def predicted_means(train: Blocks, needs: frozenset[str], who: str) -> Tensor:
    """(K, D) float64: the mean embedding of the rows that are predicted as each class; the mean of
    all rows for a class that none is predicted as. One pass."""
    rows = finite_rows(train, needs, who)
    count, mean = class_means(rows, lambda block: recorded(block.embedding), predicted_class)
    overall = (mean * count[:, None]).sum(0) / count.sum()
    return torch.where(count[:, None] > 0, mean, overall)


@dataclass(frozen=True)
class CARef(Detector):
    """L1 distance of u from μ_k, the mean of the rows that are predicted as the same class k, by
    the L1 length of u. A class that no row is predicted as has the mean of all.

    mean: (K, D).
    """

    name = "caref"
    source = "Ling et al. 2025 (CVPR), arXiv 2503.00325"
    about = "relative L1 distance of the embedding from the predicted class's mean"
    formula = r"s = \frac{\lVert u - \mu_k \rVert_1}{\lVert u \rVert_1}"
    needs = frozenset({"logits", "embedding"})
    fitted = True

    mean: Tensor

    @classmethod
    def fit(cls, train: Blocks) -> Self:
        """One pass; a (K, D) sum is kept. Raises DetectorError when there is no row."""
        return cls(predicted_means(train, cls.needs, cls.name))

    def _score(self, test: Features) -> Tensor:
        k = predicted_class(test)
        return relative_errors(recorded(test.embedding), k, self.mean, self.mean)[:, 0]
