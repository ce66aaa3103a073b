"""DOCTOR: the odds that a label drawn from the softmax is not the one drawn again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.gen import class_variances
from oodcli.features import Features


def doctor(variances: Tensor) -> Tensor:
    """(1 − g)/g, g = Σ p² (Granese et al. 2021, D_α).

    variances: (N, K) p(1 − p), whose sum is 1 − g. Returns (N,) in [0, K − 1], higher = more OOD.
    """
    unequal = variances.sum(1)
    return unequal / (1 - unequal)


@dataclass(frozen=True)
class Doctor(Detector):
    """Odds that two labels drawn from the softmax differ: 1 − g over g, where g = Σ p²."""

    name = "doctor"
    source = "Granese et al., NeurIPS 2021"
    about = "odds that two labels drawn from the softmax differ, (1 − Σ p²)/Σ p²"
    formula = r"s = \frac{1 - g}{g}, \qquad g = \sum_c p_c^2"
    needs = frozenset({"logits"})

    def _score(self, test: Features) -> Tensor:
        return doctor(test.shared(class_variances))
