"""The embedding against the weights of the predicted class (Begon & Geurts 2021, §2.1)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.features import Features, recorded

TINY = torch.finfo(torch.float64).tiny
"""A length of 0 is divided by as this: the products above it are 0, so the quotient is, too."""


def length(rows: Tensor) -> Tensor:
    """‖·‖ of each row. rows: (N, D). Returns (N,)."""
    return rows.square().sum(1).sqrt()


def norm(u: Tensor, w: Tensor) -> Tensor:
    """−‖u‖ (eq. 14); w has no part in it. u, w: (N, D). Returns (N,), higher = more OOD."""
    return -length(u)


def angularity(u: Tensor, w: Tensor) -> Tensor:
    """1 − w_k·u/(‖w_k‖‖u‖), the cosine being 0 where a vector is 0 (eq. 15).

    u, w: (N, D), w the weights of each row's predicted class. Returns (N,), higher = more OOD.
    """
    lengths = length(u) * length(w)
    return 1 - (u * w).sum(1) / lengths.clamp_min(TINY)


def projection(u: Tensor, w: Tensor) -> Tensor:
    """−w_k·u/‖w_k‖ (eq. 16). u, w: (N, D). Returns (N,), higher = more OOD."""
    return -(u * w).sum(1) / length(w).clamp_min(TINY)


def activation(u: Tensor, w: Tensor) -> Tensor:
    """−w_k·u, without the bias (eq. 17). u, w: (N, D). Returns (N,), higher = more OOD."""
    return -(u * w).sum(1)


def positive_part(u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Both vectors with zeros outside the components where w_k > 0: what the + in a name means.
    u, w: (N, D). Returns two of the same shape."""
    return torch.where(w > 0, u, 0), w.clamp_min(0)


class LatentSpace(Detector):
    """An indicator of u and w_k, k the predicted class (by the logits, with bias)."""

    needs = frozenset({"logits", "embedding", "head"})
    positive: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def indicator(u: Tensor, w: Tensor) -> Tensor:
        """u, w: (N, D) float64. Returns (N,)."""

    def _score(self, test: Features) -> Tensor:
        u = recorded(test.embedding).double()
        w = recorded(test.head).weight[recorded(test.logits).argmax(1)].double()  # (N, D)
        return self.indicator(*(positive_part(u, w) if self.positive else (u, w)))


@dataclass(frozen=True)
class Norm(LatentSpace):
    """−‖u‖."""

    name = "norm"
    source = "Begon & Geurts 2021, eq. 14"
    about = "minus the length of the embedding"

    indicator = staticmethod(norm)


@dataclass(frozen=True)
class NormPlus(Norm):
    """−‖u⁺‖."""

    name = "norm+"
    source = "Begon & Geurts 2021, eq. 14"
    about = "norm, over the components where the predicted class's weight is positive"
    positive = True


@dataclass(frozen=True)
class Ang(LatentSpace):
    """1 − cos(u, w_k)."""

    name = "ang"
    source = "Begon & Geurts 2021, eq. 15"
    about = "cosine distance between the embedding and the predicted class's weights"

    indicator = staticmethod(angularity)


@dataclass(frozen=True)
class AngPlusPlus(Ang):
    """1 − cos(u⁺, w_k⁺)."""

    name = "ang++"
    source = "Begon & Geurts 2021, eq. 15"
    about = "ang, over the components where the predicted class's weight is positive"
    positive = True


@dataclass(frozen=True)
class Proj(LatentSpace):
    """−w_k·u/‖w_k‖."""

    name = "proj"
    source = "Begon & Geurts 2021, eq. 16"
    about = "minus the embedding's length along the predicted class's weights"

    indicator = staticmethod(projection)


@dataclass(frozen=True)
class Act(LatentSpace):
    """−w_k·u."""

    name = "act"
    source = "Begon & Geurts 2021, eq. 17"
    about = "minus the predicted class's logit without its bias"

    indicator = staticmethod(activation)


@dataclass(frozen=True)
class ActPlus(Act):
    """−w_k⁺·u⁺."""

    name = "act+"
    source = "Begon & Geurts 2021, eq. 17"
    about = "act, over the components where the predicted class's weight is positive"
    positive = True
