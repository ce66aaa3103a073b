"""The embedding against the weights of the predicted class (Begon & Geurts 2021, §2.1)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from oodcli.detectors.base import Detector, by_rows
from oodcli.features import Features, recorded

TINY = torch.finfo(torch.float64).tiny
"""A length of 0 is divided by as this: the products above it are 0, so the quotient is, too."""


class Products(NamedTuple):
    """Of embeddings u and the weights w of each row's predicted class. uu: ‖u‖², ww: ‖w‖²,
    uw: w·u; (N,) float64 each."""

    uu: Tensor
    ww: Tensor
    uw: Tensor


def products(u: Tensor, k: Tensor, weight: Tensor, positive: bool) -> Products:
    """positive: both vectors have zeros outside the components where w_k > 0, what the + in a name
    means. u: (N, D), k: (N,) the predicted classes, weight: (K, D)."""
    w = weight.double()
    inside = (w > 0).double()  # (K, D)
    if positive:
        w = w.clamp_min(0)

    def some(u: Tensor, k: Tensor) -> Tensor:
        u = u.double() * inside[k] if positive else u.double()  # (n, D)
        return torch.stack([u.square().sum(1), (u * w[k]).sum(1)], 1)

    uu, uw = by_rows(some, u, k).unbind(1)
    return Products(uu, w.square().sum(1)[k], uw)


def norm(of: Products) -> Tensor:
    """−‖u‖ (eq. 14). Returns (N,), higher = more OOD."""
    return -of.uu.sqrt()


def angularity(of: Products) -> Tensor:
    """1 − w_k·u/(‖w_k‖‖u‖), the cosine being 0 where a vector is 0 (eq. 15). Returns (N,),
    higher = more OOD."""
    return 1 - of.uw / (of.uu.sqrt() * of.ww.sqrt()).clamp_min(TINY)


def projection(of: Products) -> Tensor:
    """−w_k·u/‖w_k‖ (eq. 16). Returns (N,), higher = more OOD."""
    return -of.uw / of.ww.sqrt().clamp_min(TINY)


def activation(of: Products) -> Tensor:
    """−w_k·u, without the bias (eq. 17). Returns (N,), higher = more OOD."""
    return -of.uw


def predicted_products(test: Features, positive: bool) -> Products:
    """Of the rows of a block, k the predicted class (by the logits, with bias)."""
    k = recorded(test.logits).argmax(1)
    return products(recorded(test.embedding), k, recorded(test.head).weight, positive)


class LatentSpace(Detector):
    """An indicator of u and w_k, k the predicted class."""

    needs = frozenset({"logits", "embedding", "head"})
    positive: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def indicator(of: Products) -> Tensor:
        """Returns (N,)."""

    def _score(self, test: Features) -> Tensor:
        return self.indicator(test.shared(predicted_products, self.positive))


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
