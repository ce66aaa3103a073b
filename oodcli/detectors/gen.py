"""Generalised entropy of the softmax (Liu et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.hyperparameters import require_positive
from oodcli.detectors.msp import probabilities, sum_of_others
from oodcli.features import Features


def class_variances(test: Features) -> Tensor:
    """p(1 − p) of each class, (N, K) float64. ``doctor`` shares it. 1 − p of the most probable
    class is the sum of the others: the difference itself is 0 for a confident row."""
    p = test.shared(probabilities)
    variances = p * (1 - p)
    first = p.argmax(1, keepdim=True)
    rest = sum_of_others(p)[:, None]
    return variances.scatter_(1, first, p.gather(1, first) * rest)


def generalised_entropy(variances: Tensor, gamma: float, m: int) -> Tensor:
    """Σ (p(1 − p))^γ over the m most probable classes (Liu et al. 2023, §3.1).

    variances: (N, K) p(1 − p), whose order is that of p. Returns (N,), higher = more OOD.
    """
    if m < variances.shape[1]:
        variances = variances.topk(m, dim=1, sorted=False).values
    return variances.pow(gamma).sum(1)


@dataclass(frozen=True)
class GEN(Detector):
    """Sum of (p(1 − p))^γ over the M most probable classes. A small γ makes small differences from
    certainty count."""

    name = "gen"
    source = "Liu et al., CVPR 2023"
    about = "generalised entropy of the softmax, Σ (p(1 − p))^γ over the largest p"
    formula = r"s = \sum_{i=1}^{M} p_{(i)}^\gamma \bigl(1 - p_{(i)}\bigr)^\gamma"
    needs = frozenset({"logits"})

    gamma: Annotated[float, "exponent, above 0; default of the paper"] = 0.1
    M: Annotated[int, "how many of the largest probabilities, at most K; as in the paper"] = 100

    def __post_init__(self) -> None:
        require_positive(self.name, gamma=self.gamma, M=self.M)

    def _score(self, test: Features) -> Tensor:
        return generalised_entropy(test.shared(class_variances), self.gamma, self.M)
