"""Prototype fusion: cosines with the means of the classes at several stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.class_statistics import class_means
from oodcli.detectors.ctm import largest_cosine
from oodcli.detectors.knn import unit
from oodcli.detectors.layer_choice import LAYERS, chosen_layers, layer_mean, layer_rows
from oodcli.features import Features


@dataclass(frozen=True)
class ProtoFusion(Detector):
    """Minus the mean over layers of the largest cosine between the layer's spatial means and the
    prototype of a class, the mean of its rows, each of length 1. Classes are the labels, where
    unknown the predicted ones; one without rows has no prototype.

    prototype: layer → (C, D_l).
    """

    name = "proto-fusion"
    source = "Prototype Fusion 2026, arXiv 2603.23677"
    about = "minus the cosine with the nearest class prototype, averaged over the stages"
    formula = r"""
        s = -\operatorname*{mean}_l \max_c
        \frac{x_l^\top \rho_{l,c}}{\lVert x_l \rVert \, \lVert \rho_{l,c} \rVert}, \qquad
        \rho_{l,c} = \operatorname*{mean}_{\hat x \in c} \frac{\hat x_l}{\lVert \hat x_l \rVert}
    """
    needs = frozenset({"layers.mean"})
    fit_also = frozenset({"logits"})
    fitted = True
    explains = True

    layers: tuple[str, ...]
    prototype: Mapping[str, Tensor]

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        layers: Annotated[str, f"{LAYERS}; by default the stages, as in the paper"] = "stages",
    ) -> Self:
        """One pass; a (K, D_l) sum a layer is kept. Raises DetectorError when there is no row, or
        no such layer."""
        first = next(iter(finite_rows(train, cls.fit_needs(), cls.name)))
        names = chosen_layers(first, layers, cls.name)
        widths = [layer_rows(first, name).shape[1] for name in names]

        def rows(block: Features) -> Tensor:
            return torch.cat([unit(layer_rows(block, name)) for name in names], 1)

        count, mean = class_means(finite_rows(train, cls.fit_needs(), cls.name), rows)
        parts = torch.split(mean[count > 0], widths, 1)
        prototype = {name: part.contiguous() for name, part in zip(names, parts, strict=True)}
        return cls(tuple(names), prototype)

    @property
    def layers_read(self) -> frozenset[str] | None:
        return frozenset(self.layers)

    def contributions(self, test: Features) -> tuple[Sequence[str], Tensor]:
        """Minus the largest cosine at each layer, by the number of layers."""
        found = []
        for name in self.layers:
            prototype = self.prototype[name]
            rows = layer_mean(test, name, self.name, prototype.shape[1])
            found.append(-largest_cosine(rows, prototype) / len(self.layers))
        return self.layers, torch.stack(found, 1)

    def _score(self, test: Features) -> Tensor:
        return self.contributions(test)[1].sum(1)
