"""Length of the gradient of Σ exp z (RG, eq. 5), in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oodcli.detectors.energy import energy
from oodcli.detectors.last_layer_gradients import LastLayerGradient, embedding_length
from oodcli.features import Features, recorded

TINY = torch.finfo(torch.float32).tiny
"""The smallest ‖u‖₁ of which expgrad takes the logarithm: u = 0 has a score, too, the largest."""


def expgrad(logits: Tensor, u: Tensor) -> Tensor:
    """−log ‖∂ Σ exp z/∂W‖₁ = −(logsumexp z + log ‖u‖₁) (RG, eq. 5), as a logarithm, because the
    norm itself overflows.

    logits: (N, K), u: (N,) the lengths ‖u‖₁. Returns (N,) float64, higher = more OOD.
    """
    return energy(logits) - u.clamp_min(TINY).log()


@dataclass(frozen=True)
class ExpGrad(LastLayerGradient):
    """Logarithm of the length of the gradient of Σ exp z; short = OOD."""

    name = "expgrad"
    source = "RG, eq. 5"
    about = "minus the log-norm of the gradient of Σ exp z"
    formula = r"s = -\Bigl(\log \sum_c e^{z_c} + \log \lVert u \rVert_1\Bigr)"

    def _score(self, test: Features) -> Tensor:
        return expgrad(recorded(test.logits), test.shared(embedding_length))
