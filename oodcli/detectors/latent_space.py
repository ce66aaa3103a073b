"""What norm, ang, proj, act and their positive variants share: products of the embedding and the
weights of the predicted class (Begon & Geurts 2021, §2.1)."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import by_rows
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
    if len(k) < len(weight):  # most classes are nobody's
        weight, k = weight[k], torch.arange(len(k), device=k.device)
    w = weight.double()
    inside = (w > 0).double()  # (K, D)
    if positive:
        w = w.clamp_min(0)

    def some(u: Tensor, k: Tensor) -> Tensor:
        u = u.double() * inside[k] if positive else u.double()  # (n, D)
        return torch.stack([u.square().sum(1), (u * w[k]).sum(1)], 1)

    uu, uw = by_rows(some, u, k).unbind(1)
    return Products(uu, w.square().sum(1)[k], uw)


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
