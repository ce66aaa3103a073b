"""RAS: the energy of the head on the embedding's order with the usual sorted values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.energy import head_energy
from oodcli.features import Features, recorded


def with_usual_values(embedding: Tensor, usual: Tensor) -> Tensor:
    """u', which has ρ_j where u has its j-th smallest entry; equal entries get the mean of their
    ρ_j, so that the order of the channels does not matter (the authors leave it to the sort).

    embedding: (N, D); usual: ρ, (D,) ascending, float64. Returns (N, D) float64.
    """
    values, order = embedding.sort(dim=1)
    new = torch.ones_like(order)  # which of the distinct values each is
    new[:, 1:] = values[:, 1:] != values[:, :-1]
    group = new.cumsum(1) - 1
    rho = usual.expand(values.shape)
    total = torch.zeros_like(rho).scatter_add_(1, group, rho)
    count = torch.zeros_like(rho).scatter_add_(1, group, torch.ones_like(rho))
    mean = (total / count.clamp_min(1)).gather(1, group)
    return torch.zeros_like(mean).scatter_(1, order, mean)


@dataclass(frozen=True)
class RAS(Detector):
    """Free energy of the head on u', in which the j-th smallest entry of u is replaced by ρ_j, the
    mean of the j-th smallest entries of the rows fitted on. Only the order of u's entries counts.

    usual: ρ, (D,) float64, ascending.
    """

    name = "ras"
    source = "Guglielmo & Masana 2026, arXiv 2604.08572"
    about = "free energy of the head on the embedding's order, with the usual sorted values"
    formula = r"""
        s = -\log \sum_c e^{z'_c}, \qquad z' = W u' + b, \qquad
        u'_{(j)} = \rho_j = \operatorname{mean}_x u_{(j)}(x)
    """
    needs = frozenset({"embedding", "head"})
    fitted = True

    usual: Tensor

    @classmethod
    def fit(cls, train: Blocks) -> Self:
        """One pass; one sum is kept. Raises DetectorError when there is no row."""
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        for block in finite_rows(train, cls.needs, cls.name):
            total = total + recorded(block.embedding).sort(dim=1).values.double().sum(0)
            count += len(block)
        return cls(total / count)

    def _score(self, test: Features) -> Tensor:
        shaped = with_usual_values(recorded(test.embedding), self.usual)
        return head_energy(shaped, recorded(test.head))
