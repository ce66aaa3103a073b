"""Largest softmax probability at a temperature fitted to labelled rows (Guo et al. 2017)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.msp import max_softmax, softmax
from oodcli.detectors.widened import WIDEN, widened
from oodcli.errors import DetectorError
from oodcli.features import Features, recorded

log = logging.getLogger(__name__)

LARGEST = 50.0
"""T is in 1/LARGEST … LARGEST."""

STEPS = 100
"""Of Newton's method at most; it needs about eight."""


def slope_and_curvature(logits: Tensor, label: Tensor, beta: float) -> Tensor:
    """First and second derivative of Σ NLL by β = 1/T: Σ (E_p[z] − z_y) and Σ Var_p[z], where
    p = softmax(βz). logits: (N, K), label: (N,). Returns (2,) float64."""
    z = logits.double()
    z = z - z.gather(1, label[:, None])  # relative to the label's, for which the slope is 0
    p = softmax(z, 1 / beta)
    mean = (p * z).sum(1, keepdim=True)
    return torch.stack([mean.sum(), (p * (z - mean).square()).sum()])


@dataclass(frozen=True)
class TemperatureScaling(Detector):
    """1 − the largest softmax probability at the T that minimises the negative log likelihood of
    the labels, in 1/50 … 50. Fit it on labelled rows that the network was not trained on."""

    name = "temp-scaling"
    source = "Guo et al., ICML 2017"
    about = "1 − the largest softmax probability at a temperature fitted to labelled rows"
    formula = r"""
        s = 1 - \max_c \operatorname{softmax}(z / T)_c, \qquad
        T = \operatorname{argmin}_T \; -\sum_i \log \operatorname{softmax}(z_i / T)_{y_i}
    """
    needs = frozenset({"logits"})
    fit_also = frozenset({"label"})
    fitted = True
    better_on_real = True
    widens = True

    T: float

    @classmethod
    def fit(cls, train: Blocks, *, widen: Annotated[float | None, WIDEN] = None) -> Self:
        """About ten passes; nothing is kept of a row but, to widen, a number. Rows without a label
        are left out. Raises DetectorError when no row has one, and for a share outside 0 … 1."""
        train = widened(train, cls.fit_needs(), cls.name, widen)
        low, high = 1 / LARGEST, LARGEST
        if _derivatives(train, low)[0] >= 0:
            beta = low
        elif _derivatives(train, high)[0] <= 0:
            beta = high
        else:
            beta = _root(train, low, high)
        if beta in (low, high):
            log.warning(
                f"{cls.name}: T = {1 / beta:.3g}, the end of its range, because the labels do not "
                "limit it: fit it on labelled images that the network was not trained on"
            )
        return cls(1 / beta)

    def _score(self, test: Features) -> Tensor:
        return max_softmax(recorded(test.logits), self.T)


def _root(train: Blocks, low: float, high: float) -> float:
    """Where the slope of the likelihood, which rises with β, is 0, between its signs."""
    beta = 1.0
    for _ in range(STEPS):
        slope, curvature = _derivatives(train, beta)
        low, high = (low, beta) if slope > 0 else (beta, high)
        step = beta - slope / curvature if curvature > 0 else math.inf
        new = step if low < step < high else math.sqrt(low * high)
        if slope == 0 or abs(new - beta) <= 1e-10 * beta:
            break
        beta = new
    return beta


def _derivatives(train: Blocks, beta: float) -> tuple[float, float]:
    total = torch.zeros(2, dtype=torch.float64)
    count = 0
    who = TemperatureScaling.name
    for block in finite_rows(train, TemperatureScaling.fit_needs(), who):
        logits, label = recorded(block.logits), recorded(block.label)
        known = (label >= 0) & (label < logits.shape[1])
        count += int(known.sum())
        total += slope_and_curvature(logits[known], label[known], beta).cpu()
    if not count:
        raise DetectorError(
            f"{who}: no row to fit on has a label (labels come from sub-folders, lists, or an .npz "
            "with labels)"
        )
    slope, curvature = total.tolist()
    return slope, curvature
