"""VRA (Xu et al. 2023): the energy of the head without low and high entries of the embedding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.energy import head_energy
from oodcli.detectors.hyperparameters import require_percent
from oodcli.detectors.percentiles import percentiles_by_column
from oodcli.errors import DetectorError
from oodcli.features import Features, recorded


def rectified(embedding: Tensor, low: Tensor, high: Tensor, shift: float = 0.0) -> Tensor:
    """0 where u < α, else min(u + λ, β) (Xu et al. 2023, §3). embedding: (N, D); low, high: α and
    β, (D,). Returns (N, D) float64."""
    u = embedding.double()
    return torch.where(u < low, 0.0, torch.minimum(u + shift, high))


@dataclass(frozen=True)
class VRA(Detector):
    """Free energy of the head on u', which is 0 where u is below α and β where it is above β. α and
    β: percentiles of each entry of the embeddings fitted on. VRA+ adds λ in between, up to β.

    low, high: α and β, (D,) float64. shift: λ.
    """

    name = "vra"
    source = "Xu et al., NeurIPS 2023, arXiv 2302.11716"
    about = "free energy of the head on the embedding without its low and high entries"
    formula = r"""
        s = -\log \sum_c e^{z'_c}, \qquad z' = W u' + b, \qquad
        u'_j = \begin{cases} 0 & u_j < \alpha_j \\ \min(u_j + \lambda, \beta_j) & \text{else}
        \end{cases}
    """
    needs = frozenset({"embedding", "head"})
    fitted = True

    low: Tensor
    high: Tensor
    shift: float

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        low: Annotated[
            float, "percentile of each entry for α, in percent, 1 to 99; the paper's for CIFAR"
        ] = 60.0,
        high: Annotated[
            float, "percentile for β, in percent, above low; the paper has 90 to 95 for CIFAR"
        ] = 95.0,
        alpha: Annotated[
            float | None, "one α for all entries; the paper has 0.5 for ResNets on ImageNet"
        ] = None,
        beta: Annotated[
            float | None, "one β for all entries; the paper has 1 for ResNets on ImageNet"
        ] = None,
        shift: Annotated[float, "λ of VRA+, at least 0; 0 is VRA"] = 0.0,
    ) -> Self:
        """Three passes, in constant memory; one where α and β are given. Raises DetectorError for
        bounds that do not rise."""
        require_percent(cls.name, low=low, high=high)
        if not low < high:
            raise DetectorError(f"{cls.name}.low={low:g} must be below high={high:g}")
        if alpha is not None and beta is not None and not alpha < beta:
            raise DetectorError(f"{cls.name}.alpha={alpha:g} must be below beta={beta:g}")
        if not shift >= 0:
            raise DetectorError(f"{cls.name}.shift={shift:g} must not be negative")

        def embeddings() -> Iterable[Tensor]:
            return (recorded(b.embedding) for b in finite_rows(train, cls.needs, cls.name))

        if alpha is None or beta is None:
            bounds = percentiles_by_column(embeddings, [low, high])
        else:
            bounds = torch.zeros(2, next(iter(embeddings())).shape[1], dtype=torch.float64)
        for row, given in zip(bounds, (alpha, beta), strict=True):
            if given is not None:
                row.fill_(given)
        return cls(bounds[0].clone(), bounds[1].clone(), shift)

    def _score(self, test: Features) -> Tensor:
        return head_energy(
            rectified(recorded(test.embedding), self.low, self.high, self.shift),
            recorded(test.head),
        )
