"""Percentiles of more numbers than fit into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor


def percentile_of(blocks: Callable[[], Iterable[Tensor]], percent: float) -> float:
    """The percentile of all entries of some float32 tensors, exactly and in constant memory:
    between neighbouring ranks it is interpolated, as numpy does. blocks: called for two passes."""
    return percentiles_of(blocks, [percent])[0]


def percentiles_of(
    blocks: Callable[[], Iterable[Tensor]], percents: Sequence[float]
) -> list[float]:
    """The same of several percentiles, in the same two passes."""
    # Read as integers, the bits of float32 are in the order of the numbers, those of negative
    # ones reversed. The first pass counts their upper halves, the second the lower ones.
    upper = torch.zeros(1 << 16, dtype=torch.int64)
    for bits in _some_at_a_time(blocks()):
        upper += torch.bincount(_upper_half(bits), minlength=1 << 16)
    positions = [(int(upper.sum()) - 1) * percent / 100 for percent in percents]
    ranks = {end(each) for each in positions for end in (math.floor, math.ceil)}
    places = {rank: _place(upper, rank) for rank in ranks}
    lower = {half: torch.zeros(1 << 16, dtype=torch.int64) for half, _ in places.values()}
    for bits in _some_at_a_time(blocks()):
        halves = _upper_half(bits)
        for half, counts in lower.items():
            counts += torch.bincount(bits[halves == half] & 0xFFFF, minlength=1 << 16)

    def entry(rank: int) -> float:
        half, left = places[rank]
        low = _place(lower[half], left)[0]
        return float(_from_ordered_bits(torch.tensor((half << 16) + low)))

    found = []
    for each in positions:
        low, high = entry(math.floor(each)), entry(math.ceil(each))
        found.append(low + (high - low) * (each % 1))
    return found


AT_ONCE = 1 << 18
"""Entries that are counted at once: few enough for the processor's cache."""

STRIP = 64
"""Columns that are counted at once, for the same reason."""


def _some_at_a_time(blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """``_in_order`` of some entries at a time, (n,)."""
    for entries in blocks:
        for some in torch.split(entries.flatten(), AT_ONCE):
            yield _in_order(some)


def _upper_half(bits: Tensor) -> Tensor:
    """The upper 16 of 32 bits, 0 … 2¹⁶ − 1. bits: (n,) int32."""
    return (bits >> 16).bitwise_and_(0xFFFF)


DIGITS = (11, 11, 10)
"""Bits that a pass over columns counts by; all of them are those of a float32."""


def percentiles_by_column(
    blocks: Callable[[], Iterable[Tensor]], percents: Sequence[float]
) -> Tensor:
    """Percentiles of each column of some float32 rows, exactly, interpolated as numpy does. blocks:
    (N, D) each, called for three passes. P percentiles take 32·P·D·2¹¹ bytes at most. Returns
    (P, D) float64."""
    # Each pass counts by a digit the entries that agree with a rank's in the digits before.
    left = 32 - DIGITS[0]
    rows, counts = _counted(blocks(), None, left, DIGITS[0])
    positions = [(rows - 1) * percent / 100 for percent in percents]
    ranks = sorted({end(each) for each in positions for end in (math.floor, math.ceil)})
    counts = counts.expand(len(ranks), -1, -1)
    rest = torch.tensor(ranks)[:, None].expand(counts.shape[:2])  # (ranks, D)
    found, rest = _next_digit(counts, torch.zeros_like(rest), rest)
    for width in DIGITS[1:]:
        left -= width
        counts = _counted(blocks(), found, left, width)[1]
        found, rest = _next_digit(counts, found, rest)
    values = _from_ordered_bits(found)
    return torch.stack([_between(values, ranks, position) for position in positions])


def _counted(
    blocks: Iterable[Tensor], found: Tensor | None, left: int, width: int
) -> tuple[int, Tensor]:
    """How many rows there are, and for each rank and column how many entries have each value of
    the next digit, of those whose digits before are the rank's. found: those, (ranks, D), None for
    the first digit; left: bits after this digit. Returns (ranks or 1, D, 2^width)."""
    bins, rows = 1 << width, 0
    counts: Tensor | None = None
    which = torch.tensor([0])
    if found is not None:  # neighbours mostly agree
        found, which = torch.unique(found, dim=0, return_inverse=True)
    for block in blocks:
        rows += len(block)
        if counts is None:
            kinds = 1 if found is None else len(found)
            counts = torch.zeros(kinds, block.shape[1], bins, dtype=torch.int64)
        for first in range(0, block.shape[1], STRIP):
            strip = slice(first, first + STRIP)
            bits = _in_order(block[:, strip].contiguous())
            columns = bits.shape[1]
            starts = torch.arange(columns, dtype=torch.int32) * bins
            place = (bits >> left).bitwise_and_(bins - 1).add_(starts)
            groups = [place.flatten()]
            if found is not None:
                before = (bits >> left + width).bitwise_and_((1 << 32 - left - width) - 1)
                groups = [place[before == each] for each in found[:, strip]]
            for kind, each in enumerate(groups):
                new = torch.bincount(each, minlength=columns * bins)
                counts[kind, strip] += new.view(columns, bins)
    if counts is None:
        raise ValueError("no rows")
    return rows, counts[which]


def _next_digit(counts: Tensor, found: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """The digits found with one more, and the rank among the entries that agree in all of them.
    counts: (ranks, D, bins); found, rest: (ranks, D)."""
    sums = counts.cumsum(2)
    digit = (sums <= rest[..., None]).sum(2)
    before = sums.gather(2, (digit[..., None] - 1).clamp_min(0))[..., 0]
    return found * counts.shape[2] + digit, rest - torch.where(digit > 0, before, 0)


def _between(values: Tensor, ranks: Sequence[int], position: float) -> Tensor:
    """(D,) the entries at a position between two ranks. values: (ranks, D)."""
    low, high = (values[ranks.index(end(position))] for end in (math.floor, math.ceil))
    return low + (high - low) * (position % 1)


def _place(counts: Tensor, rank: int) -> tuple[int, int]:
    """In which bin the entry of this rank is, from 0, and its rank among those of the bin."""
    bin_ = int(torch.searchsorted(counts.cumsum(0), rank, right=True))
    return bin_, rank - int(counts[:bin_].sum())


def _in_order(entries: Tensor) -> Tensor:
    """The bits of int32 which, read without a sign, are integers in the order of the numbers.
    entries: any shape. Returns the same shape."""
    bits = entries.float().cpu().view(torch.int32)
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).bitwise_xor_(-(1 << 31))


def _from_ordered_bits(ordered: Tensor) -> Tensor:
    """float64, of the same shape."""
    bits = torch.where(ordered >= 1 << 31, ordered - (1 << 31), -1 - ordered)
    return bits.to(torch.int32).view(torch.float32).double()
