"""Expected length of the log-likelihood's gradient (Igoe et al. 2022), in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oodcli.detectors.last_layer_gradients import LastLayerGradient, embedding_length
from oodcli.detectors.msp import probabilities, sum_of_others
from oodcli.features import Features


def igoe(p: Tensor, u: Tensor) -> Tensor:
    """E_{y∼p} ‖∂ log p_y/∂W‖₁ = ‖u‖₁ · 2 Σ p(1 − p) (RG, eq. 4), large = OOD: the text under eq. 4
    has it the other way, but an uncertain p has the longest gradients.

    The largest p's 1 − p is taken as the sum of the others: the difference loses its digits.
    p: (N, K) the softmax, u: (N,) the lengths ‖u‖₁. Returns (N,) float64, higher = more OOD.
    """
    others = (1 - p).scatter(1, p.argmax(1, keepdim=True), sum_of_others(p)[:, None])
    return u * 2 * (p * others).sum(1)


@dataclass(frozen=True)
class Igoe(LastLayerGradient):
    """Expected length of the gradient of the log-likelihood; long = OOD."""

    name = "igoe"
    source = "Igoe et al. 2022; RG, eq. 4"
    about = "expected norm of the log-likelihood's gradient"
    formula = r"s = \lVert u \rVert_1 \cdot 2 \sum_c p_c (1 - p_c)"

    def _score(self, test: Features) -> Tensor:
        return igoe(test.shared(probabilities), test.shared(embedding_length))
