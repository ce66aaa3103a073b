"""Departure of BatchNorm's channel spreads (Begon & Geurts 2021), of all layers or the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oodcli.detectors.batchnorm_indicators import STANDARDISED, BatchNormIndicator
from oodcli.features import Features


def dss(variance: Tensor, positions: Tensor) -> Tensor:
    """Departure from the standard deviation, (1/C_S) Σ (S − 1)² over the channels with more than
    one position (eq. 29). variance: (N, C_S), S²; positions: (C_S,), HW. Returns (N,)."""
    departure = (variance.sqrt() - 1).square()
    return torch.where(positions > 1, departure, 0).mean(1)


@dataclass(frozen=True)
class DSS(BatchNormIndicator):
    """(1/C) Σ (S − 1)² over all channels of the BatchNorm layers and of the image, C in all. a: the
    input of a layer; M and S: mean and standard deviation of y over the positions."""

    name = "dss"
    source = "Begon & Geurts 2021, eq. 29"
    about = "squared deviation of the channels' standard deviations from BatchNorm's"
    formula = r"s = \frac{1}{C} \sum (S - 1)^2" + STANDARDISED
    needs = frozenset({"batchnorm.var", "batchnorm.running"})

    def _of(self, test: Features, channels: slice) -> Tensor:
        return dss(self._variance(test)[:, channels], self._positions(test)[channels])


@dataclass(frozen=True)
class InDSS(DSS):
    """``dss`` of the normalised image alone, as a layer with running mean 0 and running variance
    1."""

    name = "in-dss"
    about = "dss of the normalised image alone"
    needs = DSS.needs - {"batchnorm.running"}
    only_input = True
