"""Energy score (Liu et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.hyperparameters import require_positive
from oodcli.features import Features, LinearHead, recorded


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Free energy −T·logsumexp(z/T) (Liu et al. 2020, eq. 4). logits: (N, K). Returns (N,) float64,
    higher = more OOD."""
    return -temperature * torch.logsumexp(logits.double() / temperature, 1)


def head_energy(embedding: Tensor, head: LinearHead) -> Tensor:
    """Free energy of the logits that the head gives to an embedding. embedding: (N, D). Returns
    (N,) float64, higher = more OOD."""
    return energy(embedding.double() @ head.double.weight.T + head.double.bias)


@dataclass(frozen=True)
class Energy(Detector):
    """Free energy of the logits at temperature T > 0."""

    name = "energy"
    source = "Liu et al. 2020"
    about = "free energy of the logits, −T logsumexp(z/T)"
    formula = r"s = -T \log \sum_c e^{z_c / T}"
    needs = frozenset({"logits", "logits.level"})

    T: Annotated[float, "temperature, above 0"] = 1.0

    def __post_init__(self) -> None:
        require_positive(self.name, T=self.T)

    def _score(self, test: Features) -> Tensor:
        return energy(recorded(test.logits), self.T)
