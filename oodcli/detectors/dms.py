"""Departure of BatchNorm's channel means (Begon & Geurts 2021), of all layers or the image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oodcli.detectors.batchnorm_indicators import STANDARDISED, BatchNormIndicator
from oodcli.features import Features


def dms(mean: Tensor) -> Tensor:
    """Departure from the mean, (1/C_S) Σ M² (eq. 27). mean: (N, C_S). Returns (N,)."""
    return mean.square().mean(1)


@dataclass(frozen=True)
class DMS(BatchNormIndicator):
    """(1/C) Σ M² over all channels of the BatchNorm layers and of the image, C in all. a: the input
    of a layer; M and S: mean and standard deviation of y over the positions."""

    name = "dms"
    source = "Begon & Geurts 2021, eq. 27"
    about = "squared deviation of the channel means from BatchNorm's"
    formula = r"s = \frac{1}{C} \sum M^2" + STANDARDISED
    needs = frozenset({"batchnorm.mean", "batchnorm.running"})

    def _of(self, test: Features, channels: slice) -> Tensor:
        return dms(self._mean(test)[:, channels])


@dataclass(frozen=True)
class InDMS(DMS):
    """``dms`` of the normalised image alone, as a layer with running mean 0 and running variance
    1."""

    name = "in-dms"
    about = "dms of the normalised image alone"
    needs = DMS.needs - {"batchnorm.running"}
    only_input = True
