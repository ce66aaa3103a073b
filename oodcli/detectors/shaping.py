"""Shaping of the embedding: ASH, SCALE and LTS compare all of u with its largest entries.

Percentiles are in percent. Negative entries count as 0, except where ``scale`` and ``lts`` multiply
all of u or of the logits.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from oodcli import notes
from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import by_rows
from oodcli.detectors.energy import energy
from oodcli.detectors.hyperparameters import require_percent
from oodcli.features import Features, LinearHead, recorded

log = logging.getLogger(__name__)

SIGNED_FROM = 0.01
"""Share of negative entries in a block from which a note is logged."""

SIGNED = (
    "more than 1 % of the embedding's entries are negative: ash-*, scale and lts count them as 0 "
    "and are often poor on such networks (ViT, Swin); ras takes both signs"
)


def largest_count(width: int, p: float) -> int:
    """How many of ``width`` entries are above the percentile p, at least 1."""
    return max(1, width - round(width * p / 100))


def positive_part(test: Features) -> Tensor:
    """max(u, 0), (N, D) float64. Logs once in a process that there are many negative entries."""
    u = recorded(test.embedding).double()
    if float((u < 0).sum()) > SIGNED_FROM * u.numel():
        notes.once(log, SIGNED)
    return u.clamp_min(0)


def ascending(u: Tensor) -> Tensor:
    """Each row sorted, of the same shape and type: of float32, NumPy's sort takes a tenth of the
    time of torch's sort or topk. u: (N, D)."""
    if u.device.type != "cpu":
        return u.sort(dim=1).values
    return torch.from_numpy(np.sort(u.numpy(), axis=1))


def ranked(test: Features) -> Tensor:
    """max(u, 0) of each row in ascending order, (N, D), of the embedding's type. All detectors of
    this file share it."""
    return ascending(test.shared(positive_part).to(recorded(test.embedding).dtype))


def ratio(test: Features, p: float) -> Tensor:
    """r = Σ u / Σ of the largest entries of u, those above the percentile p; 1 where u = 0.
    Returns (N,) float64 in 1 … D/q for the q largest of D entries."""
    return _ratio(test.shared(ranked), p)


def sum_over_largest(u: Tensor, p: float) -> Tensor:
    """The same of any entries of at least 0. u: (N, D)."""
    return _ratio(ascending(u), p)


def _ratio(ordered: Tensor, p: float) -> Tensor:
    width = ordered.shape[1]
    split = width - largest_count(width, p)

    def some(ordered: Tensor) -> Tensor:
        rest, top = ordered.double().tensor_split([split], dim=1)
        sums = top.sum(1)
        return torch.where(sums > 0, (rest.sum(1) + sums) / sums, 1.0)

    return by_rows(some, ordered)


def largest(u: Tensor, ordered: Tensor, q: int) -> Tensor:
    """(N, D) bool: the q largest entries of each row, of equal ones the first. u: (N, D); ordered:
    (N, D), its rows sorted."""
    least = ordered[:, -q, None]
    found = u >= least
    if q < u.shape[1]:
        tied = ordered[:, -q - 1] == least[:, 0]  # more than q entries are as large
        if tied.any():
            some, bound = u[tied], least[tied]
            above, equal = some > bound, some == bound
            found[tied] = above | (equal & (equal.cumsum(1) <= q - above.sum(1, keepdim=True)))
    return found


def pruned_product(test: Features, p: float) -> Tensor:
    """W u' of the pruned embedding u', which has the largest entries of u, those above the
    percentile p, and else 0. Returns (N, K) float64. ``ash-p`` and ``ash-s`` share it."""
    weight = recorded(test.head).double.weight

    def some(u: Tensor, ordered: Tensor) -> Tensor:
        kept = largest(u, ordered, largest_count(u.shape[1], p))
        product: Tensor = (u * kept) @ weight.T
        return product

    return by_rows(some, test.shared(positive_part), test.shared(ranked))


def scaled_energy(product: Tensor, r: Tensor, head: LinearHead) -> Tensor:
    """−logsumexp(eʳ·Wu + b): the energy of u·eʳ without another product. product: Wu, (N, K);
    r: (N,). Returns (N,) float64."""
    return energy(product * r.exp()[:, None] + head.bias.double())


@dataclass(frozen=True)
class Scale(Detector):
    """Free energy of the head on u·eʳ. r compares the sum of u with that of its largest entries,
    T: those above the percentile p, in percent. An embedding with few high entries has a small r.
    """

    name = "scale"
    source = "Xu et al., ICLR 2024"
    about = "free energy of the head on the embedding scaled by exp(sum/sum of its largest entries)"
    formula = r"""
        s = -\log \sum_c e^{z'_c}, \qquad z' = e^r W u + b, \qquad
        r = \frac{\sum_i u_i}{\sum_{i \in T} u_i}
    """
    needs = frozenset({"logits", "logits.level", "embedding", "head"})

    p: Annotated[float, "percentile, in percent, 1 to 99; default of the authors' code"] = 85.0

    def __post_init__(self) -> None:
        require_percent(self.name, p=self.p)

    def _score(self, test: Features) -> Tensor:
        head = recorded(test.head)
        product = recorded(test.logits).double() - head.bias.double()
        return scaled_energy(product, test.shared(ratio, self.p), head)


@dataclass(frozen=True)
class LTS(Detector):
    """Free energy of the logits times r². r compares the sum of u with that of its largest
    entries, T: those above the percentile p, in percent."""

    name = "lts"
    source = "Djurisic et al. 2024, arXiv 2409.01175"
    about = "free energy of the logits scaled by (sum/sum of the largest entries of u)²"
    formula = r"""
        s = -\log \sum_c e^{r^2 z_c}, \qquad r = \frac{\sum_i u_i}{\sum_{i \in T} u_i}
    """
    needs = frozenset({"logits", "logits.level", "embedding"})

    p: Annotated[float, "percentile, in percent, 1 to 99; the paper's for every network"] = 95.0

    def __post_init__(self) -> None:
        require_percent(self.name, p=self.p)

    def _score(self, test: Features) -> Tensor:
        r = test.shared(ratio, self.p)
        return energy(recorded(test.logits).double() * r.square()[:, None])


P = "percentile, in percent, 1 to 99; OpenOOD's default, which was not tuned"


@dataclass(frozen=True)
class ASHP(Detector):
    """Free energy of the head on the largest entries of u, T: those above the percentile p, in
    percent; the others are 0."""

    name = "ash-p"
    source = "Djurisic et al., ICLR 2023, ASH-P"
    about = "free energy of the head on the largest entries of the embedding"
    formula = r"""
        s = -\log \sum_c e^{z'_c}, \qquad z' = W u' + b, \qquad
        u'_i = u_i \text{ for } i \in T, \text{ else } 0
    """
    needs = frozenset({"embedding", "head"})

    p: Annotated[float, P] = 90.0

    def __post_init__(self) -> None:
        require_percent(self.name, p=self.p)

    def _score(self, test: Features) -> Tensor:
        head = recorded(test.head)
        return energy(test.shared(pruned_product, self.p) + head.bias.double())


@dataclass(frozen=True)
class ASHB(Detector):
    """Free energy of the head on u', whose q largest entries, T: those above the percentile p, in
    percent, share the sum of u equally; the others are 0. If u = 0, it stays."""

    name = "ash-b"
    source = "Djurisic et al., ICLR 2023, ASH-B"
    about = "free energy of the head with the embedding's sum shared by its largest entries"
    formula = r"""
        s = -\log \sum_c e^{z'_c}, \qquad z' = W u' + b, \qquad
        u'_i = \frac{1}{q} \sum_j u_j \text{ for } i \in T, \text{ else } 0
    """
    needs = frozenset({"embedding", "head"})

    p: Annotated[float, P] = 90.0

    def __post_init__(self) -> None:
        require_percent(self.name, p=self.p)

    def _score(self, test: Features) -> Tensor:
        head = recorded(test.head)
        weight, bias = head.double.weight, head.double.bias

        def some(u: Tensor, ordered: Tensor) -> Tensor:
            q = largest_count(u.shape[1], self.p)
            share = u.sum(1, keepdim=True) / q
            return energy((largest(u, ordered, q).double() @ weight.T) * share + bias)

        return by_rows(some, test.shared(positive_part), test.shared(ranked))


@dataclass(frozen=True)
class ASHS(Detector):
    """Free energy of the head on the largest entries of u times eʳ, T: those above the percentile
    p, in percent; the others are 0."""

    name = "ash-s"
    source = "Djurisic et al., ICLR 2023, ASH-S"
    about = "free energy of the head on the largest entries of the embedding, scaled by exp(ratio)"
    formula = r"""
        s = -\log \sum_c e^{z'_c}, \qquad z' = e^r W u' + b, \qquad
        u'_i = u_i \text{ for } i \in T, \text{ else } 0, \qquad
        r = \frac{\sum_i u_i}{\sum_{i \in T} u_i}
    """
    needs = frozenset({"embedding", "head"})

    p: Annotated[float, P] = 90.0

    def __post_init__(self) -> None:
        require_percent(self.name, p=self.p)

    def _score(self, test: Features) -> Tensor:
        product = test.shared(pruned_product, self.p)
        return scaled_energy(product, test.shared(ratio, self.p), recorded(test.head))
