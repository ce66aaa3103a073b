"""Residual (Wang et al. 2022): what of the embedding lies off the principal space, alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks
from oodcli.detectors.vim import DIM, null_space, residual_norm
from oodcli.features import Features, recorded


@dataclass(frozen=True)
class Residual(Detector):
    """Distance of u from the principal space: the part of ``vim`` that does not read the logits.
    The principal space: the ``dim`` eigenvectors of Σ (u − o)(u − o)ᵀ with the largest eigenvalues;
    R are the others, o = −W⁺b.

    origin: (D,); basis: R, (D, D − dim).
    """

    name = "residual"
    source = "Wang et al. 2022, §4.1"
    about = "the embedding's residual outside its principal subspace"
    formula = r"s = \lVert R^\top (u - o) \rVert"
    needs = frozenset({"embedding", "head"})
    fitted = True
    better_on_real = True
    heavy = True

    origin: Tensor
    basis: Tensor

    @classmethod
    def fit(cls, train: Blocks, *, dim: Annotated[int | None, DIM] = None) -> Self:
        """One pass; one (D, D) sum is kept. Raises DetectorError for a dim that is not in
        1 … D − 1, and when there is no row."""
        return cls(*null_space(train, cls.needs, cls.name, dim))

    def _score(self, test: Features) -> Tensor:
        return residual_norm(recorded(test.embedding), self.origin, self.basis)
