"""Generalized ODIN (Hsu et al. 2020): networks trained with a DeConf head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.features import Features, recorded


def generalized_odin(h: Tensor) -> Tensor:
    """−maxᵢ hᵢ, of logits fᵢ = hᵢ/g (Hsu et al. 2020, S_DeConf). h: (N, K). Returns (N,) float64,
    higher = more OOD."""
    return -h.double().amax(1)


@dataclass(frozen=True)
class GeneralizedODIN(Detector):
    """−max h of a DeConf head, without the paper's step on the input: its length is chosen on
    images of the training distribution, which are gone."""

    name = "godin"
    source = "Hsu et al. 2020"
    about = "Generalized ODIN: largest h of a network trained with logits h/g (DeConf)"
    formula = r"s = -\max_c h_c"
    needs = frozenset({"deconf.h"})

    def _score(self, test: Features) -> Tensor:
        return generalized_odin(recorded(test.deconf_h))
