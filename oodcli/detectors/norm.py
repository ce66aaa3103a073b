"""Length of the embedding (Begon & Geurts 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oodcli.detectors.latent_space import LatentSpace, Products


def norm(of: Products) -> Tensor:
    """−‖u‖ (eq. 14). Returns (N,), higher = more OOD."""
    return -of.uu.sqrt()


@dataclass(frozen=True)
class Norm(LatentSpace):
    """−‖u‖, the length of the embedding."""

    name = "norm"
    source = "Begon & Geurts 2021, eq. 14"
    about = "minus the norm of the embedding"
    formula = r"s = -\lVert u \rVert"

    indicator = staticmethod(norm)


@dataclass(frozen=True)
class NormPlus(Norm):
    """−‖u⁺‖. u⁺ has the components of u where the predicted class's weight is positive, else 0."""

    name = "norm+"
    source = "Begon & Geurts 2021, eq. 14"
    about = "norm, over the components where the predicted class's weight is positive"
    formula = r"s = -\lVert u^+ \rVert, \qquad u^+_j = u_j \, [w_{k,j} > 0]"
    positive = True
