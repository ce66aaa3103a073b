"""The highest activations of the last map: an object is seen at few positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.layer_choice import last_map
from oodcli.features import Features, recorded


@dataclass(frozen=True)
class Peak(Detector):
    """−‖p‖, p_k the largest value of channel k over the positions of the last map before the
    pooling, 0 where none is positive."""

    name = "peak"
    source = "this project"
    about = "minus the norm of the last feature map's peak activations"
    formula = r"s = -\lVert p \rVert, \qquad p_k = \max\bigl(0, \max_{h,w} A_{k,h,w}\bigr)"
    needs = frozenset({"layers.peak"})
    explains = True

    def contributions(self, test: Features) -> tuple[Sequence[str], Tensor]:
        """One term, the score itself: (N, 1)."""
        return ["the last map of features is low everywhere"], self._score(test)[:, None]

    def _score(self, test: Features) -> Tensor:
        return -squared_length(test, self.name).sqrt()


def squared_length(test: Features, who: str) -> Tensor:
    """‖p‖², (N,) float64. Raises DetectorError where not one layer alone has peaks."""
    return recorded(last_map(test, who).peak).double().square().sum(1)
