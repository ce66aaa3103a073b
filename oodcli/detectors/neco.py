"""NECO (Ben Ammar et al. 2024): the share of the embedding in the principal space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks
from oodcli.detectors.hyperparameters import require_between
from oodcli.detectors.latent_space import TINY
from oodcli.detectors.principal import CONSTANT, leading_directions, mean_and_covariance
from oodcli.features import Features, recorded


def principal_share(embedding: Tensor, mean: Tensor, scale: Tensor, basis: Tensor) -> Tensor:
    """(N,) float64 in 0 … 1: ‖Vᵀx‖/‖x‖ of x = (u − mean)/scale (Ben Ammar et al. 2024), 0
    for x = 0. embedding: (N, D); mean, scale: (D,); basis: V, (D, d), orthonormal."""
    x = (embedding.double() - mean) / scale
    share: Tensor = (x @ basis).norm(dim=1) / x.norm(dim=1).clamp_min(TINY)
    return share


@dataclass(frozen=True)
class NECO(Detector):
    """Minus the share of x that lies in the principal space V of the rows fitted on, x the
    embedding with mean 0 and standard deviation 1 in each component. ``max_logit``: times the
    largest logit, which the authors do for transformers. A component that is constant is not
    scaled.

    mean, scale: (D,); basis: V, (D, d).
    """

    name = "neco"
    source = "Ben Ammar et al. 2024 (ICLR), arXiv 2310.06823"
    about = "minus the share of the standardised embedding in its principal subspace"
    formula = (
        r"s = -\frac{\lVert V^\top x \rVert}{\lVert x \rVert}, \qquad x_j = (u_j - m_j) / \sigma_j"
    )
    needs = frozenset({"embedding"})
    fitted = True
    better_on_real = True
    heavy = True

    mean: Tensor
    scale: Tensor
    basis: Tensor
    max_logit: bool

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        dim: Annotated[
            int | None, "dimensions of V, 1 to D; by default as many as hold 90 % of the variance"
        ] = None,
        max_logit: Annotated[
            bool, "multiply by the largest logit; by default not, as in the paper for ResNets"
        ] = False,
    ) -> Self:
        """One pass; one (D, D) sum is kept. Raises DetectorError for a dim that is not in 1 … D,
        and when there is no row."""
        mean, covariance = mean_and_covariance(
            train, cls.needs, cls.name, lambda block: recorded(block.embedding).double()
        )
        if dim is not None:
            require_between(cls.name, 1, len(mean), dim=dim)
        variance = covariance.diagonal()
        constant = variance <= CONSTANT * (variance + mean.square())
        scale = torch.where(constant, 1.0, variance.clamp_min(0).sqrt())
        standard = covariance / torch.outer(scale, scale)
        if dim is None:
            basis = leading_directions(standard, 0.9)
        else:
            basis = torch.linalg.eigh(standard).eigenvectors.flip(1)[:, :dim].contiguous()
        return cls(mean, scale, basis, max_logit)

    @property
    def score_needs(self) -> frozenset[str]:
        return self.needs | ({"logits", "logits.level"} if self.max_logit else set())

    def _score(self, test: Features) -> Tensor:
        share = principal_share(recorded(test.embedding), self.mean, self.scale, self.basis)
        if not self.max_logit:
            return -share
        return -share * recorded(test.logits).double().amax(1)
