"""What the logits alone say: entropy, softmax at T = 1000, largest logit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.msp import max_softmax
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
    needs = frozenset({"logits"})

    def _score(self, test: Features) -> Tensor:
        return entropy(recorded(test.logits))


@dataclass(frozen=True)
class T1000(Detector):
    """1 − max softmax(z/1000): ODIN without the step."""

    name = "t1000"
    source = "Begon & Geurts 2021, eq. 11"
    about = "1 − the largest softmax probability at T = 1000"
    needs = frozenset({"logits"})

    def _score(self, test: Features) -> Tensor:
        return max_softmax(recorded(test.logits), 1000.0)


@dataclass(frozen=True)
class MLS(Detector):
    """−max z."""

    name = "mls"
    source = "Hendrycks et al. 2022"
    about = "minus the largest logit"
    needs = frozenset({"logits", "logits.level"})

    def _score(self, test: Features) -> Tensor:
        return -recorded(test.logits).double().amax(1)
