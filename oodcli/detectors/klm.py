"""KL matching (Hendrycks et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.msp import probabilities
from oodcli.features import Features, recorded

TINY = torch.finfo(torch.float64).tiny
"""A mean probability of 0 counts as this, so that the divergence remains finite."""


def kl_matching(logits: Tensor, templates: Tensor) -> Tensor:
    """min_c KL(p ‖ d_c), d_c the mean softmax of the rows predicted as class c.

    logits: (N, K), templates: (C, K), rows sum to 1. Returns (N,) float64, higher = more OOD.
    """
    log_p = torch.log_softmax(logits.double(), 1)
    p = log_p.exp()
    cross = p @ templates.clamp_min(TINY).log().T  # (N, C)
    return (p * log_p).sum(1) - cross.amax(1)


@dataclass(frozen=True)
class KLMatching(Detector):
    """Divergence of the softmax p from the nearest d_c, the mean softmax of the rows predicted as
    class c.

    templates: (C, K), one a class that some row was predicted as."""

    name = "klm"
    source = "Hendrycks et al. 2022"
    about = "divergence of the softmax from the nearest class's mean softmax"
    formula = r"""
        s = \min_c \operatorname{KL}(p \Vert d_c) = \min_c \sum_i p_i \log \frac{p_i}{d_{c,i}}
    """
    needs = frozenset({"logits"})
    fitted = True

    templates: Tensor

    @classmethod
    def fit(cls, train: Blocks) -> Self:
        """One pass. Raises DetectorError when there is no row."""
        total: Tensor | None = None
        for block in finite_rows(train, cls.needs, cls.name):
            p = block.shared(probabilities)
            if total is None:
                total = p.new_zeros(p.shape[1], p.shape[1])
            total.index_add_(0, recorded(block.logits).argmax(1), p)
        total = recorded(total)
        count = total.sum(1, keepdim=True)  # probabilities sum to 1, so this counts rows
        return cls((total / count)[count[:, 0] > 0])

    def _score(self, test: Features) -> Tensor:
        return kl_matching(recorded(test.logits), self.templates)
