"""The highest activations of the last map times the free energy of the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.energy import energy
from oodcli.detectors.peak import Peak, squared_length
from oodcli.features import Features, recorded


@dataclass(frozen=True)
class PeakEnergy(Detector):
    """−‖p‖² · log(1 + Σ exp(z_k)): ``peak``, and the energy of the logits beside one that is 0,
    so that it is never negative. A product, because it needs no scale for either."""

    name = "peak-energy"
    source = "this project, with Liu et al. 2020"
    about = "minus the squared norm of the last feature map's peaks, times the free energy"
    formula = r"""
        s = -\lVert p \rVert^2 \log\Bigl(1 + \sum_c e^{z_c}\Bigr),
        \qquad p_k = \max\bigl(0, \max_{h,w} A_{k,h,w}\bigr)
    """
    needs = Peak.needs | {"logits", "logits.level"}

    def _score(self, test: Features) -> Tensor:
        return -squared_length(test, self.name) * positive_energy(recorded(test.logits))


def positive_energy(logits: Tensor) -> Tensor:
    """log(1 + Σ exp(z_k)): minus the free energy (Liu et al. 2020, eq. 4), with a further logit
    that is 0. logits: (N, K). Returns (N,) float64, never negative."""
    without = -energy(logits)
    return torch.logaddexp(without, torch.zeros_like(without))
