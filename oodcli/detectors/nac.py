"""NAC-UE (Liu et al. 2024) at the embedding: how often each neuron was in such a state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, by_rows, finite_rows
from oodcli.detectors.hyperparameters import require_fraction, require_positive
from oodcli.detectors.msp import probabilities
from oodcli.features import Features, recorded

EDGE = 1e-9
"""States so little below the edge of a bin are in the next one: a state without a gradient, ½, is
on an edge, and must not fall to either side of it by rounding."""


def kl_gradient(test: Features) -> Tensor:
    """(N, D) float64: Wᵀ(p − 1/K), the gradient of KL(uniform ‖ p) by the embedding."""
    p = test.shared(probabilities)
    return (p - 1 / p.shape[1]) @ recorded(test.head).double.weight


def state_bins(test: Features, alpha: float, bins: int) -> Tensor:
    """(N, D) int64: the bin of [0, 1] in which sigmoid(α u_i g_i) is (Liu et al. 2024)."""

    def some(u: Tensor, g: Tensor) -> Tensor:
        state = torch.sigmoid(alpha * u.double() * g).nan_to_num()
        return (state * bins + EDGE).long().clamp_max(bins - 1)

    return by_rows(some, recorded(test.embedding), test.shared(kl_gradient))


@dataclass(frozen=True)
class NAC(Detector):
    """Minus the mean coverage of the states x_i = sigmoid(α u_i g_i) of all neurons of the
    embedding, g the gradient of KL(uniform ‖ p). The coverage of a state is the share n/N of the
    rows fitted on that are in the same of M bins, by ``share``, at most 1. The paper does so at
    four layers, which takes a backward pass; this is the last of them, in closed form.

    coverage: (D, M) float64.
    """

    name = "nac"
    source = "Liu et al. 2024 (ICLR), NAC-UE at one layer"
    about = "minus how usual the neurons' activations, weighted by their gradient, are"
    formula = r"""
        s = -\operatorname*{mean}_i \min\Bigl(\frac{n_i(x_i)}{r N}, 1\Bigr), \qquad
        x_i = \sigma(\alpha u_i g_i), \qquad g = W^\top (p - 1/K)
    """
    needs = frozenset({"logits", "embedding", "head"})
    fitted = True
    better_on_real = True

    coverage: Tensor
    alpha: float

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        alpha: Annotated[
            float, "steepness of the sigmoid, above 0; by default the authors' for CIFAR-10"
        ] = 100.0,
        bins: Annotated[int, "M, the number of bins; by default the authors'"] = 50,
        share: Annotated[
            float,
            "r, the fraction of the rows at which a bin is fully covered, above 0 and at most 1; "
            "by default the authors' for CIFAR-10, 50 of 1,000 rows",
        ] = 0.05,
    ) -> Self:
        """One pass; a (D, M) count is kept. Raises DetectorError for settings that are not
        positive, for a share above 1, and when there is no row."""
        require_positive(cls.name, alpha=alpha, bins=bins, share=share)
        require_fraction(cls.name, share=share)
        rows, counts = 0, torch.zeros(0)
        for block in finite_rows(train, cls.needs, cls.name):
            found = state_bins(block, alpha, bins)
            width = found.shape[1]
            if not rows:
                counts = torch.zeros(width * bins, dtype=torch.float64, device=found.device)
            rows += len(block)
            places = found + bins * torch.arange(width, device=found.device)
            counts += torch.bincount(places.flatten(), minlength=width * bins)
        coverage = (counts / (share * rows)).clamp_max(1).view(-1, bins)
        return cls(coverage, alpha)

    def _score(self, test: Features) -> Tensor:
        bins = self.coverage.shape[1]
        found = state_bins(test, self.alpha, bins)
        places = found + bins * torch.arange(found.shape[1], device=found.device)
        return -self.coverage.flatten()[places].mean(1)
