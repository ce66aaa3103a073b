"""Rows in blocks: what ``fit`` gets, and how to go through many rows of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from oodcli.errors import DetectorError, first_line
from oodcli.features import Features
from oodcli.out_of_memory import halving, ran_out

Blocks = Features | Iterable[Features]
"""Rows to fit on: whole, or in blocks that can be iterated more than once."""


def in_blocks(train: Blocks) -> Iterable[Features]:
    """Rows to fit on as blocks, without the empty ones."""
    return (block for block in ([train] if isinstance(train, Features) else train) if len(block))


ROWS_IN_CACHE = 256
"""For each thread: rows of which a few float64 copies stay in a core's cache."""


def by_rows(compute: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """``compute(*rows)`` for rows that know nothing of each other, some at a time: float64 copies
    of all would go through the memory at each of its steps, those of a few stay in the processor's
    cache. rows: (N, …) each. Returns (N, …)."""
    if rows[0].device.type != "cpu":
        found: Tensor = compute(*rows)
        return found
    some = ROWS_IN_CACHE * torch.get_num_threads()
    parts = zip(*(torch.split(each, some) for each in rows), strict=True)
    return torch.cat([compute(*part) for part in parts])


def finite_rows(train: Blocks, needs: Iterable[str], who: str) -> Iterator[Features]:
    """Rows to fit on as blocks, without those in which something of ``needs`` is not finite.
    Raises DetectorError when a record is missing, or at the end when there was no row."""
    count = 0
    for block in in_blocks(train):
        block.require(needs, who)
        finite = block.finite(needs)
        kept = block if finite.all() else block.select(finite)
        count += len(kept)
        if len(kept):
            yield kept
    if not count:
        raise DetectorError(f"{who}: no rows to fit on")


def drawn_of(count: int, most: int, seed: int) -> Tensor:
    """(count,) bool: which rows are drawn at random, ``most`` of them without replacement, or all
    if there are no more."""
    drawn = torch.ones(count, dtype=torch.bool)
    if count > most:
        generator = torch.Generator().manual_seed(seed)
        drawn[torch.randperm(count, generator=generator)[most:]] = False
    return drawn


def drawn_rows(blocks: Callable[[], Iterable[Tensor]], most: int, seed: int) -> Tensor:
    """All rows if there are no more than ``most``, else so many of them, drawn at random without
    replacement, in their order. blocks: (N, D) each, called for two passes. Returns (M, D)."""
    drawn = drawn_of(sum(len(rows) for rows in blocks()), most, seed)
    parts, start = [], 0
    for rows in blocks():
        parts.append(rows[drawn[start : start + len(rows)]])
        start += len(rows)
    return torch.cat(parts)


def drawn_blocks(train: Blocks, needs: Iterable[str], who: str, most: int, seed: int) -> Blocks:
    """The same for rows to fit on, of those in which ``needs`` is finite: in blocks, so that the
    drawn rows need not fit into memory. One pass, and one for each time that the blocks are read.
    Raises DetectorError as ``finite_rows``."""
    count = sum(len(block) for block in finite_rows(train, needs, who))
    if count <= most:
        return train
    return _Drawn(train, frozenset(needs), who, drawn_of(count, most, seed))


@dataclass(frozen=True)
class _Drawn:
    """train: rows of which ``drawn``, (N,) bool, are wanted among the N finite ones."""

    train: Blocks
    needs: frozenset[str]
    who: str
    drawn: Tensor

    def __iter__(self) -> Iterator[Features]:
        start = 0
        for block in finite_rows(self.train, self.needs, self.who):
            yield block.select(self.drawn[start : start + len(block)])
            start += len(block)


def score_in_halves(score: Callable[[Features], Tensor], test: Features, who: str) -> Tensor:
    """``score(test)``, in smaller blocks where memory runs out, which is a GPU's. Raises
    DetectorError when one row does not fit, or when a fitted detector cannot score these rows."""

    def some(start: int, size: int) -> Tensor:
        block = test if size == len(test) else test.select(slice(start, start + size))
        try:
            scores = score(block)
            if scores.shape != (size,):
                raise ValueError(f"scores of shape {tuple(scores.shape)} for {size} rows")
            return scores
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            if ran_out(error):
                raise
            raise DetectorError(
                f"the fitted {who} does not match these features ({first_line(error)}): fit it "
                "again on features of this network"
            ) from error

    def too_large(error: BaseException) -> DetectorError:
        return DetectorError(
            f"out of memory with a single image scored by {who} ({first_line(error)}): try "
            "--device cpu"
        )

    device = next(iter(test.rows().values())).device
    parts: list[Tensor] = []
    start, most = 0, len(test)
    while start < len(test):
        most = min(most, len(test) - start)
        # At every block the same, so not for the user to read.
        part, most = halving(partial(some, start), most, device, too_large, level=logging.DEBUG)
        parts.append(part)
        start += most
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def largest_in_words(names: Sequence[str], terms: Tensor) -> list[str]:
    """The three largest terms of each row. terms: (N, len(names))."""
    top = terms.topk(min(3, len(names)), dim=1)
    return [
        "; ".join(f"{names[i]} ({value:+.2g})" for i, value in zip(which, values, strict=True))
        for which, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
