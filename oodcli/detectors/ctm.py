"""Class typical matching (Nguyen et al. 2023): cosines with the means of the classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.class_statistics import class_means, predicted_among
from oodcli.detectors.knn import unit
from oodcli.detectors.she import mismatch
from oodcli.features import Features, recorded

Compared = Literal["nearest", "predicted"]


def largest_cosine(rows: Tensor, mean: Tensor) -> Tensor:
    """(N,) float64: max over classes of cos(u, μ_c), 0 for u = 0. rows: (N, D); mean: (C, D)."""
    found: Tensor = (unit(rows) @ unit(mean).T).amax(1)
    return found


@dataclass(frozen=True)
class CTM(Detector):
    """Minus the cosine of u and the nearest of the class means μ_c of the rows fitted on, or the
    mean of the predicted class alone. Classes are the labels, where unknown the predicted ones; one
    without rows has no vote.

    mean: (K, D); present: (K,) bool.
    """

    name = "ctm"
    source = "Nguyen et al. 2023, arXiv 2306.14920"
    about = "minus the cosine of the embedding and the nearest class mean"
    formula = r"s = -\max_c \frac{u^\top \mu_c}{\lVert u \rVert \, \lVert \mu_c \rVert}"
    needs = frozenset({"logits", "embedding"})
    fitted = True

    mean: Tensor
    present: Tensor
    compared: Compared

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        compared: Annotated[
            Compared, "with which class mean; by default the nearest, as in the paper"
        ] = "nearest",
    ) -> Self:
        """One pass; a (K, D) sum is kept. Raises DetectorError when there is no row."""
        rows = finite_rows(train, cls.needs, cls.name)
        count, mean = class_means(rows, lambda block: recorded(block.embedding))
        return cls(mean, count > 0, compared)

    def _score(self, test: Features) -> Tensor:
        u = recorded(test.embedding)
        if self.compared == "predicted":
            k = predicted_among(recorded(test.logits), self.present)
            return mismatch(u, self.mean[k], "cosine")
        return -largest_cosine(u, self.mean[self.present])
