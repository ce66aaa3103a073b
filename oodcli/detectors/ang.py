"""Angle between the embedding and the weights of the predicted class (Begon & Geurts 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oodcli.detectors.latent_space import TINY, LatentSpace, Products


def angularity(of: Products) -> Tensor:
    """1 − w_k·u/(‖w_k‖‖u‖), the cosine being 0 where a vector is 0 (eq. 15). Returns (N,),
    higher = more OOD."""
    return 1 - of.uw / (of.uu.sqrt() * of.ww.sqrt()).clamp_min(TINY)


@dataclass(frozen=True)
class Ang(LatentSpace):
    """1 − cos(u, w_k), by the direction of the embedding alone."""

    name = "ang"
    source = "Begon & Geurts 2021, eq. 15"
    about = "cosine distance between the embedding and the predicted class's weights"
    formula = r"s = 1 - \frac{w_k^\top u}{\lVert w_k \rVert \, \lVert u \rVert}"

    indicator = staticmethod(angularity)


@dataclass(frozen=True)
class AngPlusPlus(Ang):
    """1 − cos(u⁺, w_k⁺). Both have the components where w_k is positive, else 0."""

    name = "ang++"
    source = "Begon & Geurts 2021, eq. 15"
    about = "ang, over the components where the predicted class's weight is positive"
    formula = r"""
        s = 1 - \frac{w_k^{+\top} u^+}{\lVert w_k^+ \rVert \, \lVert u^+ \rVert},
        \qquad u^+_j = u_j \, [w_{k,j} > 0]
    """
    positive = True
