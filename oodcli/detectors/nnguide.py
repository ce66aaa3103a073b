"""NNGuide (Park et al. 2023): the energy, guided by the nearest neighbours."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor

from oodcli.detectors.bank import Bank
from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, drawn_of, finite_rows
from oodcli.detectors.hyperparameters import require_fraction, require_positive
from oodcli.detectors.knn import PAIRS, unit
from oodcli.detectors.peak_energy import positive_energy
from oodcli.errors import DetectorError
from oodcli.features import Features, recorded

log = logging.getLogger(__name__)

K = 100

LEAST = 1000
"""The share of the rows that is stored holds at least this many, if there are as many."""


def mean_of_largest(queries: Tensor, bank: Iterable[Tensor], k: int) -> Tensor:
    """(N,) float64: the mean of the k largest products with rows of a bank. queries: (N, D)
    float64. bank: blocks (M, D), at least k rows in all."""
    largest = queries.new_full((len(queries), k), -torch.inf)
    step = max(1, PAIRS // max(len(queries), 1))
    for block in bank:
        for start in range(0, len(block), step):
            products = queries @ block[start : start + step].to(queries).T
            largest = torch.cat([largest, products], 1).topk(k, dim=1).values
    return largest.mean(1)


@dataclass(frozen=True)
class NNGuide(Detector):
    """Minus the energy g = log(1 + Σ exp z) times the mean of the k largest products of u/‖u‖ with
    rows r·g of a random share of those fitted on, r = u/‖u‖. g is logsumexp z where that is large,
    and never negative.

    bank: (M, D) float32, r·g.
    """

    name = "nnguide"
    source = "Park et al. 2023 (ICCV)"
    about = "minus the energy times the similarity to the nearest rows, weighted by their energy"
    formula = r"""
        s = -g(z) \, \operatorname*{mean}_{i \le k}
        \Bigl(\frac{u^\top r}{\lVert u \rVert} g\Bigr)_{(i)}, \qquad
        g(z) = \log\Bigl(1 + \sum_c e^{z_c}\Bigr)
    """
    needs = frozenset({"logits", "logits.level", "embedding"})
    fitted = True
    better_on_real = True
    heavy = True

    bank: Bank
    k: int

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        k: Annotated[
            int | None,
            "number of neighbours; by default OpenOOD's 100, or a tenth of the rows stored if that "
            "is less",
        ] = None,
        share: Annotated[
            float,
            "fraction of the rows that is stored, above 0 and at most 1, but at least 1,000 rows; "
            "by default the paper's 1 %",
        ] = 0.01,
        seed: Annotated[int, "of the random choice of these rows"] = 0,
    ) -> Self:
        """Two passes; a large bank is only read when it is saved. Raises DetectorError for a share
        that is not a fraction, and when there are fewer than k rows."""
        require_positive(cls.name, share=share)
        require_fraction(cls.name, share=share)
        if k is not None:
            require_positive(cls.name, k=k)
        rows = width = 0
        for block in finite_rows(train, cls.needs, cls.name):
            rows, width = rows + len(block), recorded(block.embedding).shape[1]
        stored = min(rows, max(LEAST, round(share * rows)))
        if k is None:
            k = min(K, max(1, stored // 10))
            if k < K:
                log.info(f"{cls.name}: k = {k}, a tenth of the {stored} rows stored, not {K}")
        if k > stored:
            raise DetectorError(
                f"{cls.name}.k={k}, but only {stored} rows are stored: choose a smaller k or a "
                "larger share"
            )
        chosen = drawn_of(rows, stored, seed)

        def weighted() -> Iterable[Tensor]:
            start = 0
            for block in finite_rows(train, cls.needs, cls.name):
                kept = block.select(chosen[start : start + len(block)])
                start += len(block)
                energy = positive_energy(recorded(kept.logits))
                yield (unit(recorded(kept.embedding)) * energy[:, None]).float()

        return cls(Bank((stored, width), weighted).settled(), k)

    def _score(self, test: Features) -> Tensor:
        guidance = mean_of_largest(unit(recorded(test.embedding)), self.bank.blocks(), self.k)
        return -positive_energy(recorded(test.logits)) * guidance
