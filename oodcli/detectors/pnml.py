"""pNML (Bibas et al. 2021): how freely the labels of one more row could be learnt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks
from oodcli.detectors.knn import unit
from oodcli.detectors.msp import softmax
from oodcli.detectors.sums import moments
from oodcli.features import Features, LinearHead, recorded

SINGULAR = 1e-10
"""Eigenvalues below this share of the largest count as 0 in the pseudo-inverse."""

LEAST = 1e-30
"""A smaller probability counts as this."""


def normalised_logits(logits: Tensor, embedding: Tensor, head: LinearHead) -> Tensor:
    """W u/‖u‖ + b, without another product. logits: (N, K), embedding: (N, D). Returns (N, K)
    float64."""
    bias = head.bias.double()
    length = embedding.double().norm(dim=1, keepdim=True)
    return (logits.double() - bias) / torch.where(length > 0, length, 1.0) + bias


def regret(p: Tensor, g: Tensor) -> Tensor:
    """log Σ_c p/(p + (1 − p) p^κ) / log K, κ = g/(1 + g) (Bibas et al. 2021, §4). p: (N, K), g:
    (N,), at least 0. Returns (N,) in [0, 1], higher = more OOD."""
    p = p.clamp_min(LEAST)
    kappa = (g / (1 + g))[:, None]
    terms = p / (p + (1 - p) * p**kappa)
    return terms.sum(1).log() / math.log(p.shape[1])


@dataclass(frozen=True)
class PNML(Detector):
    """Regret of predictive normalised maximum likelihood, in 0 … 1. û = u/‖u‖; P: pseudo-inverse of
    X^⊤X, X the rows û fitted on; p: the head's softmax on û.

    root: A with P = A Aᵀ, (D, r) float64, r the rank.
    """

    name = "pnml"
    source = "Bibas et al., NeurIPS 2021"
    about = "regret of a head that could still learn the label, large in rare directions of u"
    formula = r"""
        s = \frac{1}{\log K} \log \sum_c \frac{p_c}{p_c + (1 - p_c) p_c^\kappa}, \qquad
        \kappa = \frac{g}{1 + g}, \qquad g = \hat u^\top P \hat u
    """
    needs = frozenset({"logits", "logits.level", "embedding", "head"})
    fitted = True
    heavy = True
    better_on_real = True

    root: Tensor

    @classmethod
    def fit_needs(cls, **hyperparameters: object) -> frozenset[str]:
        return frozenset({"embedding"})

    @classmethod
    def fit(cls, train: Blocks) -> Self:
        """One pass; one (D, D) sum is kept. Raises DetectorError when there is no row."""
        sums = moments(
            train, cls.fit_needs(), cls.name, lambda block: unit(recorded(block.embedding))
        )
        values, vectors = torch.linalg.eigh(sums["square"])
        kept = values > SINGULAR * values[-1]
        return cls((vectors[:, kept] / values[kept].sqrt()).contiguous())

    def _score(self, test: Features) -> Tensor:
        u, head = recorded(test.embedding), recorded(test.head)
        p = softmax(normalised_logits(recorded(test.logits), u, head))
        g = (unit(u) @ self.root).square().sum(1)
        return regret(p, g)
