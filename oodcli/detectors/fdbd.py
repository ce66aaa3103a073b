"""fDBD (Liu & Qin 2024): the distance to the decision boundaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, by_rows, finite_rows
from oodcli.detectors.class_statistics import mean_of_rows
from oodcli.detectors.head_geometry import mean_distances
from oodcli.features import Features, recorded

FLOOR = torch.finfo(torch.float32).tiny
"""A length of 0 is divided by as the smallest float32, so that the score is finite."""


def regularised(distance: Tensor, length: Tensor) -> Tensor:
    """−distance/length (Liu & Qin 2024). distance, length: (N,). Returns (N,), higher
    = more OOD."""
    return -distance / length.clamp_min(FLOOR)


@dataclass(frozen=True)
class FDBD(Detector):
    """Minus the mean distance of u to the boundaries between the predicted class k and the others,
    divided by the distance of u from μ, the mean of the rows fitted on. Classes with the same
    weights as k have no boundary with it and are left out.

    mean: (D,).
    """

    name = "fdbd"
    source = "Liu & Qin 2024 (ICML), arXiv 2312.11536"
    about = "mean distance to the decision boundaries, by the distance from the mean"
    formula = r"""
        s = -\frac{1}{\lVert u - \mu \rVert} \operatorname*{mean}_{c \neq k}
        \frac{z_k - z_c}{\lVert w_k - w_c \rVert}
    """
    needs = frozenset({"logits", "embedding", "head"})
    fitted = True

    mean: Tensor

    @classmethod
    def fit(cls, train: Blocks) -> Self:
        """One pass; one row is kept. Raises DetectorError when there is no row."""
        rows = finite_rows(train, cls.needs, cls.name)
        return cls(mean_of_rows(recorded(block.embedding) for block in rows))

    def _score(self, test: Features) -> Tensor:
        length = by_rows(lambda u: (u.double() - self.mean).norm(dim=1), recorded(test.embedding))
        return regularised(test.shared(mean_distances), length)
