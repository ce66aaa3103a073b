"""DICE (Sun & Li 2022): the energy of a head with only its weights of large contribution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.energy import head_energy
from oodcli.detectors.hyperparameters import require_percent, require_positive
from oodcli.features import Features, LinearHead, recorded


def large_contributions(weight: Tensor, mean: Tensor, p: float) -> Tensor:
    """(K, D) bool: where the contribution W ∘ μ is above its percentile p over all K·D entries
    (Sun & Li 2022, §3.1). weight: (K, D), mean: (D,) float64."""
    contribution = weight.double() * mean
    rank = math.floor((contribution.numel() - 1) * p / 100)
    return contribution > torch.kthvalue(contribution.flatten(), rank + 1).values


@dataclass(frozen=True)
class DICE(Detector):
    """Free energy of the head without the weights whose mean contribution W ∘ μ is at or below the
    percentile p. μ: the mean embedding of the rows fitted on.

    weight: W ∘ M, (K, D) float32. c: bound that u is clipped at first, or None.
    """

    name = "dice"
    source = "Sun & Li, ECCV 2022"
    about = "free energy of the head without its weights of small mean contribution"
    formula = r"""
        s = -\log \sum_c e^{z'_c}, \qquad z' = (W \circ M) u + b, \qquad
        M_{c,j} = [W_{c,j} \mu_j > t_p]
    """
    needs = frozenset({"embedding", "head"})
    fitted = True

    weight: Tensor
    c: float | None

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        p: Annotated[
            float, "percentile of all contributions, in percent, 1 to 100; the paper's for CIFAR"
        ] = 90.0,
        c: Annotated[
            float | None, "clip u at this bound first, as react does; by default it is not clipped"
        ] = None,
    ) -> Self:
        """One pass; one sum is kept. Raises DetectorError when there is no row."""
        require_percent(cls.name, (1, 100), p=p)
        if c is not None:
            require_positive(cls.name, c=c)
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        head: LinearHead | None = None
        for block in finite_rows(train, cls.needs, cls.name):
            total = total + recorded(block.embedding).double().clamp_max(c or math.inf).sum(0)
            count, head = count + len(block), block.head
        weight = recorded(head).weight
        return cls(weight * large_contributions(weight, total / count, p), c)

    def _score(self, test: Features) -> Tensor:
        u = recorded(test.embedding).double()
        head = LinearHead(self.weight, recorded(test.head).bias)
        return head_energy(u if self.c is None else u.clamp_max(self.c), head)
