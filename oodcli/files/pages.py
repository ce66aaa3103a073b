"""How large the pages of a parquet file become. The library believes what the head of each page
says (a struct in thrift's compact protocol) and not what the file says of its columns elsewhere, so
the heads are read before it is asked for a page."""

from __future__ import annotations

from typing import IO, Any

HEAD_BYTES = 1 << 15
"""Of the head of a page, at most: it may hold four texts of 4 kB."""
DEEPEST = 16
MOST_PAGES = 1 << 16
"""Of a column chunk."""

_UNPACKED, _PACKED = 2, 3
"""Numbers of the fields of a head: bytes of a page, unpacked and as it lies in the file."""
_WHOLE, _STRUCT = (4, 5, 6), 12
"""Kinds of fields: whole numbers, and more fields."""


def largest_page(stream: IO[bytes], chunk: Any) -> int:
    """Bytes to which the largest page of a column chunk unpacks. chunk: its metadata, of pyarrow.
    Raises ValueError where the head of a page is damaged."""
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    stop = start + chunk.total_compressed_size
    largest = pages = 0
    while start < stop:
        stream.seek(start)
        head = _Head(stream.read(HEAD_BYTES))
        sizes = head.fields()
        packed, unpacked = sizes.get(_PACKED, -1), sizes.get(_UNPACKED, -1)
        pages += 1
        if packed < 0 or unpacked < 0 or pages > MOST_PAGES:
            raise ValueError(f"the head of the page at byte {start} is damaged")
        largest = max(largest, unpacked)
        start += head.place + packed
    return largest


class _Head:
    """Fields from the bytes at ``place`` on, which moves along. Everything raises ValueError where
    they end within one."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def fields(self, depth: int = 0) -> dict[int, int]:
        """Numbers and values of the fields of a struct that are whole numbers; the others are
        passed over."""
        found: dict[int, int] = {}
        number = 0
        while head := self._byte():
            step, kind = divmod(head, 16)
            number = number + step if step else self._whole()
            if kind in _WHOLE:
                found[number] = self._whole()
            else:
                self._pass(kind, depth, inside=False)
        return found

    def _pass(self, kind: int, depth: int, *, inside: bool) -> None:
        """inside: of a list, where a truth value has a byte of its own."""
        if depth > DEEPEST:
            raise ValueError("the head of a page is damaged")
        if kind in (1, 2):
            self.place += inside
        elif kind == 3:
            self.place += 1
        elif kind in _WHOLE:
            self._natural()
        elif kind == 7:
            self.place += 8
        elif kind == 8:
            length = self._natural()  # which moves the place along, too
            self.place += length
        elif kind in (9, 10):
            count, kind = divmod(self._byte(), 16)
            for _ in range(self._natural() if count == 15 else count):
                self._pass(kind, depth + 1, inside=True)
                if self.place > len(self.data):
                    break
        elif kind == _STRUCT:
            self.fields(depth + 1)
        else:  # a map, which no head has
            raise ValueError("the head of a page is damaged")

    def _byte(self) -> int:
        if self.place >= len(self.data):
            raise ValueError("the head of a page is cut off, or too long")
        self.place += 1
        return self.data[self.place - 1]

    def _natural(self) -> int:
        found = shift = 0
        while (byte := self._byte()) >= 128:
            found |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("the head of a page is damaged")
        return found | byte << shift

    def _whole(self) -> int:
        found = self._natural()
        return found >> 1 ^ -(found & 1)
