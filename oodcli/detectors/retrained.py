"""Scores of networks that were trained to tell what is out of distribution."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.features import Features, recorded


def generalized_odin(h: Tensor) -> Tensor:
    """−maxᵢ hᵢ, of logits fᵢ = hᵢ/g (Hsu et al. 2020, S_DeConf). h: (N, K). Returns (N,) float64,
    higher = more OOD."""
    return -h.double().amax(1)


def minimum_others(others: Tensor) -> Tensor:
    """min_g p(others | group g) (Huang & Li 2021, −S_MOS): in its own group an image is none of the
    others. others: (N, G) log-probabilities. Returns (N,) float64, higher = more OOD."""
    return others.double().amin(1).exp()


@dataclass(frozen=True)
class GeneralizedODIN(Detector):
    """−max h of a DeConf head, without the paper's step on the input: its length is chosen on
    images of the training distribution, which are gone."""

    name = "godin"
    source = "Hsu et al. 2020"
    about = "Generalized ODIN: largest h of a network trained with logits h/g (DeConf)"
    needs = frozenset({"deconf.h"})

    def _score(self, test: Features) -> Tensor:
        return generalized_odin(recorded(test.deconf_h))


@dataclass(frozen=True)
class MOS(Detector):
    """Smallest probability of "others" over the groups of a network trained with them."""

    name = "mos"
    source = "Huang & Li 2021"
    about = "smallest probability of 'others' in a network trained with groups of classes"
    needs = frozenset({"mos.others"})

    def _score(self, test: Features) -> Tensor:
        return minimum_others(recorded(test.mos_others))
