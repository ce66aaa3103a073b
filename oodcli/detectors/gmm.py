"""A Gaussian mixture with a component for each class (Mukhoti et al. 2023)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.class_statistics import class_of
from oodcli.detectors.layer_choice import EMBEDDING
from oodcli.detectors.tied_gaussians import (
    Scatter,
    WhiteMeans,
    ridged,
    scatters,
    squared_distances,
    white_means,
    whitened,
)
from oodcli.errors import DetectorError
from oodcli.features import Features, recorded

log = logging.getLogger(__name__)

BYTES = 1 << 30
"""The covariances of all classes may take so much."""


def mixture_density(
    rows: Tensor,
    weight: Tensor,
    mean: Tensor,
    whitening: Tensor,
    log_det: Tensor,
    of: WhiteMeans | None = None,
) -> Tensor:
    """(N,) log Σ_c π_c N(u; μ_c, Σ_c). rows: (N, D) float64; weight: log π, (C,); mean: (C, D);
    whitening: A with A Aᵀ = Σ⁻¹, and log_det: log |Σ|, (C, D, D) and (C,), or (1, D, D) and (1,)
    for one Σ; of: its white_means."""
    if len(whitening) == 1:
        squares = squared_distances(rows, mean, whitening[0], of)
    else:
        pairs = zip(mean, whitening, strict=True)
        squares = torch.stack([((rows - m) @ a).square().sum(1) for m, a in pairs], 1)
    constant = rows.shape[1] * math.log(2 * math.pi)
    return torch.logsumexp(weight - (squares + log_det + constant) / 2, 1)


def log_determinant(whitening: Tensor) -> Tensor:
    """log |Σ| from A with A Aᵀ = Σ⁻¹, whose columns are eigenvectors of Σ by the root of their
    eigenvalue. whitening: (…, D, D). Returns (…)."""
    return -whitening.square().sum(-2).log().sum(-1)


@dataclass(frozen=True)
class GMM(Detector):
    """Minus the log density of u under a mixture of Gaussians, one for each class: π_c the share of
    its rows, μ_c their mean, Σ the covariance that all classes share, or one for each class.
    Classes are the labels, where unknown the predicted ones.

    weight: log π, (C,), for each class that was fitted on; mean: (C, D); whitening: (1 or C, D, D),
    A with A Aᵀ = Σ⁻¹; log_det: log |Σ|, (1 or C,).
    """

    name = "gmm"
    source = "Mukhoti et al. 2023 (CVPR), arXiv 2102.11582"
    about = "minus the log density of the embedding, a Gaussian for each class"
    formula = r"s = -\log \sum_c \pi_c \, \mathcal{N}(u; \mu_c, \Sigma_c)"
    needs = frozenset({"embedding"})
    fit_also = frozenset({"logits"})
    fitted = True
    better_on_real = True
    heavy = True

    weight: Tensor
    mean: Tensor
    whitening: Tensor
    log_det: Tensor

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        covariance: Annotated[
            Literal["tied", "full"],
            "full: one for each class, as in the paper; tied: one for all, the default, which "
            "needs fewer rows and less memory",
        ] = "tied",
    ) -> Self:
        """One pass; a (D, D) and a (K, D) sum are kept. With full covariances two, and (C, D, D)
        is kept. Raises DetectorError where those take more than 1 GiB, and when there is no row."""
        sums = scatters(train, cls.fit_needs(), [EMBEDDING], cls.name)[EMBEDDING]
        present = sums.count > 0
        if covariance == "tied":
            whitening = whitened(sums.within, cls.name)[None]
        else:
            whitening = cls._of_each_class(train, sums, present)
        weight = (sums.count[present] / sums.count.sum()).log()
        return cls(weight, sums.means, whitening, log_determinant(whitening))

    @classmethod
    def _of_each_class(cls, train: Blocks, sums: Scatter, present: Tensor) -> Tensor:
        """(C, D, D)."""
        classes, width = present.nonzero()[:, 0].tolist(), len(sums.square)
        size = 8 * len(classes) * width * width
        if size > BYTES:
            raise DetectorError(
                f"{cls.name}.covariance=full would keep {size / 1e9:.1f} GB, {len(classes)} times "
                f"{width} x {width}: use -p {cls.name}.covariance=tied"
            )
        square = torch.zeros(len(classes), width, width, dtype=torch.float64)
        for block in finite_rows(train, cls.fit_needs(), cls.name):
            label = class_of(block)
            rows = recorded(block.embedding).double() - sums.mean
            for i, c in enumerate(classes):
                mine = rows[label == c]
                square[i].addmm_(mine.T, mine)
        singular = 0
        for i, (mean, count) in enumerate(zip(sums.means, sums.count[present], strict=True)):
            offset = (mean - sums.mean).T
            values, vectors = torch.linalg.eigh(square[i] / count - offset @ offset.T)
            values, added = ridged(values)
            singular += bool(added)
            square[i] = vectors / values.sqrt()
        if singular:
            log.info(
                f"{cls.name}: the covariances of {singular} of {len(classes)} classes are singular "
                f"and get a ridge: fit on more than {width} rows a class, or with "
                f"-p {cls.name}.covariance=tied"
            )
        return square

    @cached_property
    def _white(self) -> WhiteMeans | None:
        one = len(self.whitening) == 1
        return white_means(self.mean, self.whitening[0]) if one else None

    def _score(self, test: Features) -> Tensor:
        rows = recorded(test.embedding).double()
        state = self.weight, self.mean, self.whitening, self.log_det
        return -mixture_density(rows, *state, self._white)
