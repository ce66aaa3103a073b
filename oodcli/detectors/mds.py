"""Mahalanobis distance to the nearest class (Lee et al. 2018), at one layer or over several."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from oodcli.detectors.base import Blocks, Detector, finite_rows
from oodcli.detectors.class_statistics import class_of
from oodcli.detectors.layer_choice import EMBEDDING, chosen_layers, layer_rows
from oodcli.errors import DetectorError
from oodcli.features import Features, recorded

log = logging.getLogger(__name__)

SINGULAR = 1e-9
"""A covariance whose smallest eigenvalue is less than this share of the largest gets a ridge."""

RIDGE = 1e-6
"""The ridge, as a share of the mean eigenvalue."""


def mahalanobis(rows: Tensor, mean: Tensor, whitening: Tensor) -> Tensor:
    """min over classes of (x − μ_c)ᵀ Σ⁻¹ (x − μ_c) (Lee et al. 2018, eq. 2; LSGM eq. 6, without
    its sign). rows: (N, D) float64; mean: (C, D); whitening: (D, D), A with A Aᵀ = Σ⁻¹. Returns
    (N,)."""
    centre = mean.mean(0)
    white = (rows - centre) @ whitening  # (N, D)
    means = (mean - centre) @ whitening  # (C, D)
    squares = torch.addmm(means.square().sum(1), white, means.T, alpha=-2)  # (N, C)
    nearest: Tensor = squares.amin(1) + white.square().sum(1)
    return nearest.clamp_min(0)


def whitened(covariance: Tensor, where: str) -> Tensor:
    """A with A Aᵀ = Σ⁻¹, by eigenvalues; a singular Σ gets a ridge, which is said, so that a
    channel that was dead in distribution counts when it wakes up. covariance: (D, D). Returns
    (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    largest = float(values[-1])
    if float(values[0]) <= SINGULAR * largest:
        ridge = RIDGE * float(values.mean()) or 1.0
        dead = int((values <= SINGULAR * largest).sum())
        condition = largest / float(values[0]) if float(values[0]) > 0 else torch.inf
        log.info(
            f"{where}: the covariance is singular ({dead} of {len(values)} directions, condition "
            f"{condition:.2g}), so {ridge:.2g} is added to its diagonal"
        )
        values = values.clamp_min(0) + ridge
    whitening: Tensor = (vectors / values.sqrt()).contiguous()
    return whitening


def tied_gaussians(
    train: Blocks, needs: frozenset[str], layers: Sequence[str], who: str
) -> Moments:
    """One pass over rows to fit on. Raises DetectorError without a row."""
    count = torch.zeros(0, dtype=torch.float64)
    total: dict[str, Tensor] = {}
    square: dict[str, Tensor] = {}
    for block in finite_rows(train, needs, who):
        label = class_of(block)
        if not len(count):
            count = torch.zeros(recorded(block.logits).shape[1], dtype=torch.float64)
        count += torch.bincount(label, minlength=len(count))
        for name in layers:
            rows = layer_rows(block, name)
            if name not in total:
                total[name] = rows.new_zeros(len(count), rows.shape[1])
                square[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            total[name].index_add_(0, label, rows)
            square[name].addmm_(rows.T, rows)
    present = count > 0
    mean = {name: total[name][present] / count[present, None] for name in layers}
    whitening = {}
    for name in layers:
        between = mean[name].T @ (mean[name] * count[present, None])
        whitening[name] = whitened((square[name] - between) / count.sum(), f"{who} at {name}")
    return mean, whitening


Moments = tuple[dict[str, Tensor], dict[str, Tensor]]
"""By layer: means (C, D) of the classes that have rows, and whitening (D, D) of the covariance that
they share, with divisor N."""


def needed(layers: Sequence[str]) -> frozenset[str]:
    return frozenset({"embedding" if name == EMBEDDING else "layers.mean" for name in layers})


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
    needs = frozenset({"embedding"})
    fitted = True
    heavy = True

    layer: str
    mean: Tensor
    whitening: Tensor

    @classmethod
    def fit_needs(cls, **hyperparameters: Any) -> frozenset[str]:
        return needed([hyperparameters.get("layer", EMBEDDING)]) | {"logits"}

    @classmethod
    def fit(cls, train: Blocks, *, layer: str = EMBEDDING) -> Self:
        """One pass; a (D, D) and a (K, D) sum are kept. layer: ``embedding`` or a layer's name."""
        mean, whitening = tied_gaussians(train, cls.fit_needs(layer=layer), [layer], cls.name)
        return cls(layer, mean[layer], whitening[layer])

    @property
    def score_needs(self) -> frozenset[str]:
        return needed([self.layer])

    def _score(self, test: Features) -> Tensor:
        return mahalanobis(layer_rows(test, self.layer), self.mean, self.whitening)


@dataclass(frozen=True)
class MDSSum(Detector):
    """Σ_l α_l · the distance of ``mds`` at layer l (LSGM eq. 5), over the stages' spatial means.

    α = 1, or learnt by logistic regression from OOD rows. mean: layer → (C, D_l); whitening: layer
    → (D_l, D_l); weight: (L,), in the order of ``layers``.
    """

    name = "mds-sum"
    source = "Lee et al. 2018; LSGM, eq. 5 and 6"
    about = "Mahalanobis distances summed over the stages; weights 1, or learnt from OOD rows"
    needs = frozenset({"layers.mean"})
    fitted = True
    heavy = True
    uses_ood = True
    explains = True

    layers: tuple[str, ...]
    mean: Mapping[str, Tensor]
    whitening: Mapping[str, Tensor]
    weight: Tensor

    @classmethod
    def fit_needs(cls, **hyperparameters: Any) -> frozenset[str]:
        return cls.needs | {"logits"}

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        layers: str = "stages",
        ood: Blocks | None = None,
        C: float = 1.0,  # noqa: N803
    ) -> Self:
        """One pass, with OOD rows a second one. layers: ``stages``, ``blocks`` or a regular
        expression. C: inverse strength of the logistic regression's penalty."""
        first = next(iter(finite_rows(train, cls.fit_needs(), cls.name)))
        names = chosen_layers(first, layers, cls.name)
        mean, whitening = tied_gaussians(train, cls.fit_needs(), names, cls.name)
        even = cls(tuple(names), mean, whitening, torch.ones(len(names), dtype=torch.float64))
        return even if ood is None else even._learnt(train, ood, C)

    def _learnt(self, train: Blocks, ood: Blocks, C: float) -> Self:  # noqa: N803
        from sklearn.linear_model import LogisticRegression

        groups = [
            torch.cat([self._distances(b) for b in finite_rows(blocks, self.needs, self.name)])
            for blocks in (train, ood)
        ]
        rows = torch.cat(groups)
        scale = rows.mean(0).clamp_min(torch.finfo(torch.float64).tiny)
        label = np.repeat([0, 1], [len(group) for group in groups])
        model = LogisticRegression(C=C, class_weight="balanced", max_iter=1000)
        model.fit((rows / scale).numpy(), label)
        weight = torch.from_numpy(model.coef_[0]) / scale
        if not (weight > 0).any():
            raise DetectorError(
                f"{self.name}: the OOD rows are nearer to the classes than the rows fitted on, so "
                "no layer tells them apart"
            )
        listed = ", ".join(
            f"{n} {w:.3g}" for n, w in zip(self.layers, weight.tolist(), strict=True)
        )
        log.info(f"{self.name}: weights learnt from {len(groups[1])} OOD rows: {listed}")
        return type(self)(self.layers, self.mean, self.whitening, weight)

    def _distances(self, test: Features) -> Tensor:
        """(N, L) squared distances."""
        return torch.stack(
            [
                mahalanobis(layer_rows(test, name), self.mean[name], self.whitening[name])
                for name in self.layers
            ],
            1,
        )

    def _score(self, test: Features) -> Tensor:
        return self._distances(test) @ self.weight

    def contributions(self, test: Features) -> tuple[Sequence[str], Tensor]:
        return self.layers, self._distances(test) * self.weight
