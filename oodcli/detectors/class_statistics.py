"""Means and spreads of rows, by class or as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from oodcli.errors import DetectorError
from oodcli.features import Features, recorded


def class_of(block: Features) -> Tensor:
    """(N,) the label of each row; where it is unknown, the predicted class."""
    predicted = recorded(block.logits).argmax(1)
    return (
        predicted if block.label is None else torch.where(block.label >= 0, block.label, predicted)
    )


def predicted_among(logits: Tensor, present: Tensor) -> Tensor:
    """(N,) the class with the largest logit among those that rows were fitted on. present: (K,)."""
    return logits.masked_fill(~present, -torch.inf).argmax(1)


@dataclass(frozen=True)
class ClassMoments:
    """Float64 sums by class. count: (K,); total, square: name → (K, C)."""

    count: Tensor
    total: Mapping[str, Tensor]
    square: Mapping[str, Tensor]

    @property
    def present(self) -> Tensor:
        """(K,) bool: classes with at least one row."""
        return self.count > 0

    def mean(self, name: str) -> Tensor:
        """(K, C) class means; zero for a class without rows."""
        return self.total[name] / self.count.clamp(min=1)[:, None]

    def within_variance(self, name: str) -> Tensor:
        """(C,) pooled variance within classes, unbiased. Raises DetectorError when no class has
        two rows."""
        freedom = self.count.sum() - self.present.sum()
        if freedom < 1:
            raise DetectorError(
                "no class has two rows, so there is no spread within classes: invert with "
                "--per-class 2 or more"
            )
        scatter = self.square[name] - self.total[name].square() / self.count.clamp(min=1)[:, None]
        return scatter.sum(0).clamp(min=0) / freedom


def class_moments(
    blocks: Iterable[Features], rows: Callable[[Features], Mapping[str, Tensor]]
) -> ClassMoments:
    """Sums by class of whatever ``rows(block)`` names, (N, C) each; rows with a value that is not
    finite are left out. Raises DetectorError when there is no row."""
    count = torch.zeros(0, dtype=torch.float64)
    total: dict[str, Tensor] = {}
    square: dict[str, Tensor] = {}
    for block in blocks:
        classes = recorded(block.logits).shape[1]
        named = rows(block)
        finite = torch.ones(len(block), dtype=torch.bool)
        for values in named.values():
            finite &= torch.isfinite(values).all(1)
        label = class_of(block)[finite]
        if not len(count):
            count = torch.zeros(classes, dtype=torch.float64)
        count += torch.bincount(label, minlength=classes)
        for name, values in named.items():
            kept = values[finite].double()
            if name not in total:
                total[name] = kept.new_zeros(classes, kept.shape[1])
                square[name] = kept.new_zeros(classes, kept.shape[1])
            total[name].index_add_(0, label, kept)
            square[name].index_add_(0, label, kept.square())
    if not count.sum() > 0:
        raise DetectorError("no rows to fit on")
    return ClassMoments(count, total, square)


def column_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, with divisor N, and 1 where the column is
    constant (up to rounding). rows: (N, I) float64, those that are not finite are left out.
    Returns (I,), (I,). Raises DetectorError when none is left."""
    rows = rows[torch.isfinite(rows).all(1)]
    if not len(rows):
        raise DetectorError("no row to fit on has finite scores")
    mean, sd = rows.mean(0), rows.std(0, correction=0)
    return mean, torch.where(sd > 1e-12 * mean.abs(), sd, 1.0)
