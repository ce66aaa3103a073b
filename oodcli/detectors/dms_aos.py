"""Mean square of BatchNorm's standardised inputs (Begon & Geurts 2021), of all layers or the
image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oodcli.detectors.batchnorm_indicators import STANDARDISED, BatchNormIndicator
from oodcli.detectors.dms import dms
from oodcli.features import Features


def dms_aos(mean: Tensor, variance: Tensor, positions: Tensor) -> Tensor:
    """The same, average of sum: (1/C_S) Σ mean y² (eq. 28), with mean y² = M² + S² (HW − 1)/HW.
    mean, variance: (N, C_S), M and S²; positions: (C_S,), HW. Returns (N,)."""
    return dms(mean) + (variance * (1 - positions.reciprocal())).mean(1)


@dataclass(frozen=True)
class DMSAOS(BatchNormIndicator):
    """(1/C) Σ mean y² over all channels of the BatchNorm layers and of the image, C in all. a: the
    input of a layer; M and S: mean and standard deviation of y over the positions."""

    name = "dms-aos"
    source = "Begon & Geurts 2021, eq. 28"
    about = "mean square of the standardised inputs of BatchNorm"
    formula = r"s = \frac{1}{C} \sum \operatorname{mean}_{h,w} y^2" + STANDARDISED
    needs = frozenset({"batchnorm.mean", "batchnorm.var", "batchnorm.running"})

    def _of(self, test: Features, channels: slice) -> Tensor:
        mean, variance = self._mean(test)[:, channels], self._variance(test)[:, channels]
        return dms_aos(mean, variance, self._positions(test)[channels])


@dataclass(frozen=True)
class InDMSAOS(DMSAOS):
    """``dms-aos`` of the normalised image alone, as a layer with running mean 0 and running
    variance 1."""

    name = "in-dms-aos"
    about = "dms-aos of the normalised image alone"
    needs = DMSAOS.needs - {"batchnorm.running"}
    only_input = True
