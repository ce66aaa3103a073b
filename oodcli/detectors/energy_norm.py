"""Free energy times the length of the embedding (RG, tab. 1 and 3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oodcli.detectors.energy import energy
from oodcli.detectors.last_layer_gradients import LastLayerGradient, embedding_length
from oodcli.features import Features, recorded


def energy_norm(logits: Tensor, u: Tensor) -> Tensor:
    """−logsumexp z · ‖u‖₁: RG without clipping (RG, tab. 1 and 3: "Conor Igoe").

    logits: (N, K), u: (N,) the lengths ‖u‖₁. Returns (N,) float64, higher = more OOD.
    """
    return energy(logits) * u


@dataclass(frozen=True)
class EnergyNorm(LastLayerGradient):
    """Free energy times ‖u‖₁."""

    name = "energy-norm"
    source = "RG, tab. 1 and 3"
    about = "free energy times the embedding's L1 norm"
    formula = r"s = -\lVert u \rVert_1 \log \sum_c e^{z_c}"

    def _score(self, test: Features) -> Tensor:
        return energy_norm(recorded(test.logits), test.shared(embedding_length))
