"""What the HDF5 library goes round for ever on (as of 2.0), where Python's signals do not reach it:
heaps in which an entry leads back to itself. They are looked for in the bytes of a file, before the
library reads them."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np

TEXTS = b"GCOL\1"
"""Signature and version of a heap of texts: those of attributes, paths and errors."""

NAMES = b"HEAP\0"
"""The same of a heap of names in a group, which is what older versions of HDF5 write."""

BLOCK_BYTES = 1 << 20

_TEXTS_HEAD = struct.Struct("<8xQ")
"""Signature and version; length with this head."""

_TEXT = struct.Struct("<HHxxxxQ")
"""Number, 0 for the room that is left; references; length, with this head for number 0 only."""

_NAMES_HEAD = struct.Struct("<8xQQQ")
"""Signature and version; length of the names; the first gap between them; where they are."""

_GAP = struct.Struct("<Q8x")
"""Where the next gap is, 1 for none; length."""


def check_heaps(file: IO[bytes], base: int = 0) -> None:
    """Raises ValueError where an entry of a heap in an HDF5 file leads back to itself. base: what
    addresses in the file count from. Heaps can be anywhere, so all of it is read, in blocks. Takes
    no more memory, and no more steps, than the file has bytes."""
    left = size = file.seek(0, os.SEEK_END)

    def read(start: int, length: int) -> bytes:
        """Nothing, where that is not all in the file, as HDF5 does not take it then."""
        nonlocal left
        if start + length > size:
            return b""
        left -= length
        if left < 0:
            raise ValueError("its heaps have more bytes than the file")
        file.seek(start)
        return file.read(length)

    for words, start in _places(file, (TEXTS, NAMES)):
        if words == TEXTS:
            _check_texts(start, read)
        else:
            _check_names(start, base, read)


Read = Callable[[int, int], bytes]


def _check_texts(start: int, read: Read) -> None:
    head = read(start, _TEXTS_HEAD.size)
    if not head:
        return
    texts = read(start + len(head), max(0, _TEXTS_HEAD.unpack(head)[0] - len(head)))
    place = 0
    while place + _TEXT.size <= len(texts):
        number, _, length = _TEXT.unpack_from(texts, place)
        step = length if number == 0 else _TEXT.size + (length + 7) // 8 * 8
        if not 0 < step <= len(texts) - place:
            raise ValueError(f"a text in the heap at byte {start} has {length} bytes")
        place += step


def _check_names(start: int, base: int, read: Read) -> None:
    head = read(start, _NAMES_HEAD.size)
    if not head:
        return
    length, gap, address = _NAMES_HEAD.unpack(head)
    names = read(base + address, length)
    for _ in range(len(names) // _GAP.size + 1):  # more do not fit in
        if gap == 1 or gap + _GAP.size > len(names):
            return
        (gap,) = _GAP.unpack_from(names, gap)
    raise ValueError(f"the gaps in the heap at byte {start} have no end")


def _places(file: IO[bytes], signatures: tuple[bytes, ...]) -> Iterator[tuple[bytes, int]]:
    """Which of the signatures, of five bytes each, is where in a file. Four of them at a time are
    compared, which takes half as long as ``bytes.find``."""
    codes = [(words, int.from_bytes(words[:4], "little")) for words in signatures]
    start = 0
    while len(block := _block(file, start)) >= 5:
        for shift in range(4):
            numbers = np.frombuffer(block, "<u4", (len(block) - shift) // 4, shift)
            for words, code in codes:
                for at in shift + 4 * np.flatnonzero(numbers == code):
                    if block[at : at + len(words)] == words:
                        yield words, start + int(at)
        start += len(block) - 4


def _block(file: IO[bytes], start: int) -> bytes:
    file.seek(start)
    return file.read(BLOCK_BYTES)
