"""What gradnorm, igoe, expgrad and energy-norm share: the length of a gradient by the last layer's
weights, in closed form (RG, §3.1).

For a loss L of the logits z = Wu + b the gradient is an outer product, ∂L/∂W = (∂L/∂z) uᵀ, so its
L1 norm is Σ|∂L/∂z| · ‖u‖₁: no backward pass.
"""

from __future__ import annotations

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import by_rows
from oodcli.features import Features, recorded


def length(embedding: Tensor) -> Tensor:
    """‖u‖₁. embedding: (N, D). Returns (N,) float64."""
    return by_rows(lambda u: u.double().abs().sum(1), embedding)


def embedding_length(test: Features) -> Tensor:
    """‖u‖₁ of a block, (N,) float64. Several detectors share it."""
    return length(recorded(test.embedding))


class LastLayerGradient(Detector):
    """A formula of logits and embedding, for a last layer that is linear."""

    needs = frozenset({"logits", "embedding", "head"})
