"""The interface of all sources of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:  # torch is not imported here, as processes that decode images do without it
    from torch import Tensor

    from oodcli.images.labels import Labels
    from oodcli.networks.preprocessing import Preprocessing


@dataclass(frozen=True)
class Batch:
    """N rows in input order, of which M could be read.

    paths: N, printable as UTF-8. labels: (N,) int64, -1 = unknown. errors: N, None where the row
    could be read. images: (M, C, H, W) float32, in any order of memory, the network's input, of the
    readable rows. dim: as in Rows.
    """

    paths: tuple[str, ...]
    labels: Tensor
    errors: tuple[str | None, ...]
    images: Tensor
    dim: tuple[float, ...] = ()


class Rows(NamedTuple):
    """Some decoded rows. labels: (n,) int64. errors: n. pixels of the m readable ones: (m, H, W, C)
    uint8, or (m, C, H, W) float32 in [0, 1]. dim: the highest value of each image of more than 8
    bits that is nearly black."""

    labels: Tensor
    errors: list[str | None]
    pixels: Tensor
    dim: tuple[float, ...] = ()


Decode: TypeAlias = "Callable[[Preprocessing], Rows]"
"""The second half of reading some rows: decoding and resizing, in any thread. Where it is an
``Encoded``, also in other processes."""

Fetch: TypeAlias = Callable[[int, int], "Decode"]
"""The first half of reading the rows [start, stop): called in input order by one thread, so that
archives and files are read front to back without locks."""


class ImageSource(ABC):
    """Images in a fixed order. Files are open only inside ``reading``.

    name: what the user gave. labelled: whether any label is known. note: what the user should know
    about the labels or the order; order_note is the part of it that is not about labels. grain:
    rows that are fetched and decoded as one task. known: labels of the rows in all readings, None
    where there are none; where ``labels_are_of_rows`` is false, of a dataset's own classes.
    left_out: suffix → files that are no rows, because they are no images by their suffix.
    """

    name: str
    labelled: bool = False
    note: str | None = None
    grain: int = 4
    known: Labels | None = None
    labels_are_of_rows: bool = True
    order_note: str | None = None
    left_out: Mapping[str, int] = MappingProxyType({})

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def paths(self, start: int, stop: int) -> list[str]:
        """Where the images of the rows [start, stop) came from, printable as UTF-8."""

    def sizes(self, start: int, stop: int) -> list[int]:
        """Bytes of the files of the rows [start, stop), 0 where there is no such file; empty where
        a row has no file of its own."""
        return []

    def weight(self, start: int, stop: int) -> int:
        """Bytes in memory between fetching and decoding these rows; 0 if few."""
        return 0

    @abstractmethod
    def reading(self) -> AbstractContextManager[Fetch]:
        """Open the files while rows are read."""

    def read_as(self, labels: Labels) -> None:
        """Replace the labels by another reading, or by other labels of the same number."""
        self.known = labels
        self.labelled = bool((labels.values >= 0).any())
        self.note = "; ".join(note for note in (labels.note, self.order_note) if note) or None
