"""JointEnergy of networks with several labels an image (Wang et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.features import Features, recorded


def joint_energy(logits: Tensor) -> Tensor:
    """−Σₖ log(1 + exp(zₖ)), each label's free energy (Wang et al. 2021). logits: (N, K) of
    sigmoids. Returns (N,) float64, higher = more OOD."""
    return -F.softplus(logits.double(), threshold=700).sum(1)


@dataclass(frozen=True)
class JointEnergy(Detector):
    """Sum of the labels' free energies."""

    name = "joint-energy"
    source = "Wang et al. 2021"
    about = "free energy summed over the labels, −Σ log(1 + exp(z)), of a multi-label network"
    formula = r"s = -\sum_k \log(1 + e^{z_k})"
    needs = frozenset({"logits", "logits.level", "multi-label"})
    multi_label = True

    def _score(self, test: Features) -> Tensor:
        return joint_energy(recorded(test.logits))
