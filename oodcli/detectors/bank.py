"""Rows that a detector compares with, in memory or in their file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IN_MEMORY_BYTES = 1 << 28
"""A larger bank stays where it is, and is read a block at a time."""


@dataclass(frozen=True)
class Bank:
    """(N, D) float32. blocks: all rows in turn, as often as wanted."""

    shape: tuple[int, int]
    blocks: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, rows: Tensor) -> Bank:
        """A bank in memory."""
        return cls((rows.shape[0], rows.shape[1]), lambda: [rows])

    @property
    def nbytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1]

    def settled(self, device: torch.device | None = None) -> Bank:
        """In memory if it is small. device: where its blocks are, the processor if not given."""
        if self.nbytes > IN_MEMORY_BYTES:
            return self
        none = torch.zeros(0, self.shape[1], device=device)
        return Bank.of(torch.cat([none, *self.blocks()]))

    def to(self, device: torch.device) -> Bank:
        """The same rows on another device; a large bank is moved as it is read."""
        return Bank(self.shape, lambda: (b.to(device) for b in self.blocks())).settled(device)


def moved(value: Any, device: torch.device) -> Any:
    """What a field of a detector holds, its tensors on another device: a tensor, a bank, another
    detector or a mapping of tensors; anything else is a setting and stays as it is."""
    if isinstance(value, Mapping):
        return {key: tensor.to(device) for key, tensor in value.items()}
    return value.to(device) if hasattr(value, "to") else value
