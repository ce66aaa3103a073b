"""Maximum softmax probability at T = 1000 (Begon & Geurts 2021): ODIN without its step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.msp import max_softmax
from oodcli.features import Features, recorded


@dataclass(frozen=True)
class T1000(Detector):
    """1 − max softmax(z/1000): ODIN without the step."""

    name = "t1000"
    source = "Begon & Geurts 2021, eq. 11"
    about = "1 − the largest softmax probability at T = 1000"
    formula = r"s = 1 - \max_c \operatorname{softmax}(z / 1000)_c"
    needs = frozenset({"logits"})

    def _score(self, test: Features) -> Tensor:
        return max_softmax(recorded(test.logits), 1000.0)
