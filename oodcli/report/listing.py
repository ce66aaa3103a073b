"""A scores file for a page: the numbers of all rows, the texts of those that the page lists."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oodcli.errors import FileError
from oodcli.files.made import read_made
from oodcli.files.scores import ScoreRow, ScoreRows

LISTED = 100_000
"""Rows that a page lists."""
CELLS = 1_000_000
"""Scores that a page lists: with more than ten detectors it has fewer rows."""
EXPLAINED = 1_000
"""Rows with the highest scores of each detector that keep their explanation."""
LEAST = 12
"""Rows with the lowest scores of each detector that are listed in any case."""
ERRORS = 1_000
"""Unreadable images that are named."""


@dataclass(frozen=True)
class Column:
    """One detector. scores: (R,) of the readable rows. flags: (R,) verdicts, NaN where there is
    none, or None without the column. p_values: (R,), or None. basis: of its verdicts. saw: OOD data
    that it has learnt from. why: row → explanation, of some rows."""

    name: str
    scores: NDArray[np.float64]
    flags: NDArray[np.float64] | None
    p_values: NDArray[np.float64] | None
    basis: str
    saw: str
    why: Mapping[int, str]


class Texts(NamedTuple):
    """The texts of a row. label: index into ``names``, −1 where there is none."""

    path: str
    label: int


@dataclass(frozen=True)
class Listing:
    """R readable rows and some of their texts. unreadable: number of the others; errors: path and
    reason of the first of them. names: of classes. predicted: (R,) index into ``names``. listed:
    row → its texts, in the order of the file. made: metadata of the file, or None."""

    source: str
    columns: Sequence[Column]
    unreadable: int
    errors: Sequence[tuple[str, str]]
    names: Sequence[str]
    predicted: NDArray[np.int64]
    listed: Mapping[int, Texts]
    made: Mapping[str, Any] | None

    @property
    def readable(self) -> int:
        return len(self.predicted)

    @property
    def rows(self) -> int:
        """Readable or not."""
        return self.readable + self.unreadable

    @property
    def complete(self) -> bool:
        """Whether every readable row is listed."""
        return len(self.listed) == self.readable


def read_listing(opened: ScoreRows, detectors: Sequence[str], most: int) -> Listing:
    """Reads a scores file. detectors: those to keep, by default all, with those that have verdicts
    first. most: rows to list; of a longer file those with the highest scores of each detector. What
    is kept in memory of the other rows is numbers. Raises FileError as ``ScoreRows.rows``, and for
    an unknown detector."""
    for name in detectors:
        if name not in opened.detectors:
            raise FileError(
                f"{opened.path}: no column {name!r}: it has {', '.join(opened.detectors)}"
            )
    verdicts_first = sorted(opened.detectors, key=lambda name: name not in opened.verdicts)
    gathered = _Gathered(opened, detectors or verdicts_first, most)
    for row in opened.rows:
        gathered.add(row)
    gathered.prune()
    return Listing(
        str(opened.path),
        gathered.columns(),
        gathered.unreadable,
        gathered.errors,
        list(gathered.names),
        np.array(gathered.predicted, dtype=np.int64),
        gathered.listed,
        read_made(opened.path),
    )


class _Gathered:
    """What is read so far."""

    def __init__(self, opened: ScoreRows, chosen: Sequence[str], most: int) -> None:
        self._opened = opened
        self._chosen = chosen
        self._most = max(1, min(most, CELLS // len(chosen)))
        self._scores, self._flags, self._chances = (
            {name: array("d") for name in chosen if name in known}
            for known in (opened.detectors, opened.verdicts, opened.p_values)
        )
        self._words = {name: opened.words.index(name) for name in opened.words}
        self._told = {
            name: "" for name in opened.words if name.endswith((".basis", ".saw"))
        }  # the same in all rows
        self._why: dict[str, dict[int, str]] = {
            name: {} for name in chosen if f"{name}.why" in self._words
        }
        self.unreadable = 0
        self.errors: list[tuple[str, str]] = []
        self.names: dict[str, int] = {}
        self.predicted = array("q")
        self.listed: dict[int, Texts] = {}

    def add(self, row: ScoreRow) -> None:
        if row.error:
            self.unreadable += 1
            if len(self.errors) < ERRORS:
                self.errors.append((row.path, row.error))
            return
        place = len(self.predicted)
        for columns, names, cells in (
            (self._scores, self._opened.detectors, row.scores),
            (self._flags, self._opened.verdicts, row.verdicts),
            (self._chances, self._opened.p_values, row.p_values),
        ):
            for name, cell in zip(names, cells, strict=True):
                if name in columns:
                    columns[name].append(cell)
        for name, why in self._why.items():
            if text := row.words[self._words[f"{name}.why"]]:
                why[place] = text
        for name in self._told:
            self._told[name] = row.words[self._words[name]] or self._told[name]
        self.predicted.append(self._name(row.predicted))
        self.listed[place] = Texts(row.path, self._name(row.label) if row.label else -1)
        if len(self.listed) > 2 * self._most:
            self.prune()

    def _name(self, text: str) -> int:
        return self.names.setdefault(text, len(self.names))

    def prune(self) -> None:
        """Forgets the texts of rows that the page will not list. The highest of all rows are the
        highest of any part of them that they are in."""
        rows = np.fromiter(self.listed, np.int64, len(self.listed))
        if len(rows) > self._most:
            each = max(1, self._most // len(self._chosen))
            kept: set[int] = set()
            for order in self._ranked(rows).values():
                kept.update(order[:each].tolist(), order[-LEAST:].tolist())
            self.listed = {row: texts for row, texts in self.listed.items() if row in kept}
            rows = np.fromiter(self.listed, np.int64, len(self.listed))
        if any(len(why) > EXPLAINED for why in self._why.values()):
            for name, order in self._ranked(rows).items():
                if name in self._why:
                    kept = set(order[:EXPLAINED].tolist())
                    self._why[name] = {k: why for k, why in self._why[name].items() if k in kept}

    def _ranked(self, rows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Detector → the rows, from the highest score to the lowest."""
        return {
            name: rows[np.argsort(-np.frombuffer(scores)[rows], kind="stable")]
            for name, scores in self._scores.items()
        }

    def columns(self) -> list[Column]:
        return [
            Column(
                name,
                np.array(scores, dtype=np.float64),
                _array(self._flags.get(name)),
                _array(self._chances.get(name)),
                self._told.get(f"{name}.basis", ""),
                self._told.get(f"{name}.saw", ""),
                self._why.get(name, {}),
            )
            for name, scores in self._scores.items()
        ]


def _array(column: array[float] | None) -> NDArray[np.float64] | None:
    return None if column is None else np.array(column, dtype=np.float64)
