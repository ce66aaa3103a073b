"""Mahalanobis distance to the nearest class (Lee et al. 2018) at one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Self

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks
from oodcli.detectors.layer_choice import EMBEDDING, LAYER, layer_rows
from oodcli.detectors.tied_gaussians import mahalanobis, tied_gaussians
from oodcli.features import Features


@dataclass(frozen=True)
class MDS(Detector):
    """Squared Mahalanobis distance to the nearest class mean, with the covariance that all classes
    share, at the embedding or at a layer's spatial means.

    mean: (C, D), a row for each class that was fitted on; whitening: (D, D), A with A Aᵀ = Σ⁻¹.
    Classes are the labels, where unknown the predicted ones.
    """

    name = "mds"
    source = "Lee et al. 2018, eq. 2"
    about = "Mahalanobis distance to the nearest class mean, tied covariance"
    formula = r"s = \min_c \, (u - \mu_c)^\top \Sigma^{-1} (u - \mu_c)"
    needs = frozenset({"embedding"})
    fitted = True
    better_on_real = True
    heavy = True

    layer: str
    mean: Tensor
    whitening: Tensor

    @classmethod
    def fit_needs(cls, **hyperparameters: Any) -> frozenset[str]:
        return _needed(hyperparameters.get("layer", EMBEDDING)) | {"logits"}

    @classmethod
    def fit(cls, train: Blocks, *, layer: Annotated[str, LAYER] = EMBEDDING) -> Self:
        """One pass; a (D, D) and a (K, D) sum are kept. layer: ``embedding`` or a layer's name."""
        mean, whitening = tied_gaussians(train, cls.fit_needs(layer=layer), [layer], cls.name)
        return cls(layer, mean[layer], whitening[layer])

    @property
    def score_needs(self) -> frozenset[str]:
        return _needed(self.layer)

    def _score(self, test: Features) -> Tensor:
        return mahalanobis(layer_rows(test, self.layer), self.mean, self.whitening)


def _needed(layer: str) -> frozenset[str]:
    return frozenset({"embedding" if layer == EMBEDDING else "layers.mean"})
