"""WeiPer (Granz et al. 2024): logits of many perturbed heads, and how their values spread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, drawn_rows, finite_rows
from oodcli.detectors.hyperparameters import require_positive
from oodcli.features import Features, LinearHead, recorded

EPSILON = 0.01
EPSILON_PERTURBED = 0.025
"""Added to each bin of the histograms of u and of the logits, as in the authors' code."""

ROWS_OF_WEIGHTS = 1024
"""Of perturbed heads that are in memory at once, if a head has no more."""


def perturbed_logits(
    embedding: Tensor, head: LinearHead, delta: float, copies: int, seed: int
) -> Iterator[Tensor]:
    """The logits Wu + b + δ‖w_c‖ n_c·u of heads with perturbed weights, n_c random of length 1
    (Granz et al. 2024, §3.1): for a seed always the same ones, some heads at a time, because the
    n_c of all may not fit into memory. embedding: (N, D). Yields (N, G, K) float64, of G heads
    each."""
    generator = torch.Generator().manual_seed(seed)
    u, weight = embedding.double(), head.double.weight
    plain = (u @ weight.T + head.double.bias)[:, None]  # (N, 1, K)
    length = delta * weight.norm(dim=1)
    some = min(copies, max(1, ROWS_OF_WEIGHTS // len(weight)))
    space = weight.new_empty(some, *weight.shape)  # new memory would take as long as the noise
    for start in range(0, copies, some):
        noise = space[: copies - start]  # (G, K, D)
        for each in noise:
            each.copy_(torch.randn(weight.shape, generator=generator))
        along = (u @ noise.flatten(0, 1).T).view(len(u), *noise.shape[:2])
        yield along.mul_(length / noise.norm(dim=2)).add_(plain)


def counts(values: Tensor, range_: Tensor, bins: int) -> Tensor:
    """(N, bins) float64: how many values of each row are in each part of the range; those outside
    do not count. values: (N, n); range_: (2,)."""
    low, high = range_.unbind()
    width = torch.where(high > low, high - low, 1.0)
    place = ((values - low) * (bins / width)).floor().clamp(0, bins - 1).long()
    place = torch.where((values >= low) & (values <= high), place, bins)
    found = values.new_zeros(len(values), bins + 1)
    return found.scatter_add_(1, place, torch.ones_like(values))[:, :-1]


def smoothed(histogram: Tensor, size: int) -> Tensor:
    """Moving mean over ``size`` bins, the ends repeated. histogram: (N, bins)."""
    before = (size - 1) // 2
    padded = F.pad(histogram[:, None], (before, size - 1 - before), mode="replicate")
    return F.avg_pool1d(padded, size, stride=1)[:, 0]


def divergence(histogram: Tensor, usual: Tensor, size: int, epsilon: float) -> Tensor:
    """KL(P̄ ‖ P) + KL(P ‖ P̄), P the smoothed histogram of a row, both with ε in each bin (§3.2).
    histogram: (N, bins), usual: (bins,). Returns (N,)."""
    p = smoothed(histogram, size) + epsilon
    q = usual + epsilon
    p, q = p / p.sum(1, keepdim=True), q / q.sum()
    return ((p - q) * (p.log() - q.log())).sum(1)


@dataclass(frozen=True)
class WeiPer(Detector):
    """Divergence of the histogram of u from the mean one, plus λ₁ times that of the logits of all
    perturbed heads, minus λ₂ times their mean largest softmax probability. The heads are W + δ‖w‖n,
    with n of length 1 at random.

    usual: P̄, usual_perturbed: Q̄, (bins,); range_of_u, range_of_logits: (2,), float64.
    """

    name = "weiper"
    source = "Granz et al., NeurIPS 2024, WeiPer+KLD"
    about = "divergence of the histograms of u and of perturbed heads' logits from the mean ones"
    formula = r"""
        s = \operatorname{KL}(\bar P, P) + \lambda_1 \operatorname{KL}(\bar Q, Q)
        - \lambda_2 \operatorname{mean}_j \max_c \operatorname{softmax}(z^{(j)})_c

        z^{(j)} = W^{(j)} u + b, \qquad w^{(j)}_c = w_c + \delta \lVert w_c \rVert n^{(j)}_c
    """
    needs = frozenset({"embedding", "head"})
    fitted = True
    heavy = True
    better_on_real = True

    usual: Tensor
    usual_perturbed: Tensor
    range_of_u: Tensor
    range_of_logits: Tensor
    delta: float
    copies: int
    seed: int
    weight_of_logits: float
    weight_of_msp: float
    smooth: int
    smooth_logits: int

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        delta: Annotated[
            float, "δ, above 0; the paper's for CIFAR-10, chosen on OOD images, as all that follow"
        ] = 1.8,
        copies: Annotated[int, "perturbed heads, above 0"] = 100,
        bins: Annotated[int, "bins of a histogram, above 1"] = 100,
        weight_of_logits: Annotated[float, "λ₁, at least 0"] = 2.5,
        weight_of_msp: Annotated[float, "λ₂, at least 0"] = 0.1,
        smooth: Annotated[int, "bins that the histogram of u is averaged over, above 0"] = 4,
        smooth_logits: Annotated[int, "the same for the logits"] = 15,
        rows: Annotated[
            int, "rows to fit on, drawn at random where there are more; the authors' number"
        ] = 1000,
        seed: Annotated[int, "seed of the heads and of that draw"] = 0,
    ) -> Self:
        """One pass, and two over the drawn rows, which take as long as scoring them. Raises
        DetectorError for a setting out of range."""
        require_positive(
            cls.name,
            delta=delta,
            copies=copies,
            bins=bins,
            smooth=smooth,
            smooth_logits=smooth_logits,
            rows=rows,
        )

        def embeddings() -> Iterator[Tensor]:
            return (recorded(b.embedding) for b in finite_rows(train, cls.needs, cls.name))

        head = recorded(next(iter(finite_rows(train, cls.needs, cls.name))).head)
        u = drawn_rows(embeddings, rows, seed).double()

        def logits() -> Iterator[Tensor]:
            for z in perturbed_logits(u, head, delta, copies, seed):
                yield z.flatten(1)

        ends = torch.stack([torch.stack([z.min(), z.max()]) for z in logits()])
        range_of_u = torch.stack([u.min(), u.max()])
        range_of_logits = torch.stack([ends[:, 0].min(), ends[:, 1].max()])
        total = sum((counts(z, range_of_logits, bins).sum(0) for z in logits()), torch.zeros(bins))
        number = len(u) * copies * len(head.bias)
        return cls(
            usual=counts(u, range_of_u, bins).sum(0) / u.numel(),
            usual_perturbed=total / number,
            range_of_u=range_of_u,
            range_of_logits=range_of_logits,
            delta=delta,
            copies=copies,
            seed=seed,
            weight_of_logits=weight_of_logits,
            weight_of_msp=weight_of_msp,
            smooth=smooth,
            smooth_logits=smooth_logits,
        )

    def _score(self, test: Features) -> Tensor:
        u, head = recorded(test.embedding).double(), recorded(test.head)
        bins, classes = len(self.usual), len(head.bias)
        perturbed = u.new_zeros(len(u), bins)
        largest = u.new_zeros(len(u))
        for z in perturbed_logits(u, head, self.delta, self.copies, self.seed):
            perturbed += counts(z.flatten(1), self.range_of_logits, bins)
            largest += (z.amax(2) - z.logsumexp(2)).exp().sum(1)
        number = self.copies * classes
        own = divergence(
            counts(u, self.range_of_u, bins) / u.shape[1], self.usual, self.smooth, EPSILON
        )
        others = divergence(
            perturbed / number, self.usual_perturbed, self.smooth_logits, EPSILON_PERTURBED
        )
        return own + self.weight_of_logits * others - self.weight_of_msp * largest / self.copies
