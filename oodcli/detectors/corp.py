"""CoRP (Fang et al. 2024): CoP with a Gaussian kernel on top, by random Fourier features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Self

import torch
from torch import Tensor

from oodcli.detectors.blocks import Blocks, drawn_blocks, finite_rows
from oodcli.detectors.cop import FUSED, SHARE, CoP
from oodcli.detectors.hyperparameters import require_positive
from oodcli.detectors.knn import unit
from oodcli.features import recorded

MOST = 4096

ROWS = 100_000


def fourier_features(embedding: Tensor, frequency: Tensor, phase: Tensor) -> Tensor:
    """(N, M) float64: √(2/M) cos(Ωᵀû + β), û = u/‖u‖, whose products approximate the Gaussian
    kernel exp(−γ‖û − v̂‖²) (Rahimi & Recht 2007). embedding: (N, D); frequency: Ω,
    (D, M), of variance 2γ; phase: β, (M,), in 0 … 2π."""
    angles = torch.addmm(phase, unit(embedding), frequency)
    return angles.cos_().mul_(math.sqrt(2 / len(phase)))


@dataclass(frozen=True)
class CoRP(CoP):
    """Distance of φ from the principal space V of the rows fitted on, about their mean. φ are M
    random Fourier features of u/‖u‖, with Ω from a normal distribution of variance 2γ and β from a
    uniform one. ``fused``: (s − 1) log(1 + Σ exp z) in its place.

    frequency: Ω, (D, M); phase: β, (M,).
    """

    name = "corp"
    source = "Fang et al. 2024 (NeurIPS), arXiv 2402.02949"
    about = "cop, on random features that approximate a Gaussian kernel"
    formula = r"""
        s = \lVert (I - V V^\top) (\varphi - \bar\varphi) \rVert, \qquad
        \varphi = \sqrt{2 / M} \cos\Bigl(\Omega^\top \frac{u}{\lVert u \rVert} + \beta\Bigr)
    """

    frequency: Tensor
    phase: Tensor

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        share: Annotated[float, SHARE] = 0.9,
        fused: Annotated[bool, FUSED] = False,
        gamma: Annotated[float, "γ, above 0; by default the authors' for CIFAR-10"] = 2.0,
        features: Annotated[
            int | None, "M; by default 4D, at most 4096, which are the authors' numbers"
        ] = None,
        rows: Annotated[
            int,
            "rows to fit on, drawn at random where there are more; by default 24 for each of 4096 "
            "features, chosen for speed",
        ] = ROWS,
        seed: Annotated[int, "of the random Ω and β, and of that draw"] = 0,
    ) -> Self:
        """Two passes; one (M, M) sum is kept. Raises DetectorError for a share outside 0 … 1, for a
        γ, M or number of rows that is not positive, and when there is no row."""
        require_positive(cls.name, gamma=gamma, rows=rows)
        first = next(iter(finite_rows(train, cls.needs, cls.name)))
        width = recorded(first.embedding).shape[1]
        if features is None:
            features = min(4 * width, MOST)
        require_positive(cls.name, features=features)
        generator = torch.Generator().manual_seed(seed)
        frequency, phase = random_features(width, features, gamma, generator)
        change = partial(fourier_features, frequency=frequency, phase=phase)
        train = drawn_blocks(train, cls.needs, cls.name, rows, seed)
        return cls(*cls._principal(train, share, change), fused, frequency, phase)

    def _mapped(self, embedding: Tensor) -> Tensor:
        return fourier_features(embedding, self.frequency, self.phase)


def random_features(
    width: int, features: int, gamma: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ω, (D, M), and β, (M,), float64."""
    normal = torch.randn(width, features, generator=generator, dtype=torch.float64)
    uniform = torch.rand(features, generator=generator, dtype=torch.float64)
    return normal * math.sqrt(2 * gamma), uniform * 2 * math.pi
