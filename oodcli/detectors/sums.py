"""Sums over rows: of products in half the time, and of all rows for a fit without some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from oodcli.detectors.blocks import Blocks, finite_rows, in_blocks
from oodcli.errors import DetectorError
from oodcli.features import Features

TILE = 256
"""Columns of a tile of a matrix of which only the tiles on and above the diagonal are summed."""

Sums = Mapping[str, Tensor]
"""Sums over rows, by name."""


def add_square(square: Tensor, rows: Tensor) -> None:
    """Adds rowsᵀ rows to the tiles on and above the diagonal. square: (D, D); rows: (N, D)."""
    for start in range(0, len(square), TILE):
        stop = start + TILE
        square[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def whole_square(square: Tensor) -> Tensor:
    """What ``add_square`` has summed, with the tiles below the diagonal. square: (D, D)."""
    if len(square) <= TILE:  # there are none
        return square
    return square.triu() + square.triu(1).T


@dataclass(frozen=True)
class Whole:
    """All rows to fit on. sums: over them, by what needs them."""

    rows: Blocks
    sums: dict[str, Sums] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Features]:
        return iter(in_blocks(self.rows))


@dataclass(frozen=True)
class Without:
    """The same rows but for those that are held out."""

    whole: Whole
    kept: Iterable[Features]
    held: Iterable[Features]

    def __iter__(self) -> Iterator[Features]:
        return iter(self.kept)


def summed(train: Blocks, name: str, add: Callable[[Blocks], Sums]) -> Sums:
    """``add(train)``. Without the held-out rows, it is the sums over all rows, where they are
    known, minus those over the held-out ones, which are few. name: of the sums, unlike all others
    of the same fit."""
    if isinstance(train, Without) and name in train.whole.sums:
        known = train.whole.sums[name]
        try:
            less = add(train.held)
        except DetectorError:  # none of them is finite
            return known
        return {key: total - less[key] for key, total in known.items()}
    found = add(train)
    if isinstance(train, Whole):
        train.sums[name] = found
    return found


def moments(
    train: Blocks, needs: frozenset[str], who: str, rows: Callable[[Features], Tensor]
) -> Sums:
    """count: N, (); total: Σ x, (D,); square: Σ x xᵀ, (D, D), of all rows x. One pass. rows: a
    block → (N, D) float64. Raises DetectorError without a row."""

    def add(train: Blocks) -> Sums:
        count, total, square = 0, torch.zeros(0), torch.zeros(0)
        for block in finite_rows(train, needs, who):
            x = rows(block)
            if not count:
                total, square = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
            count += len(x)
            total += x.sum(0)
            add_square(square, x)
        number = torch.tensor(count, dtype=torch.float64)
        return {"count": number, "total": total, "square": whole_square(square)}

    return summed(train, who, add)
