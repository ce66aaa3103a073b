"""GradNorm (Huang et al. 2021), in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oodcli.detectors.last_layer_gradients import LastLayerGradient, embedding_length
from oodcli.detectors.msp import probabilities
from oodcli.features import Features


def gradnorm(p: Tensor, u: Tensor) -> Tensor:
    """−‖∂KL(uniform ‖ p)/∂W‖₁ = −‖u‖₁ Σ|1/K − p| (RG, eq. 3 and 6).

    p: (N, K) the softmax, u: (N,) the lengths ‖u‖₁. Returns (N,) float64, higher = more OOD.
    """
    return -u * (1 / p.shape[1] - p).abs().sum(1)


@dataclass(frozen=True)
class GradNorm(LastLayerGradient):
    """Length of the gradient that would make the softmax uniform; short = OOD."""

    name = "gradnorm"
    source = "Huang et al. 2021; RG, eq. 3 and 6"
    about = "minus the norm of the gradient towards a uniform softmax"
    formula = r"s = -\lVert u \rVert_1 \sum_c \lvert 1/K - p_c \rvert"

    def _score(self, test: Features) -> Tensor:
        return gradnorm(test.shared(probabilities), test.shared(embedding_length))
