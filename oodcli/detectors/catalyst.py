"""Catalyst: the free energy times a clipped sum over the channels of the last map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.energy import energy
from oodcli.detectors.hyperparameters import require_percent, require_positive
from oodcli.detectors.layer_choice import last_map
from oodcli.detectors.percentiles import percentile_of
from oodcli.detectors.rg import clipped_length
from oodcli.features import LAST_MAP, Features, recorded

Statistic = Literal["mean", "std", "max"]

RECORD = {"mean": "layers.mean", "std": "layers.std", "max": "layers.peak"}
"""Statistic → the record that has it."""


def statistic(test: Features, stat: str, who: str) -> Tensor:
    """(N, C) of each channel of the last map, over its positions."""
    layer = last_map(test, who)
    return recorded({"mean": layer.mean, "std": layer.std, "max": layer.peak}[stat])


@dataclass(frozen=True)
class Catalyst(Detector):
    """Free energy times the sum over channels of a statistic of the last map, clipped to 0 … c.
    With the mean and c = 1 it is ``rg``, on networks that pool by the mean."""

    name = "catalyst"
    source = "Catalyst, CVPR 2026 Findings, arXiv 2602.02409"
    about = "free energy times the clipped sum of the last map's std, mean or peaks"
    formula = r"""
        s = -\log \sum_c e^{z_c} \cdot \sum_k \min(\max(t_k, 0), c), \qquad
        t_k = \operatorname{std}_{h,w} A_{k,h,w}
    """
    needs = frozenset({"logits", "logits.level", "layers.std", "layers.peak"})
    fitted = True

    stat: Statistic
    c: float

    @classmethod
    def fit_needs(cls, **hyperparameters: Any) -> frozenset[str]:
        stat = hyperparameters.get("stat", "std")
        return _needed(stat)

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        stat: Annotated[
            Statistic, "mean, std or max over positions; std, because rg and peak-energy have those"
        ] = "std",
        c: Annotated[float | None, "upper bound of each channel; by default the percentile"] = None,
        percentile: Annotated[
            float,
            "percentile of all channels of all rows, in percent, 1 to 99; the authors tuned c",
        ] = 95.0,
    ) -> Self:
        """Two passes, none where c is given. Raises DetectorError for values out of range."""
        if c is not None:
            require_positive(cls.name, c=c)
            return cls(stat, c)
        require_percent(cls.name, percentile=percentile)
        needs = cls.fit_needs(stat=stat)
        found = percentile_of(
            lambda: (
                statistic(block, stat, cls.name).clamp_min(0)
                for block in finite_rows(train, needs, cls.name)
            ),
            percentile,
        )
        return cls(stat, found)

    @property
    def score_needs(self) -> frozenset[str]:
        return _needed(self.stat)

    @property
    def layers_read(self) -> frozenset[str] | None:
        return frozenset({LAST_MAP})

    def _score(self, test: Features) -> Tensor:
        positive = statistic(test, self.stat, self.name).clamp_min(0)
        return energy(recorded(test.logits)) * clipped_length(positive, self.c)


def _needed(stat: str) -> frozenset[str]:
    return frozenset({"logits", "logits.level", "layers.peak", RECORD[stat]})
