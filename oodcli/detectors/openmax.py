"""OpenMax (Bendale & Boult 2016): a further class for what lies far from the classes' logits."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.class_statistics import class_of
from oodcli.detectors.hyperparameters import require_positive
from oodcli.detectors.widened import WIDEN, widened
from oodcli.errors import DetectorError
from oodcli.features import Features, recorded

log = logging.getLogger(__name__)

SHAPES = 1e-2, 1e4
"""Bounds of the Weibull distributions' shape: all tail distances may be nearly equal."""

STEPS = 80
"""Of a bisection between them."""


def weibull(tails: Tensor) -> Tensor:
    """Shift, scale and shape of a Weibull distribution for each class, by maximum likelihood of the
    differences to the smallest distance; shape 0 for fewer than two different differences, which
    means F = 0.

    tails: (K, τ) distances, NaN where there are fewer. Returns (K, 3) float64.
    """
    shift = tails.nan_to_num(torch.inf).amin(1)
    x = tails - shift[:, None]
    largest = x.nan_to_num(0).amax(1)
    x = x / torch.where(largest > 0, largest, 1.0)[:, None]  # at most 1
    inside = x > 0  # false for NaN
    count = inside.sum(1)
    log_x = torch.where(inside, x, 1.0).log()
    mean_log = log_x.sum(1) / count.clamp_min(1)
    low, high = (torch.full_like(shift, end) for end in SHAPES)
    for _ in range(STEPS):
        shape = (low * high).sqrt()
        power = torch.exp(shape[:, None] * log_x) * inside
        slope = (power * log_x).sum(1) / power.sum(1).clamp_min(1e-300) - 1 / shape - mean_log
        low, high = torch.where(slope > 0, low, shape), torch.where(slope > 0, shape, high)
    shape = (low * high).sqrt()
    mean_power = (torch.exp(shape[:, None] * log_x) * inside).sum(1) / count.clamp_min(1)
    scale = largest * mean_power.clamp_min(1e-300) ** (1 / shape)
    fitted = (count > 1) & (log_x.amin(1) < 0)
    found = torch.stack([shift, scale, shape], 1)
    return torch.where(fitted[:, None], found, 0.0)


def distribution(distance: Tensor, law: Tensor) -> Tensor:
    """F(d) = 1 − exp(−((d − shift)/scale)^shape), 0 at or below the shift, and where the shape is
    0. distance: (N,); law: (N, 3). Returns (N,)."""
    shift, scale, shape = law.unbind(1)
    known = (shape > 0) & (distance > shift)
    relative = torch.where(known, (distance - shift) / torch.where(scale > 0, scale, 1.0), 0.0)
    return torch.where(known, -torch.expm1(-(relative**shape)), 0.0)


def unknown_log_odds(logits: Tensor, centre: Tensor, law: Tensor, alpha: int) -> Tensor:
    """v_0 − log Σ e^{v_c}: log odds of the further class (Bendale & Boult 2016, alg. 2), which do
    not saturate as its probability does.

    logits: (N, K); centre: (K, K), zero for classes without rows; law: (K, 3); alpha: ranks.
    Returns (N,) float64, higher = more OOD.
    """
    z = logits.double()
    ranked = z.argsort(dim=1, descending=True, stable=True)
    kept, moved = z.clone(), torch.zeros_like(z[:, 0])
    alpha = min(alpha, z.shape[1])
    for rank in range(alpha):
        which = ranked[:, rank]
        distance = (z - centre[which]).norm(dim=1)
        share = (alpha - rank) / alpha * distribution(distance, law[which])  # 1 − ω
        value = z.gather(1, which[:, None])[:, 0]
        moved = moved + value * share
        kept.scatter_(1, which[:, None], (value * (1 - share))[:, None])
    return moved - torch.logsumexp(kept, 1)


def _right(train: Blocks) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels of the rows that are classified rightly, block by block."""
    for block in finite_rows(train, OpenMax.needs, OpenMax.name):
        z, label = recorded(block.logits).double(), class_of(block)
        right = z.argmax(1) == label
        yield z[right], label[right]


def _with(tails: Tensor, distance: Tensor, label: Tensor) -> Tensor:
    """The largest distances of each class. tails: (K, τ), NaN where there are fewer; distance,
    label: (N,) of further rows."""
    most = tails.shape[1]
    old = ~tails.isnan()
    values = torch.cat([tails[old], distance])
    classes = torch.cat([old.nonzero()[:, 0], label])
    order = values.argsort(descending=True)
    order = order[classes[order].argsort(stable=True)]  # by class, then from the largest
    values, classes = values[order], classes[order]
    sizes = torch.bincount(classes, minlength=len(tails))
    place = torch.arange(len(values)) - (sizes.cumsum(0) - sizes)[classes]
    kept = place < most
    found = torch.full_like(tails, torch.nan)
    found[classes[kept], place[kept]] = values[kept]
    return found


@dataclass(frozen=True)
class OpenMax(Detector):
    """Log odds of a further class. It takes a share 1 − ω of the α largest logits, according to how
    far z is from a_c, the mean logits of the rows of class c that are classified rightly: F_c is a
    Weibull distribution fitted to the τ largest distances of those.

    centre: a, (K, K); law: shift, scale and shape of each F_c, (K, 3), 0 where F_c = 0.
    """

    name = "openmax"
    source = "Bendale & Boult, CVPR 2016, alg. 1-2"
    about = "log odds of a further class for logits in the tail of their distance to the class mean"
    formula = r"""
        s = v_0 - \log \sum_c e^{v_c}, \qquad v_c = \omega_c z_c, \qquad
        v_0 = \sum_c (1 - \omega_c) z_c

        \omega_{c(i)} = 1 - \frac{\alpha - i + 1}{\alpha} F_{c(i)}(\lVert z - a_{c(i)} \rVert),
        \qquad i = 1 \dots \alpha
    """
    needs = frozenset({"logits", "logits.level"})
    fitted = True
    better_on_real = True
    widens = True

    centre: Tensor
    law: Tensor
    alpha: int

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        tail: Annotated[
            int, "τ, how many distances of a class make its tail, above 1; default of the authors"
        ] = 20,
        alpha: Annotated[
            int, "how many of the largest logits are revised, at most K; OpenOOD's, not tuned"
        ] = 3,
        widen: Annotated[float | None, WIDEN] = None,
    ) -> Self:
        """Two passes, two more to widen; a (K, K) sum and τ distances a class are kept. Rows
        without a label count as the class that is predicted. Raises DetectorError when no row is
        classified rightly, and for a share outside 0 … 1."""
        require_positive(cls.name, alpha=alpha)
        if tail < 2:
            raise DetectorError(f"{cls.name}.tail={tail} must be at least 2")
        train = widened(train, cls.needs, cls.name, widen)
        total = count = torch.zeros(0)
        for z, label in _right(train):
            if not len(count):
                count = z.new_zeros(z.shape[1])
                total = z.new_zeros(z.shape[1], z.shape[1])
            count += torch.bincount(label, minlength=len(count))
            total.index_add_(0, label, z)
        if not count.sum() > 0:
            raise DetectorError(f"{cls.name}: no row to fit on is classified as its label")
        centre = total / count.clamp_min(1)[:, None]
        tails = torch.full((len(count), tail), torch.nan, dtype=torch.float64)
        for z, label in _right(train):
            tails = _with(tails, (z - centre[label]).norm(dim=1), label)
        law = weibull(tails)
        poor = int((law[:, 2] == 0).sum())
        if poor:
            log.info(
                f"{cls.name}: {poor} of {len(law)} classes have fewer than three different rows "
                "that are classified rightly, so their logits are not revised"
            )
        return cls(centre, law, alpha)

    def _score(self, test: Features) -> Tensor:
        return unknown_log_odds(recorded(test.logits), self.centre, self.law, self.alpha)
