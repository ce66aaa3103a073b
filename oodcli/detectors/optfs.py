"""OptFS (Zhao et al. 2024): the energy of the head on an embedding reweighted by its values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import ROWS_IN_CACHE, Blocks, by_rows, finite_rows
from oodcli.detectors.energy import head_energy
from oodcli.detectors.hyperparameters import require_percent, require_positive
from oodcli.detectors.percentiles import percentiles_of
from oodcli.errors import DetectorError
from oodcli.features import Features, recorded

LENGTH = 1000.0
"""Of θ, as in the authors' code."""


def bin_of(u: Tensor, low: float, high: float, bins: int) -> Tensor:
    """Which of ``bins`` equal parts of [low, high) each entry is in, and ``bins`` outside. u: any
    shape, float64."""
    found = ((u - low) * (bins / (high - low))).floor().clamp(0, bins - 1).long()
    return torch.where((u >= low) & (u < high), found, bins)


@dataclass(frozen=True)
class OptFS(Detector):
    """Free energy of the head on u', in which each entry of u is multiplied by θ of the bin that it
    is in, and 0 outside of all bins. θ of a bin is proportional to what its entries contribute on
    average to the predicted class's logit, and has length 1000.

    theta: (bins,) float64. low, high: bounds of the bins.
    """

    name = "optfs"
    source = "Zhao et al., ICLR 2024"
    about = "free energy of the head on the embedding, each entry weighted by the bin it is in"
    formula = r"""
        s = -\log \sum_c e^{z'_c}, \qquad z' = W u' + b, \qquad u'_j = \theta_{\beta(u_j)} u_j

        \theta \propto I, \qquad I_i = \operatorname{mean}_x \sum_{j : \beta(u_j) = i} W_{k,j} u_j
    """
    needs = frozenset({"embedding", "head"})
    fit_also = frozenset({"logits"})
    fitted = True

    theta: Tensor
    low: float
    high: float

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        bins: Annotated[int, "how many, above 0; default of the authors' code"] = 100,
        low: Annotated[
            float, "percentile of all entries where the bins begin, in percent; the authors'"
        ] = 0.1,
        high: Annotated[
            float, "percentile of all entries where the bins end, in percent; the authors'"
        ] = 99.9,
    ) -> Self:
        """Three passes, in constant memory. Raises DetectorError when all entries are equal."""
        require_positive(cls.name, bins=bins)
        require_percent(cls.name, (0, 100), low=low, high=high)

        def embeddings() -> Iterable[Tensor]:
            return (recorded(b.embedding) for b in finite_rows(train, cls.fit_needs(), cls.name))

        start, end = percentiles_of(embeddings, [low, high])
        if not start < end:
            raise DetectorError(
                f"{cls.name}: the embeddings have no entries between their percentiles {low:g} and "
                f"{high:g}, which are both {start:.3g}"
            )
        total = torch.zeros(bins + 1, dtype=torch.float64)
        for block in finite_rows(train, cls.fit_needs(), cls.name):
            parts = (
                torch.split(each, ROWS_IN_CACHE)
                for each in (recorded(block.embedding), recorded(block.logits).argmax(1))
            )
            for rows, classes in zip(*parts, strict=True):
                u = rows.double()
                shares = recorded(block.head).weight[classes] * u
                total.index_add_(0, bin_of(u, start, end, bins).flatten(), shares.flatten())
        length = float(total[:-1].norm())
        return cls(LENGTH * total[:-1] / (length or 1.0), start, end)

    def _score(self, test: Features) -> Tensor:
        theta = F.pad(self.theta, (0, 1))  # 0 outside of the bins

        def reweighted(rows: Tensor) -> Tensor:
            u = rows.double()
            return theta[bin_of(u, self.low, self.high, len(self.theta))] * u

        return head_energy(by_rows(reweighted, recorded(test.embedding)), recorded(test.head))
