"""Rows as different from each other as new images are: virtual ones are too alike."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.class_statistics import class_means, class_of
from oodcli.detectors.hyperparameters import require_fraction
from oodcli.features import Features, recorded

log = logging.getLogger(__name__)

RIGHT = 0.95
"""Share of widened virtual rows that the network is right on."""

WIDEN = (
    "share of the rows that the network is right on after all deviations from the class means are "
    "multiplied by one factor, 0 to 1; 0 leaves the rows as they are; by default 0.95 for virtual "
    "rows, a round number, and 0 for others and for matched ones"
)
"""Meaning of a setting."""


def largest_factors(logits: Tensor, mean: Tensor, label: Tensor) -> Tensor:
    """(N,) up to which f the class c of a row has the largest logit of m_c + f (z − m_c): min over
    j of (m_cc − m_cj)/(d_j − d_c) where d_j > d_c, d = z − m_c; infinite where there is no such j.
    logits: z, (N, K); mean: m, (K, K), logits of each class; label: (N,)."""
    of = label[:, None]
    own = mean[label]
    apart = logits.double() - own
    lead, loss = own.gather(1, of) - own, apart - apart.gather(1, of)
    factors = torch.where(loss > 0, lead / loss.clamp_min(1e-300), torch.inf)
    return factors.amin(1)


@dataclass(frozen=True)
class Widened:
    """Blocks in which the deviation of each row from its class mean is multiplied by a factor.
    logits: class means, (K, K); embedding: (K, D), or (K, 0) where it is not needed."""

    train: Blocks
    needs: frozenset[str]
    who: str
    logits: Tensor
    embedding: Tensor
    factor: float

    def __iter__(self) -> Iterator[Features]:
        for block in finite_rows(self.train, self.needs, self.who):
            label = class_of(block)

            def wide(rows: Tensor, means: Tensor, label: Tensor = label) -> Tensor:
                mean = means[label]
                return (mean + self.factor * (rows.double() - mean)).to(rows.dtype)

            changed = replace(block, logits=wide(recorded(block.logits), self.logits))
            if self.embedding.shape[1]:
                embedding = wide(recorded(block.embedding), self.embedding)
                changed = replace(changed, embedding=embedding)
            yield changed


def widened(train: Blocks, needs: frozenset[str], who: str, right: float | None) -> Blocks:
    """Rows whose deviations from their class means, of logits and embedding alike, are multiplied
    by the factor at which the network is right on the share ``right`` of them; never narrowed.
    Embeddings are float32; as the head is linear, their logits are those of the network. Two
    passes; a number a row is kept. right: 0 or None leaves the rows as they are. Raises
    DetectorError for a share outside 0 … 1, and when there is no row."""
    require_fraction(who, widen=right or 0.0)
    if not right:
        return train
    with_embedding = "embedding" in needs

    def both(block: Features) -> Tensor:
        parts = [recorded(block.logits).double()]
        if with_embedding:
            parts.append(recorded(block.embedding).double())
        return torch.cat(parts, 1)

    count, means = class_means(finite_rows(train, needs, who), both)
    logits, embedding = means[:, : len(count)], means[:, len(count) :]
    largest = torch.cat(
        [
            largest_factors(recorded(block.logits), logits, class_of(block))
            for block in finite_rows(train, needs, who)
        ]
    )
    if len(largest) < 2:
        return train
    # Between the last row that the network is to be right on and the first that it is not.
    place = min(max(int(right * len(largest)), 1), len(largest) - 1)
    last, first = largest.sort(descending=True).values[place - 1 : place + 1].tolist()
    factor = first if last == torch.inf else (first + last) / 2
    if not 1 < factor < torch.inf:
        return train
    log.info(
        f"{who}: deviations from the class means times {factor:.3g}, with which the network is "
        f"right on {100 * right:.3g} % of the rows; -p {who}.widen=0 leaves them as they are"
    )
    return Widened(train, needs, who, logits, embedding, factor)
