"""GAIA-Z (Chen et al. 2023): how many gradients inside the network are not zero."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from oodcli import notes
from oodcli.detectors.base import Detector
from oodcli.features import Features

log = logging.getLogger(__name__)

SMOOTH = (
    "gaia-z: no gradient at any BatchNorm layer is 0, so all scores are equal; it needs a network "
    "of ReLUs, not of smooth activations such as GELU or SiLU"
)


def nonzero_density(shares: Tensor) -> Tensor:
    """Mean square of the shares of non-zero gradients (Chen et al. 2023, GAIA-Z). shares: (N, C) of
    the channels of all layers. Returns (N,) float64 in 0 … 1, higher = more OOD."""
    return shares.double().square().mean(1)


@dataclass(frozen=True)
class GaiaZ(Detector):
    """Mean of d² over the channels of all BatchNorm layers. d is the share of a channel's positions
    at which the gradient of the largest logit by the layer's output is not 0. A ReLU lets no
    gradient pass where it is off, and OOD images turn fewer of them off."""

    name = "gaia-z"
    source = "Chen et al., NeurIPS 2023, GAIA-Z"
    about = "share of non-zero gradients of the largest logit at the BatchNorm layers, squared"
    formula = r"""
        s = \frac{1}{C} \sum_{j=1}^{C} d_j^2, \qquad
        d_j = \operatorname{mean}_{h,w}
        \Bigl[ \frac{\partial z_k}{\partial A_{j,h,w}} \ne 0 \Bigr]
    """
    needs = frozenset({"layers.nonzero"})

    def _score(self, test: Features) -> Tensor:
        layers = test.layers.values()
        shares = torch.cat([each.nonzero for each in layers if each.nonzero is not None], 1)
        if bool((shares == 1).all()):
            notes.once(log, SMOOTH)
        return nonzero_density(shares)
