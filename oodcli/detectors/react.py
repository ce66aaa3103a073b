"""ReAct (Sun et al. 2021): the energy of the head on a clipped embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.energy import head_energy
from oodcli.detectors.hyperparameters import require_positive
from oodcli.detectors.percentiles import percentile_of
from oodcli.errors import DetectorError
from oodcli.features import Features, LinearHead, recorded

C = "upper bound of each component; by default the percentile"
PERCENTILE = "percentile of all entries of the embeddings, 0 to 100"
"""Meanings of settings."""


def upper_bound(
    train: Blocks, needs: frozenset[str], who: str, c: float | None, percentile: float
) -> float:
    """c, or where it is None the percentile of all entries of the embeddings, in two passes. Raises
    DetectorError for a percentile outside 0 … 100, for a c that is not positive, and when there is
    no row to take the percentile of."""
    if c is not None:
        require_positive(who, c=c)
        return c
    if not 0 <= percentile <= 100:
        raise DetectorError(f"{who}.percentile={percentile:g} must be in 0 … 100")
    return percentile_of(
        lambda: (recorded(block.embedding) for block in finite_rows(train, needs, who)), percentile
    )


def react(embedding: Tensor, head: LinearHead, c: float) -> Tensor:
    """−logsumexp(W min(u, c) + b) (Sun et al. 2021, eq. 3).

    embedding: (N, D), head: weight (K, D). Returns (N,) float64, higher = more OOD.
    """
    return head_energy(embedding.double().clamp_max(c), head)


@dataclass(frozen=True)
class ReAct(Detector):
    """Free energy of the logits that the head gives to min(u, c).

    c is the ``percentile`` of all entries of the embeddings fitted on, or what is given (RG clips
    at 1).
    """

    name = "react"
    source = "Sun et al. 2021"
    about = "free energy of the head on the embedding clipped at its 90th percentile"
    formula = r"s = -\log \sum_c e^{z'_c}, \qquad z' = W \min(u, c) + b"
    needs = frozenset({"embedding", "head"})
    fitted = True

    c: float

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        c: Annotated[float | None, C] = None,
        percentile: Annotated[float, PERCENTILE] = 90.0,
    ) -> Self:
        """Two passes, none where c is given. Raises DetectorError for a percentile outside 0 …
        100, and for a c that is not positive."""
        return cls(upper_bound(train, cls.needs, cls.name, c, percentile))

    def _score(self, test: Features) -> Tensor:
        return react(recorded(test.embedding), recorded(test.head), self.c)
