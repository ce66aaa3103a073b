"""RankFeat (Song et al. 2022): the energy of the last map without its largest singular value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.energy import head_energy
from oodcli.errors import DetectorError
from oodcli.features import Features, recorded
from oodcli.float64 import in_float64

SQUARINGS = 3
"""Of a Gram matrix G: to G⁸."""

STEPS = 7
"""Products of G⁸ and a vector, which began as a column of G⁸: G⁶⁴ in all."""

PURE = 0.7
"""Σ λ² / (Σ λ)² of the eigenvalues λ of G⁴ from which all but the largest are gone after all steps:
the second is less than 0.23 of it, so 10⁻¹⁰ in G⁶⁴."""


def rank_one(maps: Tensor) -> Tensor:
    """What the first singular triplet adds to the spatial mean: σ₁ l₁ mean(r₁), with the map of an
    image as a matrix A = Σ σᵢ lᵢ rᵢᵀ of channels and positions (Song et al. 2022). It has no
    sign to choose, as l₁ and r₁ change theirs together.

    maps: (N, C, …). Returns (N, C) float32; a map that is not finite has a
    NaN there.
    """
    with torch.autocast(maps.device.type, enabled=False):  # its products would have eight bits
        a = maps.flatten(2).float()  # (N, C, P)
        if a.shape[1] < a.shape[2]:
            left = first_eigenvector(a @ a.mT)[..., None]  # (N, C, 1)
            return (left * (left.mT @ a.mean(2, keepdim=True))).squeeze(2)
        right = first_eigenvector(a.mT @ a)[..., None]  # (N, P, 1)
        return (a @ right).squeeze(2) * right.mean(1)


def first_eigenvector(gram: Tensor) -> Tensor:
    """The eigenvector of the largest eigenvalue of symmetric matrices without negative ones, of
    length 1, by squaring the matrices: eigh takes as long as a small network, and is left for those
    whose second eigenvalue is nearly as large. gram: (N, M, M) float32. Returns (N, M), of either
    sign."""
    power = share = gram / gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    for _ in range(SQUARINGS):
        share, power = power, power @ power
    traces = share.diagonal(dim1=1, dim2=2).sum(1)
    pure = share.square().sum((1, 2)) > PURE * traces.square()
    largest = power.diagonal(dim1=1, dim2=2).argmax(1)
    vector: Tensor = power.gather(2, largest[:, None, None].expand(-1, power.shape[1], 1))
    for matrix in (*(power for _ in range(STEPS)), gram):  # the last one removes rounding
        vector = matrix @ (vector / vector.norm(dim=1, keepdim=True))
    vector = (vector / vector.norm(dim=1, keepdim=True)).squeeze(2)
    if not pure.all():
        rest = torch.nan_to_num(in_float64(gram[~pure]), posinf=0, neginf=0)
        vector[~pure] = torch.linalg.eigh(rest).eigenvectors[..., -1].float().to(vector.device)
    return vector


@dataclass(frozen=True)
class RankFeat(Detector):
    """Free energy of the head on u′, the mean of the last map without its first singular triplet.
    The map of an image is a matrix A of channels and HW positions; σ₁ is its largest singular
    value, l₁ and r₁ are the singular vectors.

    The network must pool by the mean, so that u is the mean of A. The paper averages these logits
    with those of the last stage after the same change to the map before it.
    """

    name = "rankfeat"
    source = "Song et al. 2022 (NeurIPS), the last map alone"
    about = "free energy of the head on the last map without its first singular triplet"
    formula = r"""
        s = -\log \sum_c e^{z'_c}, \qquad z' = W u' + b, \qquad
        u' = \frac{1}{HW} (A - \sigma_1 l_1 r_1^\top) \mathbf{1}
    """
    needs = frozenset({"embedding", "head", "layers.rank1", "pooled"})

    def _score(self, test: Features) -> Tensor:
        found = [layer.rank1 for layer in test.layers.values() if layer.rank1 is not None]
        if len(found) != 1:
            raise DetectorError(
                f"{self.name}: {len(found)} layers have rank1, expected the last map alone: "
                "extract again"
            )
        left = recorded(test.embedding).double() - found[0].double()
        return head_energy(left, recorded(test.head))
