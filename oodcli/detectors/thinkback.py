"""Thinkback: how far one step of training on the predicted label would move the head's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.hyperparameters import require_positive
from oodcli.detectors.latent_space import predicted_products
from oodcli.detectors.msp import softmax, sum_of_others
from oodcli.errors import DetectorError
from oodcli.features import Features, recorded

TEMPERATURES = (1.0, 2.0, 3.0, 4.0, 5.0)
"""The grid of ``T=auto``."""


def residual(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """e = ∂CE(z/T, k)/∂z = (softmax(z/T) − e_k)/T, k = argmax z. p_k − 1 is taken as minus the sum
    of the other probabilities: the difference loses its digits.

    logits: (N, K). Returns (N, K) float64, rows sum to 0.
    """
    p = softmax(logits, temperature)
    return p.scatter(1, p.argmax(1, keepdim=True), -sum_of_others(p)[:, None]) / temperature


def thinkback(logits: Tensor, uu: Tensor, temperature: float = 1.0) -> Tensor:
    """Σ_ij δw_ij² = ‖e‖² ‖u‖², as δW = e uᵀ (Thinkback, eq. 5 and 7); the head's weights, no bias.

    logits: (N, K), uu: (N,) the squares ‖u‖². Returns (N,) float64, higher = more OOD.
    """
    return residual(logits, temperature).square().sum(1) * uu


def _squares(block: Features) -> Tensor:
    return block.shared(predicted_products, False).uu


@dataclass(frozen=True)
class Thinkback(Detector):
    """Squared length of the gradient of the cross entropy by the head's weights, with the predicted
    class k as the label. 1_k: 1 at k, 0 elsewhere.

    T = ``auto``, the paper's rule, takes the T of 1 … 5 with the smallest spread of the score over
    rows of the distribution, which must be given to fit. As the score carries 1/T², that tends to
    be the last of the grid: the default is T = 1, which needs no row.
    """

    name = "thinkback"
    source = "Thinkback, eq. 5 and 7"
    about = "squared norm of the head's gradient for the predicted label"
    formula = r"""
        s = \sum_{i,j} (e_i u_j)^2 = \lVert e \rVert^2 \lVert u \rVert^2,
        \qquad e = \frac{\operatorname{softmax}(z / T) - 1_k}{T}
    """
    needs = frozenset({"logits", "embedding", "head"})

    T: Annotated[
        float | Literal["auto"], "temperature, above 0; auto: the paper's rule, by oodcli fit"
    ] = 1.0

    def __post_init__(self) -> None:
        if self.T == "auto":
            raise DetectorError(
                "thinkback.T=auto must be fitted first: 'oodcli fit CACHE.h5 -d thinkback "
                "-p thinkback.T=auto' writes thinkback.safetensors; give its path to -d"
            )
        require_positive(self.name, T=self.T)

    @classmethod
    def fit_needs(cls, **hyperparameters: Any) -> frozenset[str]:
        return cls.needs if hyperparameters.get("T") == "auto" else frozenset()

    @classmethod
    def fit(cls, train: Blocks, *, T: float | Literal["auto"] = 1.0) -> Self:  # noqa: N803
        """With T = ``auto``, one pass; five numbers a row are kept."""
        if T != "auto":
            return cls(T)
        scores = torch.cat(
            [
                torch.stack(
                    [
                        thinkback(recorded(b.logits), _squares(b), temperature)
                        for temperature in TEMPERATURES
                    ]
                )
                for b in finite_rows(train, cls.needs, cls.name)
            ],
            1,
        )  # (len(TEMPERATURES), N)
        return cls(TEMPERATURES[int(scores.std(1, correction=0).argmin())])

    def _score(self, test: Features) -> Tensor:
        assert self.T != "auto"
        return thinkback(recorded(test.logits), _squares(test), self.T)
