"""What detectors of subspaces share: the directions in which the rows fitted on vary most."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

CONSTANT = 1e-12
"""A variance below this share of the mean square is rounding: the column is constant."""


def mean_and_covariance(rows: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """(D,), and (D, D) with divisor N, of all rows of some blocks (N, D) float64, at least one row.
    A (D, D) sum is kept."""
    count, total, square = 0, torch.zeros(0), torch.zeros(0)
    for block in rows:
        if not count:
            total = block.new_zeros(block.shape[1])
            square = block.new_zeros(block.shape[1], block.shape[1])
        count += len(block)
        total += block.sum(0)
        square.addmm_(block.T, block)
    mean = total / count
    return mean, square / count - torch.outer(mean, mean)


def leading_directions(covariance: Tensor, share: float) -> Tensor:
    """(D, d): the fewest eigenvectors that hold a share of the variance, at least one; the largest
    first. covariance: (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    held = values.clamp_min(0).flip(0).cumsum(0)
    few = int((held < share * held[-1]).sum()) + 1
    leading: Tensor = vectors.flip(1)[:, :few].contiguous()
    return leading
