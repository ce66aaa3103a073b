"""RankFeat (Song et al. 2022): the energy of the last map without its largest singular value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.energy import head_energy
from oodcli.errors import DetectorError
from oodcli.features import Features, recorded

SQUARINGS = 6
"""Of a Gram matrix: its eigenvalues are then raised to the power 2⁶."""

IMPURE = 1e-5
"""Share of the other eigenvalues after all squarings but the last, from which the eigenvectors are
computed instead; the last one squares this share."""


def rank_one(maps: Tensor) -> Tensor:
    """What the first singular triplet adds to the spatial mean: σ₁ l₁ mean(r₁), with the map of an
    image as a matrix A = Σ σᵢ lᵢ rᵢᵀ of channels and positions (Song et al. 2022, eq. 3). It has no
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
    power, share = gram, gram
    for _ in range(SQUARINGS):
        trace = power.diagonal(dim1=1, dim2=2).sum(1)
        share = power / trace[:, None, None]
        power = share @ share
    # The shares λ of the eigenvalues before the last squaring add up to 1; Σ λ² = 1 if one is all.
    pure = share.square().sum((1, 2)) > 1 - IMPURE
    largest = share.diagonal(dim1=1, dim2=2).argmax(1)
    vector: Tensor = power.gather(2, largest[:, None, None].expand(-1, power.shape[1], 1))
    vector = (gram @ vector).squeeze(2)  # once more, which also removes rounding
    vector = vector / vector.norm(dim=1, keepdim=True)
    if not pure.all():
        rest = torch.nan_to_num(gram[~pure].double(), posinf=0, neginf=0)
        vector[~pure] = torch.linalg.eigh(rest).eigenvectors[..., -1].to(vector.dtype)
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
    source = "Song et al. 2022 (NeurIPS), eq. 3, last map alone"
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
