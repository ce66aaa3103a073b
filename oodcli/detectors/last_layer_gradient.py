"""Length of a gradient by the last layer's weights, in closed form (RG, §3.1).

For a loss L of the logits z = Wu + b the gradient is an outer product, ∂L/∂W = (∂L/∂z) uᵀ, so its
L1 norm is Σ|∂L/∂z| · ‖u‖₁: no backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oodcli.detectors.base import Detector, by_rows
from oodcli.detectors.energy import energy
from oodcli.detectors.msp import probabilities, sum_of_others
from oodcli.features import Features, recorded

TINY = torch.finfo(torch.float32).tiny
"""The smallest ‖u‖₁ of which expgrad takes the logarithm: u = 0 has a score, too, the largest."""


def length(embedding: Tensor) -> Tensor:
    """‖u‖₁. embedding: (N, D). Returns (N,) float64."""
    return by_rows(lambda u: u.double().abs().sum(1), embedding)


def gradnorm(p: Tensor, u: Tensor) -> Tensor:
    """−‖∂KL(uniform ‖ p)/∂W‖₁ = −‖u‖₁ Σ|1/K − p| (RG, eq. 3 and 6).

    p: (N, K) the softmax, u: (N,) the lengths ‖u‖₁. Returns (N,) float64, higher = more OOD.
    """
    return -u * (1 / p.shape[1] - p).abs().sum(1)


def igoe(p: Tensor, u: Tensor) -> Tensor:
    """E_{y∼p} ‖∂ log p_y/∂W‖₁ = ‖u‖₁ · 2 Σ p(1 − p) (RG, eq. 4), large = OOD: the text under eq. 4
    has it the other way, but an uncertain p has the longest gradients.

    The largest p's 1 − p is taken as the sum of the others: the difference loses its digits.
    p: (N, K) the softmax, u: (N,) the lengths ‖u‖₁. Returns (N,) float64, higher = more OOD.
    """
    others = (1 - p).scatter(1, p.argmax(1, keepdim=True), sum_of_others(p)[:, None])
    return u * 2 * (p * others).sum(1)


def expgrad(logits: Tensor, u: Tensor) -> Tensor:
    """−log ‖∂ Σ exp z/∂W‖₁ = −(logsumexp z + log ‖u‖₁) (RG, eq. 5), as a logarithm, because the
    norm itself overflows.

    logits: (N, K), u: (N,) the lengths ‖u‖₁. Returns (N,) float64, higher = more OOD.
    """
    return energy(logits) - u.clamp_min(TINY).log()


def energy_norm(logits: Tensor, u: Tensor) -> Tensor:
    """−logsumexp z · ‖u‖₁: RG without clipping (RG, tab. 1 and 3: "Conor Igoe").

    logits: (N, K), u: (N,) the lengths ‖u‖₁. Returns (N,) float64, higher = more OOD.
    """
    return energy(logits) * u


def _length(test: Features) -> Tensor:
    return length(recorded(test.embedding))


class LastLayerGradient(Detector):
    """A formula of logits and embedding, for a last layer that is linear."""

    needs = frozenset({"logits", "embedding", "head"})


@dataclass(frozen=True)
class GradNorm(LastLayerGradient):
    """Length of the gradient that would make the softmax uniform; short = OOD."""

    name = "gradnorm"
    source = "Huang et al. 2021; RG, eq. 3 and 6"
    about = "minus the gradient's length towards a uniform softmax"

    def _score(self, test: Features) -> Tensor:
        return gradnorm(test.shared(probabilities), test.shared(_length))


@dataclass(frozen=True)
class Igoe(LastLayerGradient):
    """Expected length of the gradient of the log-likelihood; long = OOD."""

    name = "igoe"
    source = "Igoe et al. 2022; RG, eq. 4"
    about = "expected length of the log-likelihood's gradient"

    def _score(self, test: Features) -> Tensor:
        return igoe(test.shared(probabilities), test.shared(_length))


@dataclass(frozen=True)
class ExpGrad(LastLayerGradient):
    """Logarithm of the length of the gradient of Σ exp z; short = OOD."""

    name = "expgrad"
    source = "RG, eq. 5"
    about = "minus the log-length of the gradient of Σ exp z"

    def _score(self, test: Features) -> Tensor:
        return expgrad(recorded(test.logits), test.shared(_length))


@dataclass(frozen=True)
class EnergyNorm(LastLayerGradient):
    """Free energy times ‖u‖₁."""

    name = "energy-norm"
    source = "RG, tab. 1 and 3"
    about = "free energy times the embedding's L1 length"

    def _score(self, test: Features) -> Tensor:
        return energy_norm(recorded(test.logits), test.shared(_length))
