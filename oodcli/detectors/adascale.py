"""AdaSCALE (Regmi 2025): SCALE and LTS with a percentile for each image, by how far its embedding
moves when the image is changed a little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.energy import energy
from oodcli.detectors.hyperparameters import require_fraction, require_percent, require_positive
from oodcli.detectors.shaping import largest_count, positive_part, scaled_energy
from oodcli.errors import DetectorError
from oodcli.features import AdaScaleStep, Features, recorded

FITTED_ON = frozenset({"embedding", "adascale.u"})
"""Records that ``fit`` reads."""

MOST = 5000
"""Order statistics that stand for the rows of a fit: of more rows, these are evenly spaced."""


def shift(u: Tensor, moved: Tensor, top: float, level: float, weight: float) -> Tensor:
    """Q' = λ Σ |u − u'| over the largest ``top`` percent of u, plus Σ max(u', 0) over its largest
    ``level`` percent (Regmi 2025). u, moved: (N, D), moved = u'. weight: λ. Returns (N,)
    float64."""
    u, moved = u.double(), moved.double()
    first, second = (u.topk(largest_count(u.shape[1], 100 - p), dim=1)[1] for p in (top, level))
    far = (u - moved).abs().gather(1, first).sum(1)
    return weight * far + moved.clamp_min(0).gather(1, second).sum(1)


def order_statistics(values: Tensor, most: int) -> Tensor:
    """All values in ascending order, or ``most`` of them, so that the share of these that a number
    reaches differs by at most 1/most. values: (N,). Returns (M,)."""
    count = len(values)
    values = values.sort().values
    if count <= most:
        return values
    ranks = torch.arange(1, most + 1) * count // most - 1
    return values[ranks]


def percentile_of_each(q: Tensor, known: Tensor, low: float, high: float) -> Tensor:
    """p = low + (1 − F(Q'))·(high − low), F the share of the known values that are at most Q'
    (Regmi 2025). q: (N,), known: (M,) ascending. Returns (N,) float64, in percent."""
    share = torch.searchsorted(known, q.contiguous(), right=True) / len(known)
    return low + (1 - share.double()) * (high - low)


def sum_over_largest_of_each(u: Tensor, p: Tensor) -> Tensor:
    """r = Σ u / Σ of the largest entries of u, those above a percentile p for each row; 1 where
    u = 0. u: (N, D), not negative. p: (N,), in percent. Returns (N,) float64."""
    width = u.shape[1]
    counts = (width - (width * p / 100).round().long()).clamp_min(1)
    top = u.topk(int(counts.max()), dim=1).values.cumsum(1).gather(1, counts[:, None] - 1)[:, 0]
    return torch.where(top > 0, u.sum(1) / top, 1.0)


@dataclass(frozen=True)
class AdaScaleL(Detector):
    """Free energy of the logits times r², as ``lts``, with a percentile p for each image. x' is the
    image with the values of smallest gradient moved by ε, u' its embedding. Q' is large where u' is
    far from u: such an image gets a small p, so a small r and a small scale. T are the largest
    entries of u, above p percent; T₁ and T₅ are the largest 1 and 5 percent.

    F is the empirical distribution of Q' over the rows fitted on.
    """

    name = "adascale-l"
    source = "Regmi 2025, arXiv 2503.08023, AdaSCALE-L"
    about = "lts with a percentile for each image, by its embedding's shift under a small change"
    formula = r"""
        s = -\log \sum_c e^{r^2 z_c}, \qquad r = \frac{\sum_i u_i}{\sum_{i \in T} u_i}, \qquad
        p = p_{min} + (1 - F(Q')) (p_{max} - p_{min})

        Q' = \lambda \sum_{i \in T_1} |u_i - u'_i| + \sum_{i \in T_5} \max(u'_i, 0)

        x' = x + \varepsilon \operatorname{sign}(\nabla_x z_k)
        \text{ where } |\nabla_x z_k| \text{ is smallest, else } x
    """
    needs = frozenset({"logits", "logits.level", "embedding", "adascale.u"})
    fitted = True
    quantiles: Tensor
    low: float
    high: float
    top: float
    level: float
    weight: float
    epsilon: float
    fraction: float

    @classmethod
    def fit_needs(cls, **hyperparameters: Any) -> frozenset[str]:
        return FITTED_ON

    @classmethod
    def records_with(cls, **hyperparameters: Any) -> AdaScaleStep:
        how = AdaScaleStep()
        epsilon = hyperparameters.get("epsilon", how.epsilon)
        fraction = hyperparameters.get("fraction", how.fraction)
        require_positive(cls.name, epsilon=epsilon, fraction=fraction)
        require_fraction(cls.name, fraction=fraction)
        return AdaScaleStep(epsilon, fraction)

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        low: Annotated[
            float, "p of the image that moves most, in percent, 1 to 99; OpenOOD's, not tuned"
        ] = 75.0,
        high: Annotated[
            float, "p of the image that moves least, in percent, 1 to 99; OpenOOD's, not tuned"
        ] = 85.0,
        top: Annotated[
            float, "percent of u's largest entries whose shift counts, 1 to 99; the paper's"
        ] = 1.0,
        level: Annotated[
            float, "percent of u's largest entries whose new value counts, 1 to 99; the paper's"
        ] = 5.0,
        weight: Annotated[float, "of the shift, λ, above 0; the paper's"] = 10.0,
        epsilon: Annotated[
            float, "change of a value of the normalised image, above 0; of the authors' code"
        ] = AdaScaleStep.epsilon,
        fraction: Annotated[
            float, "share of the image's values that are changed, 0 to 1; the paper's"
        ] = AdaScaleStep.fraction,
    ) -> Self:
        """Raises DetectorError for values out of range, and for rows that were recorded with
        another epsilon or fraction."""
        require_percent(cls.name, low=low, high=high, top=top, level=level)
        require_positive(cls.name, weight=weight)
        if low > high:
            raise DetectorError(f"{cls.name}.low={low:g} must not be above high={high:g}")
        how = cls.records_with(epsilon=epsilon, fraction=fraction)
        found = []
        for block in finite_rows(train, FITTED_ON, cls.name):
            block.require_made_with(how, cls.name)
            u, moved = recorded(block.embedding), recorded(block.adascale_u)
            found.append(shift(u, moved, top, level, weight).cpu())
        quantiles = order_statistics(torch.cat(found), MOST)
        return cls(quantiles, low, high, top, level, weight, epsilon, fraction)

    @property
    def made_with(self) -> AdaScaleStep:
        return AdaScaleStep(self.epsilon, self.fraction)

    def _ratio(self, test: Features) -> Tensor:
        """r of each row, (N,) float64."""
        u, moved = recorded(test.embedding), recorded(test.adascale_u)
        q = shift(u, moved, self.top, self.level, self.weight)
        p = percentile_of_each(q, self.quantiles.to(q.device), self.low, self.high)
        return sum_over_largest_of_each(test.shared(positive_part), p)

    def _score(self, test: Features) -> Tensor:
        return energy(recorded(test.logits).double() * self._ratio(test).square()[:, None])


@dataclass(frozen=True)
class AdaScaleA(AdaScaleL):
    """Free energy of the head on u·eʳ, as ``scale``, with a percentile p for each image, found as
    in ``adascale-l``: from the shift Q' of the embedding under a small change of the image."""

    name = "adascale-a"
    source = "Regmi 2025, arXiv 2503.08023, AdaSCALE-A"
    about = "scale with a percentile for each image, by its embedding's shift under a small change"
    formula = r"""
        s = -\log \sum_c e^{z'_c}, \qquad z' = e^r W u + b, \qquad
        r = \frac{\sum_i u_i}{\sum_{i \in T} u_i}, \qquad
        p = p_{min} + (1 - F(Q')) (p_{max} - p_{min})

        Q' = \lambda \sum_{i \in T_1} |u_i - u'_i| + \sum_{i \in T_5} \max(u'_i, 0)

        x' = x + \varepsilon \operatorname{sign}(\nabla_x z_k)
        \text{ where } |\nabla_x z_k| \text{ is smallest, else } x
    """
    needs = frozenset({"logits", "logits.level", "embedding", "head", "adascale.u"})

    def _score(self, test: Features) -> Tensor:
        head = recorded(test.head)
        product = recorded(test.logits).double() - head.bias.double()
        return scaled_energy(product, self._ratio(test), head)
