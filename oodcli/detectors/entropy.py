"""Entropy of the softmax (Begon & Geurts 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.features import Features, recorded


def entropy(logits: Tensor) -> Tensor:
    """H = −Σ p log p in nats, 0 log 0 = 0 (Begon & Geurts 2021, eq. 8).

    logits: (N, K). Returns (N,) float64 in [0, log K], higher = more OOD.
    """
    log_p = torch.log_softmax(logits.double(), 1)
    return -(log_p.exp() * log_p).sum(1)


@dataclass(frozen=True)
class Entropy(Detector):
    """Entropy of the softmax."""

    name = "entropy"
    source = "Begon & Geurts 2021, eq. 8"
    about = "entropy of the softmax"
    formula = r"s = -\sum_c p_c \log p_c"
    needs = frozenset({"logits"})

    def _score(self, test: Features) -> Tensor:
        return entropy(recorded(test.logits))
