"""Largest logit (Hendrycks et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.features import Features, recorded


@dataclass(frozen=True)
class MLS(Detector):
    """−max z, the largest logit."""

    name = "mls"
    source = "Hendrycks et al. 2022"
    about = "minus the largest logit"
    formula = r"s = -\max_c z_c"
    needs = frozenset({"logits", "logits.level"})
    multi_label = True

    def _score(self, test: Features) -> Tensor:
        return -recorded(test.logits).double().amax(1)
