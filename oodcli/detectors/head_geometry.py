"""What fdbd, fdbd-norm and ora share: how far an embedding is from the boundaries between the
predicted class and the others. z_k − z_c is 0 on a boundary, and w_k − w_c is normal to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from oodcli.features import Features, recorded

SAME = 1e-12
"""Weights whose squared difference is less than this share of their squared lengths are the same:
there is no boundary between their classes."""


class Boundaries(NamedTuple):
    """Of the predicted class k and each class c. predicted: k, (N,). gap: z_k − z_c, (N, K)
    float64, never negative. square: ‖w_k − w_c‖², (N, K) float64, infinite where there is no
    boundary: for c = k, and where both have the same weights."""

    predicted: Tensor
    gap: Tensor
    square: Tensor

    @property
    def number(self) -> Tensor:
        """(N,) float64: how many boundaries there are; 1 where there is none, to divide by."""
        return torch.isfinite(self.square).sum(1).clamp_min(1).double()


def boundaries(test: Features) -> Boundaries:
    """Of a block. No (N, K, D) or (K, K, D) is made: ‖w_k − w_c‖² = ‖w_k‖² + ‖w_c‖² − 2 w_k·w_c,
    for the classes that are predicted in the block."""
    z, w = recorded(test.logits).double(), recorded(test.head).double.weight
    k = z.argmax(1)
    used, which = torch.unique(k, return_inverse=True)
    length = w.square().sum(1)  # (K,)
    both = length[used, None] + length
    square = both - 2 * (w[used] @ w.T)  # (C, K), C the number of classes predicted
    square = torch.where(square > SAME * both, square, torch.inf)
    square[torch.arange(len(used)), used] = torch.inf
    return Boundaries(k, z.gather(1, k[:, None]) - z, square[which])


def mean_distance(of: Boundaries) -> Tensor:
    """(N,) mean distance to the boundaries, (z_k − z_c)/‖w_k − w_c‖ each (Liu & Qin 2024);
    0 where there is none. Both detectors named fdbd share it."""
    return (of.gap / of.square.sqrt()).sum(1) / of.number


def mean_distances(test: Features) -> Tensor:
    """(N,) of a block."""
    return mean_distance(test.shared(boundaries))
