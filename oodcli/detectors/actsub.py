"""ActSub (Zöngür et al. 2025): what the head reads of the embedding, and what it does not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, drawn_rows, finite_rows
from oodcli.detectors.hyperparameters import require_percent, require_positive
from oodcli.detectors.knn import unit
from oodcli.detectors.peak_energy import positive_energy
from oodcli.detectors.shaping import sum_over_largest
from oodcli.errors import DetectorError
from oodcli.features import Features, LinearHead, recorded

RANK = 1e-6
"""Singular values of the head below this share of the largest count as 0."""

NEAREST_TO_ONE = 1 - 1e-12
"""A larger cosine counts as this, so that its logarithm remains finite."""


def decisive_energy(decisive: Tensor, head: LinearHead, p: float) -> Tensor:
    """log(1 + Σ exp z'), z' = eʳ W u_dec + b, r as in ``scale`` (Zöngür et al. 2025, eq. 9; the
    paper has no 1). decisive: (N, D) float64. Returns (N,), never negative."""
    product = decisive @ head.double.weight.T
    r = sum_over_largest(decisive.clamp_min(0), p)
    return positive_energy(product * r.exp()[:, None] + head.bias.double())


def closeness(rest: Tensor, bank: Tensor, k: int) -> Tensor:
    """−log(1 − mean of the k largest cosines) (eq. 7), at least 0. rest: (N, D) float64; bank: (M,
    D), rows of length 1."""
    cosines = unit(rest) @ bank.T
    nearest = cosines.topk(min(k, len(bank)), dim=1, sorted=False).values.mean(1)
    return -torch.log1p(-nearest.clamp(0, NEAREST_TO_ONE))


@dataclass(frozen=True)
class ActSub(Detector):
    """S_dec · S_ins^λ, negated. u_dec is the part of u in the first singular directions V of the
    head, u_ins the rest. S_dec is the energy of ``scale`` on u_dec, with a further logit 0, and
    S_ins how near u_ins is to the 10 nearest of the rows fitted on, by cosine. The number of
    directions makes both parts equally long on average, within the rank of the head.

    basis: V, (D, d) float64. bank: (M, D) float64, u_ins of M rows, of length 1.
    """

    name = "actsub"
    source = "Zöngür et al., ICCV 2025, eq. 4-10, arXiv 2508.21695"
    about = "energy of what the head reads of the embedding, times neighbours of what it does not"
    formula = r"""
        s = -S_{dec} S_{ins}^\lambda, \qquad
        S_{dec} = \log \Bigl(1 + \sum_c e^{z'_c}\Bigr), \qquad z' = e^r W u_{dec} + b

        S_{ins} = -\log \Bigl(1 - \operatorname{mean}_{i \le 10} \cos(u_{ins}, r_{(i)})\Bigr),
        \qquad u_{dec} = V V^\top u, \qquad u_{ins} = u - u_{dec}
    """
    needs = frozenset({"embedding", "head"})
    fitted = True
    heavy = True
    better_on_real = True

    basis: Tensor
    bank: Tensor
    p: float
    power: float
    k: int

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        dim: Annotated[
            int | None, "directions of u_dec; by default those that make both parts equally long"
        ] = None,
        p: Annotated[
            float, "percentile of scale, in percent, 1 to 99; the paper's for ResNets, 97.5 for ViT"
        ] = 95.0,
        power: Annotated[
            float, "λ, at least 0; the paper's for ResNets, 1 for ViT, chosen on OOD images"
        ] = 2.0,
        k: Annotated[int, "how many neighbours; the authors'"] = 10,
        rows: Annotated[int, "rows to compare with, drawn at random where there are more"] = 5000,
        seed: Annotated[int, "seed of that draw"] = 0,
    ) -> Self:
        """Three passes. Raises DetectorError for a dim outside 1 … the rank of the head."""
        require_percent(cls.name, p=p)
        require_positive(cls.name, k=k, rows=rows)
        if not power >= 0:
            raise DetectorError(f"{cls.name}.power={power:g} must not be negative")

        def embeddings() -> Iterable[Tensor]:
            return (recorded(b.embedding) for b in finite_rows(train, cls.needs, cls.name))

        first = next(iter(finite_rows(train, cls.needs, cls.name)))
        basis = directions(recorded(first.head))
        rank = basis.shape[1]
        if dim is None:
            dim = balanced(embeddings(), basis)
        if not 1 <= dim <= rank:
            raise DetectorError(
                f"{cls.name}.dim={dim} must be in 1 … {rank}, the rank of the head's weights"
            )
        basis = basis[:, :dim].contiguous()
        bank = drawn_rows(embeddings, rows, seed).double()
        bank = unit(bank - bank @ basis @ basis.T)
        return cls(basis, bank, p, power, k)

    def _score(self, test: Features) -> Tensor:
        u = recorded(test.embedding).double()
        decisive = u @ self.basis @ self.basis.T
        energy = decisive_energy(decisive, recorded(test.head), self.p)
        return -energy * closeness(u - decisive, self.bank, self.k) ** self.power


def directions(head: LinearHead) -> Tensor:
    """(D, rank) float64: the right singular vectors of the head's weights, the largest first. The
    paper takes all D, but their order is arbitrary where the weights are 0."""
    _, values, vectors = torch.linalg.svd(head.weight.double(), full_matrices=False)
    kept: Tensor = vectors[values > RANK * values[0]].T
    return kept


def balanced(embeddings: Iterable[Tensor], basis: Tensor) -> int:
    """How many directions make mean ‖u_dec‖ most nearly mean ‖u_ins‖ (eq. 4). basis: (D, rank)."""
    difference = torch.zeros(basis.shape[1], dtype=torch.float64)
    for embedding in embeddings:
        u = embedding.double()
        decisive = (u @ basis).square().cumsum(1)  # (N, rank)
        rest = (u.square().sum(1, keepdim=True) - decisive).clamp_min(0)
        difference += (decisive.sqrt() - rest.sqrt()).sum(0)
    return int(difference.abs().argmin()) + 1
