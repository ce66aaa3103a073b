"""Mahalanobis distances to the nearest class, summed over layers (LSGM, eq. 5)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Self

import numpy as np
import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.layer_choice import LAYERS, chosen_layers, layer_rows
from oodcli.detectors.tied_gaussians import WhiteMeans, mahalanobis, tied_gaussians, white_means
from oodcli.errors import DetectorError
from oodcli.features import Features

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MDSSum(Detector):
    """Σ_l α_l · the distance of ``mds`` at layer l (LSGM eq. 5), over the stages' spatial means.
    α = 1, or learnt by logistic regression from OOD rows.

    mean: layer → (C, D_l); whitening: layer
    → (D_l, D_l); weight: (L,), in the order of ``layers``.
    """

    name = "mds-sum"
    source = "Lee et al. 2018; LSGM, eq. 5 and 6"
    about = "Mahalanobis distances summed over the stages; weights 1, or learnt from OOD rows"
    formula = r"""
        s = \sum_l \alpha_l \min_c \, (x_l - \mu_{l,c})^\top \Sigma_l^{-1} (x_l - \mu_{l,c})
    """
    needs = frozenset({"layers.mean"})
    fit_also = frozenset({"logits"})
    fitted = True
    better_on_real = True
    heavy = True
    uses_ood = True
    explains = True

    layers: tuple[str, ...]
    mean: Mapping[str, Tensor]
    whitening: Mapping[str, Tensor]
    weight: Tensor

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        layers: Annotated[str, LAYERS] = "stages",
        ood: Blocks | None = None,
        C: Annotated[  # noqa: N803
            float, "inverse strength of the penalty on the learnt weights; only with --ood"
        ] = 1.0,
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
                "no layer separates them"
            )
        listed = ", ".join(
            f"{n} {w:.3g}" for n, w in zip(self.layers, weight.tolist(), strict=True)
        )
        log.info(f"{self.name}: weights learnt from {len(groups[1])} OOD rows: {listed}")
        return type(self)(self.layers, self.mean, self.whitening, weight)

    @cached_property
    def _white(self) -> Mapping[str, WhiteMeans]:
        return {name: white_means(self.mean[name], self.whitening[name]) for name in self.layers}

    def _distances(self, test: Features) -> Tensor:
        """(N, L) squared distances."""
        return torch.stack(
            [
                mahalanobis(
                    layer_rows(test, name), self.mean[name], self.whitening[name], self._white[name]
                )
                for name in self.layers
            ],
            1,
        )

    def _score(self, test: Features) -> Tensor:
        return self._distances(test) @ self.weight

    @property
    def layers_read(self) -> frozenset[str] | None:
        return frozenset(self.layers)

    def contributions(self, test: Features) -> tuple[Sequence[str], Tensor]:
        return self.layers, self._distances(test) * self.weight
