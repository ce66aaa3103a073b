"""Percentiles of more numbers than fit into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def percentile_of(blocks: Callable[[], Iterable[Tensor]], percent: float) -> float:
    """The percentile of all entries of some float32 tensors, exactly and in constant memory:
    between neighbouring ranks it is interpolated, as numpy does. blocks: called for two passes."""
    # Read as integers, the bits of float32 are in the order of the numbers, those of negative
    # ones reversed. The first pass counts their upper halves, the second the lower ones.
    upper = torch.zeros(1 << 16, dtype=torch.int64)
    for entries in blocks():
        upper += torch.bincount(_ordered_bits(entries) >> 16, minlength=1 << 16).cpu()
    position = (int(upper.sum()) - 1) * percent / 100
    places = [_place(upper, rank) for rank in (math.floor(position), math.ceil(position))]
    lower = {half: torch.zeros(1 << 16, dtype=torch.int64) for half, _ in places}
    for entries in blocks():
        bits = _ordered_bits(entries)
        for half, counts in lower.items():
            inside = bits[bits >> 16 == half] & 0xFFFF
            counts += torch.bincount(inside, minlength=1 << 16).cpu()
    low, high = (
        _from_ordered_bits((half << 16) + _place(lower[half], rank)[0]) for half, rank in places
    )
    return low + (high - low) * (position % 1)


def _place(counts: Tensor, rank: int) -> tuple[int, int]:
    """In which bin the entry of this rank is, from 0, and its rank among those of the bin."""
    bin_ = int(torch.searchsorted(counts.cumsum(0), rank, right=True))
    return bin_, rank - int(counts[:bin_].sum())


def _ordered_bits(entries: Tensor) -> Tensor:
    """Integers in 0 … 2³² − 1 in the order of the numbers. entries: any shape. Returns (n,)."""
    bits = entries.float().flatten().view(torch.int32).long()
    return torch.where(bits < 0, -1 - bits, bits + (1 << 31))


def _from_ordered_bits(ordered: int) -> float:
    bits = ordered - (1 << 31) if ordered >= 1 << 31 else -1 - ordered
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
