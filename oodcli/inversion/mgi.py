"""Measuring Gradient-based Importance (C2IR, section 3.3) along the trajectory of an inversion."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from oodcli.features import Features, recorded
from oodcli.float64 import in_float64

SMALLEST_STEP = 0.01
"""Steps with |Δy| below this are skipped: 1/Δy would drown all others."""


@dataclass
class Sensitivity:
    """Average over t of (spatial mean of ∂y_c/∂A_l)/(y_t − y_{t−1}), per image and channel.

    Eq. 8 is linear in the gradients, so this average is all that has to be kept; β is applied when
    a detector is fitted. Feed it the Features of x̂_0, x̂_1, … in turn; every recorded point is one
    t. All of them are at the network's input size, those of the steps at half of it enlarged:
    otherwise y_t − y_{t−1} would hold the change of size, too, and the spatial mean would be over
    fewer positions. y_c is the logit of the target class.
    """

    label: Tensor  # (N,)
    _previous: Tensor | None = None
    _kept: Tensor | None = None
    _sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, point: Features) -> None:
        """point: with logits and layers.gradient."""
        score = in_float64(recorded(point.logits).gather(1, self.label[:, None])[:, 0])
        if self._previous is not None:
            step = score - self._previous
            counts = step.abs() >= SMALLEST_STEP
            scale = torch.where(counts, 1 / torch.where(counts, step, 1.0), 0.0)
            self._kept = counts.double() if self._kept is None else self._kept + counts
            for name, layer in point.layers.items():
                term = in_float64(recorded(layer.gradient)) * scale[:, None]
                self._sums[name] = term if name not in self._sums else self._sums[name] + term
        self._previous = score

    def average(self) -> dict[str, Tensor]:
        """Name of layer → (N, C) float32; zero for an image that never took a step of 0.01."""
        if self._kept is None:
            return {}
        kept = self._kept.clamp(min=1)[:, None]
        return {name: (total / kept).float().cpu() for name, total in self._sums.items()}
