"""CADRef (Ling et al. 2025): CARef, decoupled by whether a component speaks for the class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.caref import FLOOR, predicted_means, relative_errors
from oodcli.detectors.class_statistics import predicted_class
from oodcli.detectors.msp import softmax
from oodcli.detectors.peak_energy import positive_energy
from oodcli.features import Features, recorded

Confidence = Literal["energy", "logit", "msp"]


def confidence(logits: Tensor, by: str) -> Tensor:
    """(N,) float64, at least the smallest float32. energy: log(1 + Σ exp z), which is positive
    where logsumexp z is not; logit: log(1 + exp max z); msp: max softmax. logits: (N, K)."""
    if by == "msp":
        found = softmax(logits).amax(1)
    else:
        found = positive_energy(logits if by == "energy" else logits.amax(1, keepdim=True))
    return found.clamp_min(FLOOR)


@dataclass(frozen=True)
class CADRef(Detector):
    """The distance of ``caref`` in two parts: E₊, where u − μ_k has the sign of w_k, by the
    confidence L of the logits, and E₋, where it has the other sign, by L̄, the mean of L over the
    rows fitted on. L = log(1 + Σ exp z), which is logsumexp z where that is large.

    mean: (K, D). average: L̄, ().
    """

    name = "cadref"
    source = "Ling et al. 2025 (CVPR), arXiv 2503.00325, as in their code"
    about = "caref in two parts, by the sign of the predicted class's weights, and the energy"
    formula = r"""
        s = \frac{E_+}{L} + \frac{E_-}{\bar L}, \qquad
        E_\pm = \frac{1}{\lVert u \rVert_1} \sum_j
        \max\bigl(0, \pm \operatorname{sign}(w_{k,j}) (u_j - \mu_{k,j})\bigr)
    """
    needs = frozenset({"logits", "embedding", "head"})
    fitted = True

    mean: Tensor
    average: Tensor
    by: Confidence

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        by: Annotated[
            Confidence, "L; by default the paper's: energy, or the largest logit, or probability"
        ] = "energy",
    ) -> Self:
        """Two passes; a (K, D) sum is kept. Raises DetectorError when there is no row."""
        mean = predicted_means(train, cls.needs, cls.name)
        total = rows = 0.0
        for block in finite_rows(train, cls.needs, cls.name):
            total += float(confidence(recorded(block.logits), by).sum())
            rows += len(block)
        return cls(mean, torch.tensor(total / rows, dtype=torch.float64), by)

    def _score(self, test: Features) -> Tensor:
        weight = recorded(test.head).weight
        k = predicted_class(test)
        errors = relative_errors(recorded(test.embedding), k, self.mean, weight)
        return (
            errors[:, 1] / confidence(recorded(test.logits), self.by) + errors[:, 2] / self.average
        )
