"""Thinkback with each weight's step divided by what it is in distribution."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, by_rows, finite_rows
from oodcli.detectors.hyperparameters import require_positive
from oodcli.detectors.thinkback import residual
from oodcli.features import Features, recorded

EPSILON = 1e-16
"""Thinkback's ε: what keeps a weight that no row moves from being divided by 0."""


def thinkback_norm(
    logits: Tensor, embedding: Tensor, expected: Tensor, temperature: float = 1.0
) -> Tensor:
    """Σ_ij e_i² u_j² / (ε + E_ij) (Thinkback, eq. 6), E the mean of δw² in distribution.

    logits: (N, K), embedding: (N, D), expected: (K, D). Returns (N,) float64, higher = more OOD.
    """
    weights = (EPSILON + expected).reciprocal()
    return by_rows(
        lambda e, u: ((e.square() @ weights) * u.double().square()).sum(1),
        residual(logits, temperature),
        embedding,
    )


def expected_square(blocks: Iterable[tuple[Tensor, Tensor]], temperature: float = 1.0) -> Tensor:
    """E_ij, the mean of e_i² u_j² over all rows of blocks of logits (N, K) and embeddings (N, D).
    Returns (K, D) float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for logits, embedding in blocks:
        total = total + residual(logits, temperature).square().T @ embedding.double().square()
        count += len(logits)
    return total / count


@dataclass(frozen=True)
class ThinkbackNorm(Detector):
    """``thinkback``, the square of each weight's gradient divided by its mean E over the rows
    fitted on.

    expected: (K, D), E."""

    name = "thinkback-norm"
    source = "Thinkback, eq. 6 and 7"
    about = "thinkback, each weight scaled by its mean square on ID rows"
    formula = r"""
        s = \sum_{i,j} \frac{e_i^2 u_j^2}{10^{-16} + E_{ij}},
        \qquad e = \frac{\operatorname{softmax}(z / T) - 1_k}{T}
    """
    needs = frozenset({"logits", "embedding", "head"})
    fitted = True

    expected: Tensor
    T: float

    @classmethod
    def fit(cls, train: Blocks, *, T: Annotated[float, "temperature, above 0"] = 1.0) -> Self:  # noqa: N803
        """One pass; labels are the predicted ones. Raises DetectorError without a row."""
        require_positive(cls.name, T=T)
        rows = finite_rows(train, cls.needs, cls.name)
        expected = expected_square(((recorded(b.logits), recorded(b.embedding)) for b in rows), T)
        return cls(expected=expected, T=T)

    def _score(self, test: Features) -> Tensor:
        return thinkback_norm(
            recorded(test.logits), recorded(test.embedding), self.expected, self.T
        )
