"""Many numbers as text at once: the bytes of ``"%.9g" % number``, in a third of the time.

A number between 0.0001 and 10⁹ is multiplied by an exact power of ten, so that its nine digits are
those of a whole number. The product is off by less than 2⁻²² of the last digit, so rounding it is
right unless it lies that near to a half. What does, and every other number, is left to Python.

A cell is 16 bytes, held as two whole numbers (low, high): a sign, at most 14 characters, and what
separates it from the next cell. Bytes that are zero go in the end.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.uint64]

_CELLS = 1 << 14
"""Numbers that are worked on at a time: they stay in the processor's cache."""
_EXPONENTS = range(-4, 9)
"""Of ten: those of numbers that are written without one. The tables that follow have an entry for
each, those below zero last, as Python counts them."""
_IN_ORDER = sorted(_EXPONENTS, key=lambda exponent: exponent % len(_EXPONENTS))


def _words(numbers: list[int]) -> Words:
    return np.array(numbers, np.uint64)


def _keep(count: int) -> int:
    """The first bytes of a word."""
    return (1 << 8 * count) - 1


def _around(exponent: int) -> int:
    """What stands among the digits, as 16 bytes: a point, before it zero where it comes first."""
    before = "0." + "0" * (-exponent - 1) if exponent < 0 else "\0" * (exponent + 1) + "."
    return int.from_bytes(f"\0{before if exponent < 8 else ''}".encode(), "little")


_POWERS = np.array([10.0 ** (8 - exponent) for exponent in _IN_ORDER])
_BEFORE = _words([_keep(min(8, max(0, exponent + 1))) for exponent in _IN_ORDER])
"""Which of the first eight digits come before the point."""
_AFTER = _words([8 * (2 - min(0, exponent)) for exponent in _IN_ORDER])
"""Bits by which the other ones move."""
_NINTH = _words([8 * (2 - min(0, exponent)) if exponent < 8 else 8 for exponent in _IN_ORDER])
"""Bits by which the ninth digit moves in the high word."""
_LOW = _words([_around(exponent) & _keep(8) for exponent in _IN_ORDER])
_HIGH = _words([_around(exponent) >> 64 for exponent in _IN_ORDER])
_KEEP = _words([_keep(count) for count in range(9)])
_TRIPLES = _words([int.from_bytes(b"%03d" % number, "little") for number in range(1000)])
_BYTE, _THREE, _SIX, _SEVEN = (np.uint64(8 * count) for count in (1, 3, 6, 7))


def lines(table: NDArray[np.float64]) -> list[str]:
    """table: (N, C), C > 0. N texts, each the cells of a row with commas between them; a cell that
    is NaN is empty."""
    rows = max(1, _CELLS // table.shape[1])
    found: list[str] = []
    for start in range(0, len(table), rows):
        found += _some(table[start : start + rows])
    return found


def _some(table: NDArray[np.float64]) -> list[str]:
    numbers = table.ravel()
    size = np.abs(numbers)
    plain = (size >= 1e-4) & (size < 1e9)
    np.copyto(size, 1.0, where=~plain)
    exponent = np.floor(np.log10(size)).astype(np.intp)
    scaled = size * _POWERS[exponent]
    whole = np.rint(scaled)
    plain &= (np.abs(scaled - whole) < 0.5 - 1e-6) & (whole >= 1e8) & (whole < 1e9)
    np.copyto(whole, 1e8, where=~plain)
    low, high = _digits(whole.astype(np.uint32), exponent)
    low |= np.where(numbers < 0, np.uint64(ord("-")), np.uint64(0))
    odd = np.flatnonzero(~plain)
    if len(odd):
        words = [b"" if number != number else b"%.9g" % number for number in numbers[odd].tolist()]
        if max(map(len, words)) > 15:  # as -1.23456789e-100
            return [_in_python(row) for row in table.tolist()]
        low[odd], high[odd] = np.array(words, "S16").view("<u8").reshape(-1, 2).T
    last = np.full(table.shape[1], ord(","), np.uint64)
    last[-1] = ord("\n")
    high.reshape(table.shape)[:] |= last << _SEVEN
    text = np.stack([low, high], axis=1).astype("<u8", copy=False).tobytes()
    return text.translate(None, b"\0").decode("ascii").splitlines()


def _in_python(row: list[float]) -> str:
    return ",".join("" if number != number else f"{number:.9g}" for number in row)


def _digits(whole: NDArray[np.uint32], exponent: NDArray[np.intp]) -> tuple[Words, Words]:
    """Low and high words without sign and separator. whole: the nine digits; exponent: of the
    first of them."""
    thousands = whole // 1000
    millions = thousands // 1000
    last = _TRIPLES[whole - 1000 * thousands]
    eight = _TRIPLES[millions] | _TRIPLES[thousands - 1000 * millions] << _THREE | last << _SIX
    before = eight & _BEFORE[exponent]
    eight ^= before
    shift = _AFTER[exponent]
    low = _LOW[exponent] | before << _BYTE | eight << shift
    high = _HIGH[exponent] | before >> _SEVEN | eight >> (np.uint64(64) - shift)
    high |= last >> np.uint64(16) << _NINTH[exponent]
    rows = np.flatnonzero(whole % 10 == 0)
    if len(rows):
        zeros = sum((whole[rows] % 10**count == 0).astype(np.intp) for count in range(1, 9))
        some = exponent[rows]
        gone = np.minimum(zeros, 8 - some)  # only zeros behind the point
        length = np.where(some < 0, 11 - some, np.where(some < 8, 11, 10)) - gone
        length -= (gone == 8 - some) & (some >= 0) & (some < 8)  # and the point itself
        low[rows] &= _KEEP[np.minimum(length, 8)]
        high[rows] &= _KEEP[np.maximum(length - 8, 0)]
    return low, high
