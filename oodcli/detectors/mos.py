"""MOS (Huang & Li 2021): networks trained with groups of classes, each with its "others"."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.features import Features, recorded


def minimum_others(others: Tensor) -> Tensor:
    """min_g p(others | group g) (Huang & Li 2021, −S_MOS): in its own group an image is none of the
    others. others: (N, G) log-probabilities. Returns (N,) float64, higher = more OOD."""
    return others.double().amin(1).exp()


@dataclass(frozen=True)
class MOS(Detector):
    """Smallest probability of "others" over the groups of a network trained with them. Each softmax
    is over the classes of one group and its "others"."""

    name = "mos"
    source = "Huang & Li 2021"
    about = "smallest probability of 'others' in a network trained with groups of classes"
    formula = r"s = \min_g \; p(\text{others} \mid \text{group } g)"
    needs = frozenset({"mos.others"})

    def _score(self, test: Features) -> Tensor:
        return minimum_others(recorded(test.mos_others))
