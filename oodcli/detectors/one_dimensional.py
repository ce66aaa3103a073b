"""Union of one-dimensional subspaces (Zaeemzadeh et al. 2021): the angle to a class's line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.class_statistics import class_of
from oodcli.detectors.sums import add_square, whole_square
from oodcli.features import Features, recorded

BYTES = 1 << 30
"""The sums of so many classes are in memory at once; with more there are more passes."""

NARROW = 64
"""Columns up to which all eigenvectors are computed."""


def smallest_angle(embedding: Tensor, direction: Tensor) -> Tensor:
    """(N,) float64: min over classes of arccos(|u·v_c|/‖u‖), in radians (Zaeemzadeh et al. 2021,
    eq. 9); π/2 for u = 0. embedding: (N, D); direction: (C, D), rows of length 1."""
    u = embedding.double()
    length = u.norm(dim=1)
    cosine = (u @ direction.T).abs().amax(1) / torch.where(length > 0, length, 1.0)
    return torch.arccos(cosine.clamp_max(1.0))


def first_eigenvector(square: Tensor) -> Tensor:
    """(D,) of length 1, that of the largest eigenvalue. square: (D, D) float64, symmetric, without
    negative eigenvalues. Of a wide matrix by Lanczos iteration, to the last digits as well and many
    times faster than all D eigenvectors."""
    if len(square) <= NARROW or not square.any():
        vectors: Tensor = torch.linalg.eigh(square).eigenvectors
        return vectors[:, -1]
    from scipy.sparse.linalg import eigsh

    start = torch.randn(len(square), dtype=square.dtype, generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(eigsh(square.numpy(), k=1, v0=start.numpy())[1][:, 0])


@dataclass(frozen=True)
class OneDimensional(Detector):
    """Smallest angle between u and the first singular vector v_c of a class's embeddings, which are
    not centred.

    direction: (C, D), a row of length 1 for each class that was fitted on."""

    name = "1d"
    source = "Zaeemzadeh et al. 2021"
    about = "smallest angle to the first singular vector of a class"
    formula = r"s = \min_c \arccos \frac{\lvert u^\top v_c \rvert}{\lVert u \rVert}"
    needs = frozenset({"embedding"})
    fit_also = frozenset({"logits"})
    fitted = True
    better_on_real = True

    direction: Tensor

    @classmethod
    def fit(cls, train: Blocks) -> Self:
        """One pass, and one for every 2³⁰/8D² classes: the first eigenvector of the second moments
        (D, D) of a class is its first singular vector. Classes are the labels, where unknown the
        predicted ones."""
        needs = cls.fit_needs()
        present: set[int] = set()
        width = 1
        for block in finite_rows(train, needs, cls.name):
            present |= set(class_of(block).tolist())
            width = recorded(block.embedding).shape[1]
        found: list[Tensor] = []
        classes = sorted(present)
        step = max(1, BYTES // (8 * width * width))
        for start in range(0, len(classes), step):
            found += cls._directions(train, classes[start : start + step], width)
        return cls(torch.stack(found))

    @classmethod
    def _directions(cls, train: Blocks, classes: Sequence[int], width: int) -> list[Tensor]:
        """(D,) for each of some classes. One pass; a (D, D) sum is kept for each."""
        square = torch.zeros(len(classes), width, width, dtype=torch.float64)
        for block in finite_rows(train, cls.fit_needs(), cls.name):
            label, rows = class_of(block), recorded(block.embedding)
            for each, c in zip(square, classes, strict=True):
                add_square(each, rows[label == c].double())
        return [first_eigenvector(whole_square(each)) for each in square]

    def _score(self, test: Features) -> Tensor:
        return smallest_angle(recorded(test.embedding), self.direction)
