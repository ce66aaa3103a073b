"""Reactivate GradNorm ("RG"): free energy times the clipped length of the embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import by_rows
from oodcli.detectors.energy import energy
from oodcli.detectors.hyperparameters import require_positive
from oodcli.features import Features, recorded


def clipped_length(embedding: Tensor, k: float = 1.0) -> Tensor:
    """V = Σ min(u, k) (RG, §3.2). embedding: (N, D). Returns (N,) float64."""
    return by_rows(lambda u: u.double().clamp_max(k).sum(1), embedding)


def rg(logits: Tensor, embedding: Tensor, temperature: float = 1.0, k: float = 1.0) -> Tensor:
    """−T logsumexp(z/T) · Σ min(u, k) (RG, eq. 8).

    logits: (N, K), embedding: (N, D). Returns (N,) float64, higher = more OOD.
    """
    return energy(logits, temperature) * clipped_length(embedding, k)


@dataclass(frozen=True)
class RG(Detector):
    """Free energy at temperature T > 0 times the sum of the embedding clipped at k > 0."""

    name = "rg"
    source = "RG, eq. 8"
    about = "free energy times the clipped norm of the embedding"
    formula = r"s = -T \log \sum_c e^{z_c / T} \cdot \sum_j \min(u_j, k)"
    needs = frozenset({"logits", "embedding", "head"})

    T: Annotated[float, "temperature, above 0"] = 1.0
    k: Annotated[float, "upper bound of each component of the embedding, above 0"] = 1.0

    def __post_init__(self) -> None:
        require_positive(self.name, T=self.T, k=self.k)

    def _score(self, test: Features) -> Tensor:
        return rg(recorded(test.logits), recorded(test.embedding), self.T, self.k)
