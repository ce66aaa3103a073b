"""Share of BatchNorm channels with an extreme variance (Begon & Geurts 2021), of all layers or the
image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from oodcli.detectors.batchnorm_indicators import STANDARDISED, BatchNormIndicator, Shape, shape_of
from oodcli.features import Features

SIGNIFICANCE = 0.1
"""Two-sided level of dss-ext, as in the paper."""


def dss_ext(variance: Tensor, bounds: Tensor) -> Tensor:
    """Share of channels with an extreme variance, (1/C_S) Σ [p < 0.1] (eq. 30), p = 2 min(F, 1 − F)
    and F the χ² distribution function of (HW − 1) S²: p < 0.1 where S² leaves ``bounds``.
    variance: (N, C_S), S²; bounds: (2, C_S), as of ``variance_bounds``. Returns (N,)."""
    extreme = (variance < bounds[0]) | (variance > bounds[1])
    return extreme.double().mean(1)


def variance_bounds(positions: int, significance: float = SIGNIFICANCE) -> tuple[float, float]:
    """The S² between which a χ² test of (HW − 1) S² with HW − 1 degrees of freedom has p of at
    least ``significance``; everything for HW = 1."""
    if positions == 1:
        return -torch.inf, torch.inf
    from scipy.special import gammaincinv

    half = (positions - 1) / 2  # F(x) = gammainc(n/2, x/2), so S² = x/n = gammaincinv(n/2, F)/(n/2)
    tail = significance / 2
    return float(gammaincinv(half, tail)) / half, float(gammaincinv(half, 1 - tail)) / half


@lru_cache(maxsize=16)
def channel_bounds(shape: Shape) -> Tensor:
    """``variance_bounds`` of every channel: (2, C_S) float64."""
    bounds = torch.tensor([variance_bounds(positions) for positions, _ in shape]).double()
    return bounds.T.repeat_interleave(torch.tensor([width for _, width in shape]), 1)


@dataclass(frozen=True)
class DSSExt(BatchNormIndicator):
    """Share of channels with p < 0.1 over all channels of the BatchNorm layers and of the image, C
    in all. a: the input of a layer; M and S: mean and standard deviation of y over the positions.
    F: the χ² distribution function of (HW − 1) S² with HW − 1 degrees of freedom."""

    name = "dss-ext"
    source = "Begon & Geurts 2021, eq. 30"
    about = "share of channels whose variance is extreme by a χ² test"
    formula = r"s = \frac{1}{C} \sum [p < 0.1], \qquad p = 2 \min(F, 1 - F)" + STANDARDISED
    needs = frozenset({"batchnorm.var", "batchnorm.running"})

    def _of(self, test: Features, channels: slice) -> Tensor:
        variance = self._variance(test)
        bounds = channel_bounds(shape_of(test, self.only_input)).to(variance.device)
        return dss_ext(variance[:, channels], bounds[:, channels])


@dataclass(frozen=True)
class InDSSExt(DSSExt):
    """``dss-ext`` of the normalised image alone, as a layer with running mean 0 and running
    variance 1."""

    name = "in-dss-ext"
    about = "dss-ext of the normalised image alone"
    needs = DSSExt.needs - {"batchnorm.running"}
    only_input = True
