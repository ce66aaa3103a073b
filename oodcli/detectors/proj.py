"""Length of the embedding along the weights of the predicted class (Begon & Geurts 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oodcli.detectors.latent_space import TINY, LatentSpace, Products


def projection(of: Products) -> Tensor:
    """−w_k·u/‖w_k‖ (eq. 16). Returns (N,), higher = more OOD."""
    return -of.uw / of.ww.sqrt().clamp_min(TINY)


@dataclass(frozen=True)
class Proj(LatentSpace):
    """−w_k·u/‖w_k‖, the length of the embedding along the predicted class's weights."""

    name = "proj"
    source = "Begon & Geurts 2021, eq. 16"
    about = "minus the embedding's projection onto the predicted class's weights"
    formula = r"s = -\frac{w_k^\top u}{\lVert w_k \rVert}"

    indicator = staticmethod(projection)
