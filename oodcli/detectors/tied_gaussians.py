"""What mds, mds-sum and rmds share: a Gaussian a class, all of one covariance (Lee et al. 2018)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.class_statistics import class_of
from oodcli.detectors.layer_choice import layer_rows
from oodcli.detectors.sums import Sums, add_square, summed, whole_square
from oodcli.features import Features, recorded

log = logging.getLogger(__name__)

SINGULAR = 1e-9
"""A covariance whose smallest eigenvalue is less than this share of the largest gets a ridge."""

NORMALIZE = "β, 0 to 1: embeddings get the length ‖u‖^(1 − β); by default the paper's"
"""Meaning of a setting."""

RIDGE = 1e-6
"""The ridge, as a share of the mean eigenvalue."""


def mahalanobis(
    rows: Tensor, mean: Tensor, whitening: Tensor, of: WhiteMeans | None = None
) -> Tensor:
    """min over classes of (x − μ_c)ᵀ Σ⁻¹ (x − μ_c) (Lee et al. 2018, eq. 2; LSGM eq. 6, without
    its sign). rows: (N, D) float64; mean: (C, D); whitening: (D, D), A with A Aᵀ = Σ⁻¹; of:
    their white_means. Returns (N,)."""
    return squared_distances(rows, mean, whitening, of).amin(1).clamp_min(0)


def squared_distances(
    rows: Tensor, mean: Tensor, whitening: Tensor, of: WhiteMeans | None = None
) -> Tensor:
    """(N, C) of the same."""
    means, lengths = of or white_means(mean, whitening)
    white = (rows - mean.mean(0)) @ whitening  # (N, D)
    squares = torch.addmm(lengths, white, means.T, alpha=-2)
    return squares + white.square().sum(1, keepdim=True)


WhiteMeans = tuple[Tensor, Tensor]
"""(μ_c − their mean) A, (C, D), and their squared lengths, (C,)."""


def white_means(mean: Tensor, whitening: Tensor) -> WhiteMeans:
    """Of all classes, to be computed once: with many classes it takes longer than a block of
    rows."""
    means = (mean - mean.mean(0)) @ whitening
    return means, means.square().sum(1)


def shortened(rows: Tensor, normalize: float) -> Tensor:
    """(N, D) float64: x/‖x‖^β, β = 1 for rows of length 1; rows of zeros stay zeros. rows: (N, D)
    float64."""
    if normalize == 0:
        return rows
    length = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(length > 0, length**normalize, 1.0)


def whitened(covariance: Tensor, where: str) -> Tensor:
    """A with A Aᵀ = Σ⁻¹, by eigenvalues; a singular Σ gets a ridge, which is said, so that a
    channel that was dead in distribution counts when it wakes up. covariance: (D, D). Returns
    (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    largest = float(values[-1])
    usable, ridge = ridged(values)
    if ridge:
        dead = int((values <= SINGULAR * largest).sum())
        condition = largest / float(values[0]) if float(values[0]) > 0 else torch.inf
        log.info(
            f"{where}: the covariance is singular ({dead} of {len(values)} directions, condition "
            f"{condition:.2g}), adding {ridge:.2g} to its diagonal"
        )
    whitening: Tensor = (vectors / usable.sqrt()).contiguous()
    return whitening


def ridged(values: Tensor) -> tuple[Tensor, float]:
    """Eigenvalues that are never zero, and what was added to them. values: (D,), ascending."""
    if float(values[0]) > SINGULAR * float(values[-1]):
        return values, 0.0
    positive = values.clamp_min(0)
    ridge = RIDGE * float(positive.mean()) or 1.0
    return positive + ridge, ridge


@dataclass(frozen=True)
class Scatter:
    """Float64 sums over rows of one layer. count: (K,); total: (K, D); square: Σ x xᵀ, (D, D)."""

    count: Tensor
    total: Tensor
    square: Tensor

    @property
    def means(self) -> Tensor:
        """(C, D): of the classes that have rows."""
        present = self.count > 0
        return self.total[present] / self.count[present, None]

    @property
    def mean(self) -> Tensor:
        """(1, D): of all rows."""
        return self.total.sum(0, keepdim=True) / self.count.sum()

    @property
    def within(self) -> Tensor:
        """(D, D): the covariance that the classes share, with divisor N."""
        between = self.means.T @ (self.means * self.count[self.count > 0, None])
        return (self.square - between) / self.count.sum()

    @property
    def covariance(self) -> Tensor:
        """(D, D): of all rows, with divisor N."""
        return self.square / self.count.sum() - self.mean.T @ self.mean


def scatters(
    train: Blocks,
    needs: frozenset[str],
    layers: Sequence[str],
    who: str,
    *,
    normalize: float = 0.0,
    label: Callable[[Features], Tensor] = class_of,
) -> dict[str, Scatter]:
    """One pass over rows to fit on, of length ‖x‖^(1 − normalize). label: (N,) the class of each
    row. Raises DetectorError without a row."""

    def add(train: Blocks) -> Sums:
        sums: dict[str, Tensor] = {}
        for block in finite_rows(train, needs, who):
            classes, known = label(block), recorded(block.logits).shape[1]
            if not sums:
                sums["count"] = torch.zeros(known, dtype=torch.float64)
            sums["count"] += torch.bincount(classes, minlength=known)
            for name in layers:
                rows = shortened(layer_rows(block, name), normalize)
                total, square = f"{name}/total", f"{name}/square"
                if total not in sums:
                    sums[total] = rows.new_zeros(known, rows.shape[1])
                    sums[square] = rows.new_zeros(rows.shape[1], rows.shape[1])
                sums[total].index_add_(0, classes, rows)
                add_square(sums[square], rows)
        return sums | {f"{n}/square": whole_square(sums[f"{n}/square"]) for n in layers}

    sums = summed(train, who, add)
    return {n: Scatter(sums["count"], sums[f"{n}/total"], sums[f"{n}/square"]) for n in layers}


def tied_gaussians(
    train: Blocks, needs: frozenset[str], layers: Sequence[str], who: str
) -> Moments:
    """One pass over rows to fit on. Raises DetectorError without a row."""
    found = scatters(train, needs, layers, who)
    mean = {name: each.means for name, each in found.items()}
    return mean, {name: whitened(each.within, f"{who} at {name}") for name, each in found.items()}


Moments = tuple[dict[str, Tensor], dict[str, Tensor]]
"""By layer: means (C, D) of the classes that have rows, and whitening (D, D) of the covariance that
they share, with divisor N."""
