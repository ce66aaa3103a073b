"""Parts of a job that several processes share, or that are done one after another."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from oodcli.errors import OodcliError


@dataclass(frozen=True)
class Share:
    """Part ``number`` of ``of`` parts, counted from 1."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str | None) -> Self:
        """``3/64``; None is the whole. Raises OodcliError for anything else."""
        if text is None:
            return cls()
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise OodcliError(f"--shard {text}: expected a number and how many, such as 3/64")
        return cls(int(found[1]), int(found[2]))

    @property
    def whole(self) -> bool:
        return self.of == 1

    def part(self, count: int, unit: int = 1) -> range:
        """Which of ``count`` things are this part's. All parts together are all of them, in order,
        and their bounds are multiples of ``unit``: what is done a batch at a time is done in the
        same batches, however many parts there are."""
        units = -(-count // unit)
        start = units * (self.number - 1) // self.of
        stop = units * self.number // self.of
        return range(min(start * unit, count), min(stop * unit, count))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


WHOLE = Share()


@dataclass(frozen=True)
class Shard:
    """What a file says that is one of several: its number, how many there are, and that its rows
    are [start, stop) of ``rows``. listing: SHA-256 of what the whole is made of; shards of other
    images have another."""

    number: int
    of: int
    start: int
    stop: int
    rows: int
    listing: str

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Raises ValueError when that is no shard."""
        if not isinstance(found, Mapping) or found.keys() != {each.name for each in fields(cls)}:
            raise ValueError("shard is not what it should be")
        shard = cls(**found)
        numbers = (shard.number, shard.of, shard.start, shard.stop, shard.rows)
        if not isinstance(shard.listing, str) or any(type(each) is not int for each in numbers):
            raise ValueError("shard is not what it should be")
        if not (1 <= shard.number <= shard.of and 0 <= shard.start <= shard.stop <= shard.rows):
            raise ValueError(f"shard {shard} contradicts itself")
        return shard

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"
