"""How far the inputs of BatchNorm layers are from what they remember (Begon & Geurts 2021, §2.2).

y = (input − running mean)/√(running variance + eps), before the layer's own weight and bias, which
may be 0. M is the spatial mean of y and S its spatial standard deviation with divisor HW − 1, one
each per image and channel. The channels of all layers stand side by side, C_S in all, the
normalised image first: it is a layer of its own with running mean 0, running variance 1, eps 0. A
layer that is called twice counts twice. Layers with one position have no S: they add nothing to
dss and dss-ext, but their channels count in C_S, which is the same for all four indicators.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.features import INPUT, BatchNorm, Features, recorded

SIGNIFICANCE = 0.1
"""Two-sided level of dss-ext, as in the paper."""

TINY = torch.finfo(torch.float32).tiny
"""A running variance of 0 with eps 0 is divided by as this: a channel that was dead and wakes up is
far out, but finite."""

Shape = tuple[tuple[int, int], ...]
"""Number of positions and number of channels of each layer."""


def dms(mean: Tensor) -> Tensor:
    """Departure from the mean, (1/C_S) Σ M² (eq. 27). mean: (N, C_S). Returns (N,)."""
    return mean.square().mean(1)


def dms_aos(mean: Tensor, variance: Tensor, positions: Tensor) -> Tensor:
    """The same, average of sum: (1/C_S) Σ mean y² (eq. 28), with mean y² = M² + S² (HW − 1)/HW.
    mean, variance: (N, C_S), M and S²; positions: (C_S,), HW. Returns (N,)."""
    return dms(mean) + (variance * (1 - positions.reciprocal())).mean(1)


def dss(variance: Tensor, positions: Tensor) -> Tensor:
    """Departure from the standard deviation, (1/C_S) Σ (S − 1)² over the channels with more than
    one position (eq. 29). variance: (N, C_S), S²; positions: (C_S,), HW. Returns (N,)."""
    departure = (variance.sqrt() - 1).square()
    return torch.where(positions > 1, departure, 0).mean(1)


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


@lru_cache(maxsize=16)
def channel_positions(shape: Shape) -> Tensor:
    """HW of every channel: (C_S,) float64."""
    positions = torch.tensor([positions for positions, _ in shape]).double()
    return positions.repeat_interleave(torch.tensor([width for _, width in shape]))


def _norms(block: Features, only_input: bool) -> Sequence[BatchNorm]:
    return [block.batchnorm[INPUT]] if only_input else list(block.batchnorm.values())


def _shape(block: Features, only_input: bool) -> Shape:
    return tuple((n.spatial_size, len(n.running_mean)) for n in _norms(block, only_input))


def _remembered_variance(norms: Sequence[BatchNorm]) -> Tensor:
    """(C_S,) float64, running variance + eps."""
    eps = [norm.running_var.double() + norm.eps for norm in norms]
    return torch.cat(eps).clamp_min(TINY)


def standardised_mean(block: Features, only_input: bool) -> Tensor:
    """(N, C_S) float64, M of every channel."""
    norms = _norms(block, only_input)
    mean = torch.cat([recorded(norm.mean) for norm in norms], 1).double()
    remembered = torch.cat([norm.running_mean for norm in norms]).double()
    return (mean - remembered).div_(_remembered_variance(norms).sqrt())


def standardised_variance(block: Features, only_input: bool) -> Tensor:
    """(N, C_S) float64, S² of every channel."""
    norms = _norms(block, only_input)
    variance = torch.cat([recorded(norm.var) for norm in norms], 1).double()
    return variance.div_(_remembered_variance(norms))


class BatchNormIndicator(Detector):
    """An indicator of M and S of all layers or, with ``only_input``, of the image alone; a mean
    over channels, so that each layer's part in it can be told."""

    only_input: ClassVar[bool] = False
    explains = True
    strict_on_virtual = True

    @abstractmethod
    def _of(self, test: Features, channels: slice) -> Tensor:
        """(N,) the indicator of some of the channels."""

    def _score(self, test: Features) -> Tensor:
        return self._of(test, slice(None))

    def contributions(self, test: Features) -> tuple[Sequence[str], Tensor]:
        """Each layer's part of the mean over all channels."""
        widths = [width for _, width in _shape(test, self.only_input)]
        names = [INPUT] if self.only_input else list(test.batchnorm)
        parts = []
        start = 0
        for width in widths:
            channels = slice(start, start + width)
            parts.append(self._of(test, channels) * (width / sum(widths)))
            start += width
        words = ["the image itself" if name == INPUT else f"input of {name}" for name in names]
        return words, torch.stack(parts, 1)

    def _mean(self, test: Features) -> Tensor:
        return test.shared(standardised_mean, self.only_input)

    def _variance(self, test: Features) -> Tensor:
        return test.shared(standardised_variance, self.only_input)

    def _positions(self, test: Features) -> Tensor:
        return channel_positions(_shape(test, self.only_input)).to(self._variance(test).device)


@dataclass(frozen=True)
class DMS(BatchNormIndicator):
    """(1/C_S) Σ M²."""

    name = "dms"
    source = "Begon & Geurts 2021, eq. 27"
    about = "squared departure of the channel means from BatchNorm's"
    needs = frozenset({"batchnorm.mean", "batchnorm.running"})

    def _of(self, test: Features, channels: slice) -> Tensor:
        return dms(self._mean(test)[:, channels])


@dataclass(frozen=True)
class InDMS(DMS):
    """``dms`` of the input pseudo-layer alone."""

    name = "in-dms"
    about = "dms of the normalised image alone"
    needs = DMS.needs - {"batchnorm.running"}
    only_input = True


@dataclass(frozen=True)
class DMSAOS(BatchNormIndicator):
    """(1/C_S) Σ mean y²."""

    name = "dms-aos"
    source = "Begon & Geurts 2021, eq. 28"
    about = "mean square of the standardised inputs of BatchNorm"
    needs = frozenset({"batchnorm.mean", "batchnorm.var", "batchnorm.running"})

    def _of(self, test: Features, channels: slice) -> Tensor:
        mean, variance = self._mean(test)[:, channels], self._variance(test)[:, channels]
        return dms_aos(mean, variance, self._positions(test)[channels])


@dataclass(frozen=True)
class InDMSAOS(DMSAOS):
    """``dms-aos`` of the input pseudo-layer alone."""

    name = "in-dms-aos"
    about = "dms-aos of the normalised image alone"
    needs = DMSAOS.needs - {"batchnorm.running"}
    only_input = True


@dataclass(frozen=True)
class DSS(BatchNormIndicator):
    """(1/C_S) Σ (S − 1)²."""

    name = "dss"
    source = "Begon & Geurts 2021, eq. 29"
    about = "squared departure of the channels' standard deviations from BatchNorm's"
    needs = frozenset({"batchnorm.var", "batchnorm.running"})

    def _of(self, test: Features, channels: slice) -> Tensor:
        return dss(self._variance(test)[:, channels], self._positions(test)[channels])


@dataclass(frozen=True)
class InDSS(DSS):
    """``dss`` of the input pseudo-layer alone."""

    name = "in-dss"
    about = "dss of the normalised image alone"
    needs = DSS.needs - {"batchnorm.running"}
    only_input = True


@dataclass(frozen=True)
class DSSExt(BatchNormIndicator):
    """(1/C_S) Σ [p < 0.1]."""

    name = "dss-ext"
    source = "Begon & Geurts 2021, eq. 30"
    about = "share of channels whose variance is extreme by a χ² test"
    needs = frozenset({"batchnorm.var", "batchnorm.running"})

    def _of(self, test: Features, channels: slice) -> Tensor:
        variance = self._variance(test)
        bounds = channel_bounds(_shape(test, self.only_input)).to(variance.device)
        return dss_ext(variance[:, channels], bounds[:, channels])


@dataclass(frozen=True)
class InDSSExt(DSSExt):
    """``dss-ext`` of the input pseudo-layer alone."""

    name = "in-dss-ext"
    about = "dss-ext of the normalised image alone"
    needs = DSSExt.needs - {"batchnorm.running"}
    only_input = True
