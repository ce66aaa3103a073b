"""Maximum softmax probability (Hendrycks & Gimpel 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.features import Features, recorded


def softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(z/T). logits: (N, K). Returns (N, K) float64; torch.softmax takes twice as long over
    so few columns."""
    z = logits.double() / temperature
    return torch.exp(z - torch.logsumexp(z, 1, keepdim=True))


def sum_of_others(p: Tensor) -> Tensor:
    """1 − max p, as the sum of the other probabilities: in float32 the difference itself is exactly
    0 for a third of the in-distribution images (001 eq. 7 and 11).

    p: (N, K), rows sum to 1. Returns (N,) in [0, 1 − 1/K], higher = more OOD.
    """
    return p.scatter(1, p.argmax(1, keepdim=True), 0).sum(1)


def max_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """1 − max softmax(z/T). logits: (N, K). Returns (N,) float64, higher = more OOD."""
    return sum_of_others(softmax(logits, temperature))


def probabilities(test: Features) -> Tensor:
    """(N, K) float64: the softmax of the logits. Several detectors share it."""
    return softmax(recorded(test.logits))


@dataclass(frozen=True)
class MSP(Detector):
    """1 − the largest softmax probability."""

    name = "msp"
    source = "Hendrycks & Gimpel 2017"
    about = "1 − the largest softmax probability"
    formula = r"s = 1 - \max_c p_c = \sum_{c \neq k} p_c"
    needs = frozenset({"logits"})

    def _score(self, test: Features) -> Tensor:
        return sum_of_others(test.shared(probabilities))
