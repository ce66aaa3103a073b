"""Logit of the predicted class without its bias (Begon & Geurts 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oodcli.detectors.latent_space import LatentSpace, Products


def activation(of: Products) -> Tensor:
    """−w_k·u, without the bias (eq. 17). Returns (N,), higher = more OOD."""
    return -of.uw


@dataclass(frozen=True)
class Act(LatentSpace):
    """−w_k·u, the predicted class's logit without its bias."""

    name = "act"
    source = "Begon & Geurts 2021, eq. 17"
    about = "minus the predicted class's logit without its bias"
    formula = r"s = -w_k^\top u"

    indicator = staticmethod(activation)


@dataclass(frozen=True)
class ActPlus(Act):
    """−w_k⁺·u⁺. Both have the components where w_k is positive, else 0."""

    name = "act+"
    source = "Begon & Geurts 2021, eq. 17"
    about = "act, over the components where the predicted class's weight is positive"
    formula = r"s = -w_k^{+\top} u^+, \qquad u^+_j = u_j \, [w_{k,j} > 0]"
    positive = True
