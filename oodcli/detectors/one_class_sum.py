"""1C-Sum (Begon & Geurts 2021, §4): many indicators, standardised on noise and added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import torch
from torch import Tensor

from oodcli import detectors
from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.class_statistics import column_moments
from oodcli.features import Features

SUMMED = (
    *("t1000", "msp", "entropy"),
    *("norm", "norm+", "act", "act+", "proj", "ang", "ang++"),
    *("dms", "dms-aos", "dss", "dss-ext"),
)
"""The indicators of 1c-sum, in the order of its tensors."""

FREEDOM_OF_SUM = 10.0
"""How many times the spread of an indicator the sum's term has, when weights are learnt."""

Reference = Literal["uniform", "virtual"]


def indicators(block: Features, names: Sequence[str]) -> Tensor:
    """(N, I) float64: the scores of detectors that need no fitting, one column each."""
    return torch.stack([block.shared(_indicator, name) for name in names], 1)


def _indicator(block: Features, name: str) -> Tensor:
    return detectors.get(name)().score(block)


def standardised(indicators: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """(h − μ)/σ. indicators: (N, I); mean, sd: (I,). Returns (N, I)."""
    return (indicators - mean) / sd


@dataclass(frozen=True)
class OneClassSum(Detector):
    """Σ (h − μ)/σ over 14 indicators h: t1000, msp, entropy, norm, norm+, act, act+, proj, ang,
    ang++, dms, dms-aos, dss and dss-ext. μ and σ are those on images of uniform noise, so you need
    no data.

    mean, sd, weight: (14,), in the order of ``SUMMED``; weight is 1 unless learnt from labelled
    rows. reference: what was fitted on, as it is for the user to know: ``uniform``, or ``virtual``
    for the images that invert makes.
    """

    name = "1c-sum"
    source = "Begon & Geurts 2021, eq. 31"
    about = "sum of 14 indicators of output, embedding and BatchNorm, standardised on noise"
    formula = r"s = \sum_{i=1}^{14} \frac{h_i - \mu_i}{\sigma_i}"
    needs = frozenset(
        {"logits", "embedding", "head", "batchnorm.mean", "batchnorm.var", "batchnorm.running"}
    )
    fitted = True
    reference_images = "noise:uniform?n=2000&seed=0"
    explains = True

    mean: Tensor
    sd: Tensor
    weight: Tensor
    reference: Reference

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        reference: Annotated[
            Reference, "images that you fit on, for the record: uniform noise, or virtual images"
        ] = "uniform",
    ) -> Self:
        """One pass; 14 numbers a row are kept. Raises DetectorError when there is no row."""
        rows = [indicators(block, SUMMED) for block in finite_rows(train, cls.needs, cls.name)]
        mean, sd = column_moments(torch.cat(rows))
        return cls(mean, sd, torch.ones_like(mean), reference)

    def learn(self, labelled: Sequence[Features], ood: Tensor) -> Self:
        """Weights by logistic regression on rows that somebody marked (§5), regularised towards
        the plain sum: the sum is a term of its own, which the penalty hardly touches."""
        from sklearn.linear_model import LogisticRegression

        h = torch.cat([standardised(indicators(b, SUMMED), self.mean, self.sd) for b in labelled])
        good = torch.isfinite(h).all(1)
        terms = torch.cat([h.sum(1, keepdim=True), h], 1)[good]
        centre, spread = column_moments(terms)
        spread[0] /= FREEDOM_OF_SUM
        model = LogisticRegression(class_weight="balanced", max_iter=10_000)
        model.fit(standardised(terms, centre, spread).numpy(), ood[good].numpy())
        found = torch.from_numpy(model.coef_[0]) / spread
        return replace(self, weight=found[0] + found[1:])

    def contributions(self, test: Features) -> tuple[Sequence[str], Tensor]:
        """The 14 standardised indicators, in the order of ``SUMMED``."""
        names = [f"{name}, {detectors.get(name).about}" for name in SUMMED]
        terms = standardised(indicators(test, SUMMED), self.mean, self.sd) * self.weight
        return names, terms

    def _score(self, test: Features) -> Tensor:
        return self.contributions(test)[1].sum(1)
