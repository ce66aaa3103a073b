"""Relation graph (Kim et al. 2023): how strongly an image is tied to rows that are classified
alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor

from oodcli.detectors.bank import Bank
from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.hyperparameters import require_between, require_positive
from oodcli.detectors.knn import PAIRS, unit
from oodcli.detectors.msp import probabilities
from oodcli.features import Features, recorded


def relations(u: Tensor, p: Tensor, bank: Iterable[Tensor], power: float, least: float) -> Tensor:
    """(N,) float64: Σ_i e_i^power over the rows of a bank, e_i = max(0, u·u_i)(p·p_i), but 0 up to
    ``least`` (Kim et al. 2023). u: (N, D), rows of length 1; p: (N, K), both float64.
    bank: blocks (M, D + K) of u_i and p_i."""
    total = u.new_zeros(len(u))
    step = max(1, PAIRS // max(len(u), 1))
    for block in bank:
        for start in range(0, len(block), step):
            rows = block[start : start + step].to(u)
            e = (u @ rows[:, : u.shape[1]].T).clamp_min_(0)
            e *= p @ rows[:, u.shape[1] :].T
            e.masked_fill_(e <= least, 0)
            total += (e if power == 1 else e.pow_(power)).sum(1)
    return total


@dataclass(frozen=True)
class Relation(Detector):
    """Minus the mean relation e_i^a to the rows i fitted on: the product of their cosine, at least
    0, and of their softmax probabilities. Relations up to 0.03 count as 0.

    bank: (N, D + K) float32, u_i/‖u_i‖ and p_i; a large one stays in its file.
    """

    name = "relation"
    source = "Kim et al. 2023 (NeurIPS)"
    about = "minus the mean similarity to rows with a similar embedding and softmax"
    formula = r"""
        s = -\operatorname*{mean}_i e_i^a, \qquad
        e_i = \max\Bigl(0, \frac{u^\top u_i}{\lVert u \rVert \, \lVert u_i \rVert}\Bigr) \,
        p^\top p_i
    """
    needs = frozenset({"logits", "embedding"})
    fitted = True
    better_on_real = True
    heavy = True

    bank: Bank
    power: float
    least: float

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        power: Annotated[float, "a, above 0; by default OpenOOD's"] = 1.0,
        least: Annotated[float, "relations up to this count as 0; by default OpenOOD's"] = 0.03,
    ) -> Self:
        """Two passes; a large bank is only read when it is saved. Raises DetectorError for an a
        that is not positive, for a least relation outside 0 … 1, and when there is no row."""
        require_positive(cls.name, power=power)
        require_between(cls.name, 0, 1, least=least)
        rows = width = 0
        for block in finite_rows(train, cls.needs, cls.name):
            rows += len(block)
            width = recorded(block.embedding).shape[1] + recorded(block.logits).shape[1]

        def both() -> Iterable[Tensor]:
            for block in finite_rows(train, cls.needs, cls.name):
                parts = unit(recorded(block.embedding)), block.shared(probabilities)
                yield torch.cat(parts, 1).float()

        return cls(Bank((rows, width), both).settled(), power, least)

    def _score(self, test: Features) -> Tensor:
        u, p = unit(recorded(test.embedding)), test.shared(probabilities)
        found = relations(u, p, self.bank.blocks(), self.power, self.least)
        return -found / self.bank.shape[0]
