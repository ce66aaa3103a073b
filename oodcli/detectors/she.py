"""SHE (Zhang et al. 2023): how well the embedding matches a stored pattern of its class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, by_rows, finite_rows
from oodcli.detectors.class_statistics import (
    class_means,
    class_of,
    predicted_among,
    predicted_class,
)
from oodcli.detectors.latent_space import TINY
from oodcli.errors import DetectorError
from oodcli.features import Features, recorded

Metric = Literal["product", "cosine", "distance"]


def mismatch(u: Tensor, pattern: Tensor, metric: str = "product") -> Tensor:
    """−u·S (Zhang et al. 2023), −cos(u, S), which is 0 where a vector is 0, or ‖u − S‖. u,
    pattern: (N, D). Returns (N,) float64, higher = more OOD."""

    def some(u: Tensor, s: Tensor) -> Tensor:
        u = u.double()
        if metric == "distance":
            distance: Tensor = (u - s).norm(dim=1)
            return distance
        product = (u * s).sum(1)
        if metric == "cosine":
            product = product / (u.norm(dim=1) * s.norm(dim=1)).clamp_min(TINY)
        return -product

    return by_rows(some, u, pattern)


def rightly_classified(block: Features) -> Tensor:
    """(N,) the class of a row that is classified as labelled, or whose label is unknown; else
    −1."""
    label, predicted = class_of(block), predicted_class(block)
    return torch.where(label == predicted, label, -1)


@dataclass(frozen=True)
class SHE(Detector):
    """Minus the product of u and S_k, the mean of the rows of class k that are classified rightly,
    k the predicted class among those that have one such row. ``metric``: cosine is −cos(u, S_k),
    distance ‖u − S_k‖.

    pattern: (K, D); present: (K,) bool, classes with a pattern.
    """

    name = "she"
    source = "Zhang et al. 2023 (ICLR)"
    about = "minus the product of the embedding and the predicted class's mean embedding"
    formula = r"s = -u^\top S_k"
    needs = frozenset({"logits", "embedding"})
    fitted = True

    pattern: Tensor
    present: Tensor
    metric: Metric

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        metric: Annotated[
            Metric, "how u and S_k are compared; by default the paper's inner product"
        ] = "product",
    ) -> Self:
        """One pass; a (K, D) sum is kept. Raises DetectorError when no row is classified
        rightly."""
        rows = finite_rows(train, cls.needs, cls.name)
        count, mean = class_means(rows, lambda b: recorded(b.embedding), rightly_classified)
        if not (count > 0).any():
            raise DetectorError(f"{cls.name}: no row fitted on is classified as it is labelled")
        return cls(mean, count > 0, metric)

    def _score(self, test: Features) -> Tensor:
        k = predicted_among(recorded(test.logits), self.present)
        return mismatch(recorded(test.embedding), self.pattern[k], self.metric)
