"""Mahalanobis distance to the nearest class (Lee et al. 2018) at one layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks
from oodcli.detectors.class_statistics import class_of
from oodcli.detectors.hyperparameters import require_between
from oodcli.detectors.layer_choice import EMBEDDING, LAYER, layer_rows
from oodcli.detectors.tied_gaussians import (
    NORMALIZE,
    WhiteMeans,
    mahalanobis,
    scatters,
    shortened,
    tied_gaussians,
    white_means,
    whitened,
)
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

    @property
    def layers_read(self) -> frozenset[str] | None:
        return frozenset({self.layer})

    @cached_property
    def _white(self) -> WhiteMeans:
        return white_means(self.mean, self.whitening)

    def _score(self, test: Features) -> Tensor:
        return mahalanobis(layer_rows(test, self.layer), self.mean, self.whitening, self._white)


@dataclass(frozen=True)
class MDSPlusPlus(MDS):
    """Squared Mahalanobis distance of u/‖u‖^β to the nearest class mean, with the covariance that
    all classes share. β = 1 makes it the one of the direction alone. ``classes=none``: to the mean
    of all rows, whatever their class (SSD).
    """

    name = "mds++"
    source = "Müller & Hein 2025 (ICML), arXiv 2505.18032"
    about = "mds, on embeddings of length 1"
    formula = r"""
        s = \min_c \, (x - \mu_c)^\top \Sigma^{-1} (x - \mu_c), \qquad
        x = \frac{u}{\lVert u \rVert^\beta}
    """

    normalize: float

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        layer: Annotated[str, LAYER] = EMBEDDING,
        normalize: Annotated[float, NORMALIZE] = 1.0,
        classes: Annotated[
            Literal["labels", "none"], "none: one mean for all classes; by default the paper's"
        ] = "labels",
    ) -> Self:
        """One pass; a (D, D) and a (K, D) sum are kept. Raises DetectorError for a β outside
        0 … 1, and when there is no row."""
        require_between(cls.name, 0, 1, normalize=normalize)
        found = scatters(
            train,
            cls.fit_needs(layer=layer),
            [layer],
            cls.name,
            normalize=normalize,
            label=class_of if classes == "labels" else _one_class,
        )[layer]
        whitening = whitened(found.within, f"{cls.name} at {layer}")
        return cls(layer, found.means, whitening, normalize)

    def _score(self, test: Features) -> Tensor:
        rows = shortened(layer_rows(test, self.layer), self.normalize)
        return mahalanobis(rows, self.mean, self.whitening, self._white)


def _one_class(block: Features) -> Tensor:
    return torch.zeros(len(block), dtype=torch.int64)


def _needed(layer: str) -> frozenset[str]:
    return frozenset({"embedding" if layer == EMBEDDING else "layers.mean"})
