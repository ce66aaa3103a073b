"""Feature norm (Yu et al. 2023): how long the channels of one map are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.layer_choice import last_map
from oodcli.errors import DetectorError
from oodcli.features import LAST_MAP, Features, Layer, recorded


def mean_length(mean: Tensor, std: Tensor) -> Tensor:
    """Mean over channels of √(m² + σ²), the root mean square over positions: √HW times less than
    the paper's length. mean, std: (N, C). Returns (N,) float64."""
    return torch.hypot(mean.double(), std.double()).mean(1)


@dataclass(frozen=True)
class FeatureNorm(Detector):
    """Minus the mean over channels of √(m² + σ²) of the last map: m and σ are the mean and the
    standard deviation of a channel over the positions. The factor √HW of the paper is left out."""

    name = "feature-norm"
    source = "Yu et al., CVPR 2023"
    about = "minus the mean length of the channels of one map, by default the last one"
    formula = r"s = -\operatorname{mean}_k \sqrt{\operatorname{mean}_{h,w} A_{k,h,w}^2}"
    needs = frozenset({"layers.mean", "layers.std", "layers.peak"})

    layer: Annotated[
        str, "name of a recorded layer, after its ReLU; last, as in the paper: the last map"
    ] = LAST_MAP

    @property
    def layers_read(self) -> frozenset[str] | None:
        return frozenset({self.layer})

    def _score(self, test: Features) -> Tensor:
        layer = self._layer(test)
        return -mean_length(recorded(layer.mean), recorded(layer.std))

    def _layer(self, test: Features) -> Layer:
        if self.layer == LAST_MAP:
            return last_map(test, self.name)
        found = test.layers.get(self.layer)
        if found is None:
            raise DetectorError(
                f"{self.name}: no layer '{self.layer}' was recorded: there are "
                f"{', '.join(test.layers)}"
            )
        return found
