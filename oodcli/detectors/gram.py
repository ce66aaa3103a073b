"""Gram-matrix bounds (Sastry & Oore 2020): how far the correlations of channels leave the range
that they have in distribution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.class_statistics import predicted_among
from oodcli.errors import DetectorError
from oodcli.features import Features, recorded
from oodcli.float64 import in_float64

ORDERS = 10
AT_ONCE = 1 << 22
"""Entries of a float64 copy that are in memory at once, if an image has no more."""

EPSILON = 1e-6
"""What the authors' code adds to a bound before it divides by it."""


def gram_sums(activation: Tensor) -> Tensor:
    """Row sums of the Gram matrices of orders p = 1 … 10: with G = F^p (F^p)ᵀ, F (C, HW), the
    signed p-th root of Σ_j G_ij (Sastry & Oore 2020, §3; the root after the sum, as in their code).

    activation: (N, C, …). Returns (N, 10·C) float32, order by order. No C×C matrix is formed: the
    sum over its row is F^p times the sum of all channels' F^p. Float64 copies are made of a few
    images at a time.
    """
    flat = activation.flatten(2) if activation.ndim > 2 else activation[:, :, None]
    some = max(1, AT_ONCE // (flat.shape[1] * flat.shape[2]))
    parts = [_gram_sums(in_float64(each)) for each in torch.split(flat, some)]
    return torch.cat(parts).to(flat.device)


def _gram_sums(flat: Tensor) -> Tensor:
    """The same of (N, C, P) float64."""
    largest = flat.abs().amax((1, 2), keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    scaled = flat / largest  # powers of it do not overflow
    power = scaled.clone()
    found = []
    for order in range(1, ORDERS + 1):
        if order > 1:
            power *= scaled
        sums = (power @ power.sum(1)[:, :, None])[:, :, 0]  # (N, C)
        found.append(sums.sign() * sums.abs() ** (1 / order) * largest[:, :, 0].square())
    return torch.cat(found, 1).float()


def gram_deviation(rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(N,) float64: Σ of how far each entry lies outside [low, high], as a share of the bound
    (Sastry & Oore 2020, eq. 3). rows, low, high: (N, F)."""
    below = (low - rows).clamp_min(0) / (low.abs() + EPSILON)
    above = (rows - high).clamp_min(0) / (high.abs() + EPSILON)
    return (below + above).sum(1)


@dataclass(frozen=True)
class Gram(Detector):
    """Deviation of the row sums g from the smallest and largest ones of the predicted class, each
    layer's divided by its expectation in distribution, summed over the stages. F: a stage's output,
    channels × positions; powers are taken entry by entry.

    low, high: layer → (K, 10·C). expected: layer → (). present: (K,) bool. The expectation, which
    the paper takes from held-out images, is that of the rows fitted on, each measured by the bounds
    of all the others: only a row that holds a bound deviates, by its distance to the second.
    """

    name = "gram"
    source = "Sastry & Oore 2020"
    about = "row sums of Gram matrices outside the range of the predicted class"
    formula = r"""
        s = \sum_l \frac{\delta_l}{\operatorname{E}[\delta_l]},
        \qquad \delta_l = \sum \Bigl[\frac{(\text{low} - g)_+}{\lvert \text{low} \rvert + 10^{-6}}
        + \frac{(g - \text{high})_+}{\lvert \text{high} \rvert + 10^{-6}}\Bigr]

        g_q = \Bigl(\sum_j \bigl(F^q (F^q)^\top\bigr)_{\cdot j}\Bigr)^{1/q},
        \qquad q = 1, \dots, 10
    """
    needs = frozenset({"logits", "layers.gram"})
    fitted = True
    better_on_real = True

    low: Mapping[str, Tensor]
    high: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]
    present: Tensor

    @classmethod
    def fit(cls, train: Blocks) -> Self:
        """One pass; four bounds a class and feature are kept. Raises DetectorError without a row,
        or where no class has two."""
        lows: dict[str, Tensor] = {}
        highs: dict[str, Tensor] = {}
        count = torch.zeros(0, dtype=torch.int64)
        for block in finite_rows(train, cls.needs, cls.name):
            logits = recorded(block.logits)
            classes = logits.shape[1]
            predicted = logits.argmax(1)
            count = count if len(count) else torch.zeros(classes, dtype=torch.int64)
            count += torch.bincount(predicted, minlength=classes)
            for name, layer in block.layers.items():
                if layer.gram is None:
                    continue
                if name not in lows:
                    lows[name] = torch.full((classes, 2, layer.gram.shape[1]), torch.inf)
                    highs[name] = torch.full_like(lows[name], -torch.inf)
                for c in set(predicted.tolist()):
                    rows = layer.gram[predicted == c]
                    low, high = lows[name][c], highs[name][c]
                    low[:] = torch.cat([low, rows]).topk(2, dim=0, largest=False).values
                    high[:] = torch.cat([high, rows]).topk(2, dim=0).values
        several = count > 1
        if not several.any():
            raise DetectorError(f"{cls.name}: no class has two rows, so there are no bounds")
        expected = {}
        for name in lows:
            low, high = lows[name][several].double(), highs[name][several].double()
            apart = gram_deviation(low[:, 0], low[:, 1], high[:, 1])
            apart += gram_deviation(high[:, 0], low[:, 1], high[:, 1])
            mean = apart.sum() / count[several].sum()
            expected[name] = mean if mean > 0 else torch.ones_like(mean)
        first = {name: bounds[:, 0].clone() for name, bounds in lows.items()}
        last = {name: bounds[:, 0].clone() for name, bounds in highs.items()}
        return cls(first, last, expected, several)

    def _score(self, test: Features) -> Tensor:
        c = predicted_among(recorded(test.logits), self.present)
        total = torch.zeros(len(test), dtype=torch.float64, device=c.device)
        for name, expected in self.expected.items():
            layer = test.layers.get(name)
            if layer is None or layer.gram is None:
                raise DetectorError(f"{self.name}: the layer {name} was not recorded")
            deviation = gram_deviation(layer.gram.double(), self.low[name][c], self.high[name][c])
            total += deviation / expected
        return total
