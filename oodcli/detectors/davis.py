"""DAVIS: the energy of the head on another pooling of the last map than its mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.energy import head_energy
from oodcli.detectors.hyperparameters import require_positive
from oodcli.detectors.layer_choice import last_map
from oodcli.features import LAST_MAP, Features, recorded


@dataclass(frozen=True)
class Davis(Detector):
    """Free energy of the head on m + γσ, or on the peaks of the last map: m, σ and peak are the
    mean, standard deviation (divisor HW) and maximum of each channel over the positions. The
    network must pool by the mean, so that m is its embedding."""

    name = "davis"
    source = "DAVIS, arXiv 2601.22703"
    about = "free energy of the head on the last map's mean + γ·std, or on its peaks"
    formula = r"""
        s = -\log \sum_c e^{z'_c}, \qquad z' = W (m + \gamma \sigma) + b
    """
    needs = frozenset({"embedding", "head", "layers.std", "layers.peak", "pooled"})

    pool: Annotated[
        Literal["std", "max"], "m + γσ, or max: the peaks; std, because peak-energy reads the peaks"
    ] = "std"
    gamma: Annotated[float, "γ, above 0; the authors' for ResNet-18 (2 for ResNet-50)"] = 1.0

    def __post_init__(self) -> None:
        require_positive(self.name, gamma=self.gamma)

    @property
    def layers_read(self) -> frozenset[str] | None:
        return frozenset({LAST_MAP})

    def _score(self, test: Features) -> Tensor:
        layer, head = last_map(test, self.name), recorded(test.head)
        if self.pool == "max":
            return head_energy(recorded(layer.peak), head)
        spread = recorded(layer.std).double()
        return head_energy(recorded(test.embedding).double() + self.gamma * spread, head)
