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


def predicted_class(block: Features) -> Tensor:
    """(N,) the class with the largest logit, the first on a tie."""
    return recorded(block.logits).argmax(1)


def mean_of_rows(rows: Iterable[Tensor]) -> Tensor:
    """(D,) float64: the mean of all rows of some blocks (N, D) of finite rows, at least one."""
    count, total = 0, torch.zeros((), dtype=torch.float64)
    for block in rows:
        count += len(block)
        total = total + block.double().sum(0)
    return total / count


def class_means(
    blocks: Iterable[Features],
    rows: Callable[[Features], Tensor],
    label: Callable[[Features], Tensor] = class_of,
) -> tuple[Tensor, Tensor]:
    """Rows of each class and their mean: (K,) and (K, C) float64, zeros for a class without rows.
    rows: (N, C) finite rows of a block. label: (N,) the class of each; −1 leaves the row out."""
    count = total = torch.zeros(0, dtype=torch.float64)
    for block in blocks:
        classes, values, of = recorded(block.logits).shape[1], rows(block).double(), label(block)
        if (of < 0).any():
            values, of = values[of >= 0], of[of >= 0]
        if not len(count):
            count = values.new_zeros(classes)
            total = values.new_zeros(classes, values.shape[1])
        count = count + torch.bincount(of, minlength=classes)
        total.index_add_(0, of, values)
    return count, total / count.clamp_min(1)[:, None]


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

    @property
    def of_all(self) -> ClassMoments:
        """The same sums with all rows in one class: K = 1."""
        return ClassMoments(
            self.count.sum(0, keepdim=True),
            {name: total.sum(0, keepdim=True) for name, total in self.total.items()},
            {name: square.sum(0, keepdim=True) for name, square in self.square.items()},
        )

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
