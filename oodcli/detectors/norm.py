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
    """−‖u‖."""

    name = "norm"
    source = "Begon & Geurts 2021, eq. 14"
    about = "minus the norm of the embedding"

    indicator = staticmethod(norm)


@dataclass(frozen=True)
class NormPlus(Norm):
    """−‖u⁺‖."""

    name = "norm+"
    source = "Begon & Geurts 2021, eq. 14"
    about = "norm, over the components where the predicted class's weight is positive"
    positive = True
