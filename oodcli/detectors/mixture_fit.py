"""Gaussian mixtures by expectation maximisation, and Dirichlet-process mixtures by variational
inference (Blei & Jordan 2006; Bishop 2006, §10.2), as scikit-learn defines both.

scikit-learn's own classes read all rows once for each component and step. Here one pass a step
collects Σ r x and Σ r xxᵀ for all components at once, as products of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-3
"""Change of the objective at which a fit stops; scikit-learn's default."""

EMPTY = 10 * torch.finfo(torch.float64).eps
"""Added to the rows of each component, as scikit-learn does."""

ROWLESS = 1e-9
"""A component with fewer rows has none: its posterior differs from the prior by that much."""

AT_ONCE = 1 << 21
"""Products of channels in a chunk of rows."""

KEPT = 1 << 26
"""Products that are kept from step to step, half a gigabyte: computing them again takes up to half
of a step."""


class Fitted(NamedTuple):
    """weights: (K,), means: (K, d); covariance: (K, d, d), (d, d) if tied or (K, d) if diagonal.
    steps: iterations made.
    converged: whether the objective changed less than TOLERANCE in the last one."""

    weights: Tensor
    means: Tensor
    covariance: Tensor
    steps: int
    converged: bool


class Moments(NamedTuple):
    """Sums over rows, weighted by the share r of each component. size: Σ r, (K,); total: (K, d);
    square: Σ r x_i x_j of the pairs of channels, (K, P), or Σ x_i x_j, (1, P), if tied."""

    size: Tensor
    total: Tensor
    square: Tensor


class Density(NamedTuple):
    """log ρ of each row and component, up to the same constant: constant + linear·x − ½ Σ
    square_ij x_i x_j. constant: (K,); linear: (K, d); square: (K or 1, P)."""

    constant: Tensor
    linear: Tensor
    square: Tensor


@dataclass(frozen=True)
class Rows:
    """Rows to fit a mixture to. x: (d, N) float64, centred. covariance: full, tied or diag."""

    x: Tensor
    covariance: str

    @cached_property
    def pairs(self) -> Tensor:
        """(2, P): the channels i ≤ j whose products are needed."""
        width = len(self.x)
        if self.covariance == "diag":
            return torch.arange(width).expand(2, width)
        return torch.triu_indices(width, width)

    def _products(self, x: Tensor) -> Tensor:
        """(P, n) of (d, n)."""
        if self.covariance == "diag":
            return x.square()
        found = x.new_empty(self.pairs.shape[1], x.shape[1])
        start = 0
        for i in range(len(x)):  # half the time of x[first] * x[second]
            stop = start + len(x) - i
            torch.mul(x[i], x[i:], out=found[start:stop])
            start = stop
        return found

    def _chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Which rows, their x, (d, n), and products, (P, n)."""
        step = max(1, AT_ONCE // self.pairs.shape[1])
        for start in range(0, self.x.shape[1], step):
            part = slice(start, start + step)
            yield part, self.x[:, part], self._products(self.x[:, part])

    @cached_property
    def _kept(self) -> list[tuple[slice, Tensor, Tensor]]:
        few = self.pairs.shape[1] * self.x.shape[1] <= KEPT
        return list(self._chunks()) if few else []

    def moments(self, shares: Callable[[slice, Tensor, Tensor], Tensor]) -> Moments:
        """One pass. shares: which rows, their x, (d, n), and products, (P, n) → r, (K, n)."""
        found: Moments | None = None
        for part, x, products in self._kept or self._chunks():
            r = shares(part, x, products)
            square = products.sum(1)[None] if self.covariance == "tied" else r @ products.T
            new = Moments(r.sum(1), r @ x.T, square)
            found = new if found is None else Moments(*map(torch.add, found, new))
        assert found is not None
        return found

    def spread(self, square: Tensor) -> Tensor:
        """(…, P) → symmetric matrices (…, d, d), or (…, d) unchanged if diagonal."""
        if self.covariance == "diag":
            return square
        first, second = self.pairs
        found = square.new_zeros(*square.shape[:-1], len(self.x), len(self.x))
        found[..., first, second] = square
        found[..., second, first] = square
        return found

    def coefficients(self, precision: Tensor) -> Tensor:
        """The other way round, (…, d, d) → (…, P), so that xᵀ precision x is their product with
        x_i x_j."""
        if self.covariance == "diag":
            return precision
        first, second = self.pairs
        return precision[..., first, second] * torch.where(first == second, 1.0, 2.0)


class Gaussians(NamedTuple):
    """size: rows of each component, (K,); means: (K, d), covariance: (K, d, d), (1, d, d) if tied
    or (K, d) if diagonal."""

    size: Tensor
    means: Tensor
    covariance: Tensor


def maximum_likelihood(rows: Rows, found: Moments, ridge: float) -> Gaussians:
    """Means and covariances of the moments, with a ridge on every variance."""
    count = found.size + EMPTY
    means = found.total / count[:, None]
    if rows.covariance == "diag":
        return Gaussians(count, means, found.square / count[:, None] - means.square() + ridge)
    square = rows.spread(found.square)
    if rows.covariance == "tied":
        between = (count[:, None] * means).T @ means
        covariance = (square - between) / count.sum()  # (1, d, d)
    else:
        covariance = square / count[:, None, None] - means[:, :, None] * means[:, None]
    return Gaussians(count, means, covariance + ridge * torch.eye(len(rows.x), dtype=square.dtype))


def normal_density(rows: Rows, means: Tensor, covariance: Tensor) -> tuple[Density, Tensor]:
    """log N(x; μ_k, Σ_k), and ½ log |Σ_k⁻¹|, (K or 1,). Raises torch.linalg.LinAlgError where Σ_k
    is not positive definite."""
    if rows.covariance == "diag":
        precision = 1 / covariance
        half_log_det = precision.log().sum(1) / 2
        linear = means * precision
    else:
        lower = torch.linalg.cholesky(covariance)
        precision = torch.cholesky_inverse(lower)
        half_log_det = -lower.diagonal(dim1=1, dim2=2).log().sum(1)
        linear = (precision @ means[:, :, None])[:, :, 0]
    constant = half_log_det - (len(rows.x) * math.log(2 * math.pi) + (linear * means).sum(1)) / 2
    return Density(constant, linear, rows.coefficients(precision)), half_log_det


def expectation(rows: Rows, density: Density) -> tuple[Moments, float, float]:
    """The moments with r = softmax log ρ, Σ log Σ_k ρ and Σ r log r over all rows."""
    norms, entropies = [], []

    def shares(part: slice, x: Tensor, products: Tensor) -> Tensor:
        quadratic = density.square @ products  # (K or 1, n)
        log_r = torch.addmm(density.constant[:, None], density.linear, x) - quadratic / 2
        norm = log_r.logsumexp(0)
        log_r -= norm
        r = log_r.exp()
        norms.append(float(norm.sum()))
        entropies.append(float((r * log_r).sum()))
        return r

    found = rows.moments(shares)
    return found, math.fsum(norms), math.fsum(entropies)


def grouped_expectation(rows: Rows, density: Density, rowless: Tensor) -> tuple[Moments, float]:
    """The moments and Σ r log r of ``expectation``, where the densities of some components differ
    by a constant alone: these have constant shares of what they get together. rowless: (K,)."""
    if rows.covariance == "tied" or rowless.sum() < 2:
        moments, _, entropy = expectation(rows, density)
        return moments, entropy
    own, all_ = ~rowless, density.constant[rowless]
    one = int(rowless.nonzero()[0])
    together = Density(
        torch.cat([density.constant[own], all_.logsumexp(0)[None]]),
        torch.cat([density.linear[own], density.linear[one][None]]),
        torch.cat([density.square[own], density.square[one][None]]),
    )
    found, _, entropy = expectation(rows, together)
    share = all_.softmax(0)
    entropy += float(found.size[-1] * (share * all_.log_softmax(0)).sum())

    def apart(moment: Tensor) -> Tensor:
        each = moment.new_empty(len(rowless), *moment.shape[1:])
        each[own] = moment[:-1]
        each[rowless] = share.view(-1, *[1] * (moment.ndim - 1)) * moment[-1]
        return each

    return Moments(*map(apart, found)), entropy


def _started(rows: Rows, components: int, seed: int) -> Moments:
    """Each row belongs to its cluster of k-means alone."""
    from sklearn.cluster import KMeans

    clusters = KMeans(components, n_init=1, random_state=np.random.RandomState(seed))
    labels = torch.from_numpy(clusters.fit(rows.x.T.contiguous().numpy()).labels_).long()
    alone = torch.eye(components, dtype=rows.x.dtype)
    return rows.moments(lambda part, x, products: alone[:, labels[part]])


def fit_gaussian_mixture(
    x: Tensor, components: int, covariance: str, *, ridge: float, most: int, seed: int
) -> Fitted:
    """Maximum likelihood, from k-means, at most ``most`` steps. x: (N, d) float64, centred. Raises
    torch.linalg.LinAlgError."""
    rows = Rows(x.T.contiguous(), covariance)
    state = maximum_likelihood(rows, _started(rows, components, seed), ridge)
    before, change, step = -math.inf, math.inf, 0
    while step < most and change >= TOLERANCE:
        step += 1
        weights = state.size / state.size.sum()
        density, _ = normal_density(rows, state.means, state.covariance)
        moments, norm, _ = expectation(
            rows, density._replace(constant=density.constant + weights.log())
        )
        state = maximum_likelihood(rows, moments, ridge)
        before, change = norm / len(x), abs(norm / len(x) - before)
    weights = state.size / state.size.sum()
    return _as_fitted(state, weights, covariance, step, change < TOLERANCE)


def fit_dirichlet_process(
    x: Tensor,
    components: int,
    covariance: str,
    *,
    prior: Tensor,
    ridge: float,
    most: int,
    seed: int,
) -> Fitted:
    """Variational posterior of a Dirichlet-process mixture truncated to ``components``, with
    concentration 1/components, the mean of all rows as prior mean of weight one row, and a Wishart
    prior of d degrees of freedom and of ``prior``, (d, d) or, if diagonal, (d,). From k-means, at
    most ``most`` steps. x: (N, d) float64, centred. Raises torch.linalg.LinAlgError."""
    rows = Rows(x.T.contiguous(), covariance)
    priors = _Prior(x.mean(0), prior, 1 / components, ridge)
    state = priors.posterior(rows, _started(rows, components, seed))
    before, change, step = -math.inf, math.inf, 0
    while step < most and change >= TOLERANCE:
        step += 1
        # Components without rows have the prior for a posterior, all of them the same.
        moments, entropy = grouped_expectation(rows, state.density, state.gaussians.size < ROWLESS)
        state = priors.posterior(rows, moments)
        value = state.bound - entropy
        before, change = value, abs(value - before)
    return _as_fitted(state.gaussians, state.weights, covariance, step, change < TOLERANCE)


class _Posterior(NamedTuple):
    """Expected mixture; E log ρ; and the lower bound without the rows' entropy."""

    gaussians: Gaussians
    weights: Tensor
    density: Density
    bound: float


@dataclass(frozen=True)
class _Prior:
    """mean: (d,), weight of one row; covariance: of the Wishart prior."""

    mean: Tensor
    covariance: Tensor
    concentration: float
    ridge: float

    def posterior(self, rows: Rows, found: Moments) -> _Posterior:
        """Bishop 2006, eq. 10.58 to 10.66, with covariances divided by their degrees of freedom."""
        count, means, spread = maximum_likelihood(rows, found, self.ridge)
        components, width = means.shape
        a, b = 1 + count, self.concentration + _after(count)
        kappa = 1 + count
        apart = means - self.mean
        means = (self.mean + count[:, None] * means) / kappa[:, None]
        share = count / kappa
        if rows.covariance == "tied":
            freedom = width + count.sum()[None] / components
            between = (share * apart.T) @ apart
            covariance = self.covariance + (spread * count.sum() + between) / components
            covariance = covariance / freedom
        elif rows.covariance == "diag":
            freedom = width + count
            covariance = self.covariance + count[:, None] * spread
            covariance = (covariance + share[:, None] * apart.square()) / freedom[:, None]
        else:
            freedom = width + count
            covariance = self.covariance + count[:, None, None] * spread
            covariance += share[:, None, None] * apart[:, :, None] * apart[:, None]
            covariance /= freedom[:, None, None]
        density, half_log_det = normal_density(rows, means, covariance)
        halves = (freedom - torch.arange(width)[:, None]) / 2  # (d, K or 1)
        log_two, log_freedom = math.log(2), width * freedom.log() / 2
        expected = (width * log_two + halves.digamma().sum(0) - width / kappa) / 2 - log_freedom
        both = (a + b).digamma()
        log_weights = a.digamma() - both + _before(b.digamma() - both)
        density = density._replace(constant=density.constant + expected + log_weights)
        wishart = freedom * (half_log_det - log_freedom + width * log_two / 2)
        wishart = (wishart + halves.lgamma().sum(0)).expand(components)
        beta = a.lgamma() + b.lgamma() - (a + b).lgamma()
        bound = float(wishart.sum() + beta.sum() - width * kappa.log().sum() / 2)
        weights = a / (a + b) * _before((b / (a + b)).log()).exp()
        return _Posterior(
            Gaussians(count, means, covariance), weights / weights.sum(), density, bound
        )


def _after(values: Tensor) -> Tensor:
    """The sum of all later values. values: (K,)."""
    return torch.cat([values[1:].flip(0).cumsum(0).flip(0), values.new_zeros(1)])


def _before(values: Tensor) -> Tensor:
    """The sum of all earlier values. values: (K,)."""
    return torch.cat([values.new_zeros(1), values[:-1].cumsum(0)])


def _as_fitted(
    state: Gaussians, weights: Tensor, covariance: str, steps: int, converged: bool
) -> Fitted:
    found = state.covariance[0] if covariance == "tied" else state.covariance
    return Fitted(weights, state.means, found, steps, converged)
