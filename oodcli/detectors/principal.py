"""What detectors of subspaces share: the directions in which the rows fitted on vary most."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oodcli.detectors.blocks import Blocks
from oodcli.detectors.sums import moments
from oodcli.features import Features

CONSTANT = 1e-12
"""A variance below this share of the mean square is rounding: the column is constant."""


def mean_and_covariance(
    train: Blocks, needs: frozenset[str], who: str, rows: Callable[[Features], Tensor]
) -> tuple[Tensor, Tensor]:
    """(D,), and (D, D) with divisor N, of all rows (N, D) float64 of some blocks. One pass; a
    (D, D) sum is kept. Raises DetectorError without a row."""
    sums = moments(train, needs, who, rows)
    mean = sums["total"] / sums["count"]
    return mean, sums["square"] / sums["count"] - torch.outer(mean, mean)


def leading_directions(covariance: Tensor, share: float) -> Tensor:
    """(D, d): the fewest eigenvectors that hold a share of the variance, at least one; the largest
    first. covariance: (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    held = values.clamp_min(0).flip(0).cumsum(0)
    few = int((held < share * held[-1]).sum()) + 1
    leading: Tensor = vectors.flip(1)[:, :few].contiguous()
    return leading
