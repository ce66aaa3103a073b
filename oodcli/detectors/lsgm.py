"""LSGM (paper 003): a Gaussian mixture for each layer, and how often images go from which component
of one layer to which of the next."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, drawn_of, finite_rows
from oodcli.detectors.hyperparameters import require_positive
from oodcli.detectors.layer_choice import LAYERS, chosen_layers, layer_mean, layer_rows
from oodcli.detectors.mixture_fit import KEPT, Fitted, fit_dirichlet_process, fit_gaussian_mixture
from oodcli.errors import DetectorError, first_line
from oodcli.features import Features

log = logging.getLogger(__name__)

RIDGE = 1e-6
"""Added to every variance, as a share of the layer's mean variance: a dead channel has none."""

MAX_ITERATIONS = 100

AT_ONCE = 1 << 22
"""Numbers that an intermediate result may have; more rows go in chunks."""


def gaussian_log_density(rows: Tensor, means: Tensor, factor: Tensor) -> Tensor:
    """log N(x; μ_k, Σ_k) = −½ ‖L_k⁻¹ (x − μ_k)‖² − log det L_k − ½ d log 2π with Σ_k = L_k L_kᵀ.

    rows: (N, d), means: (K, d). factor: lower triangles L (K, d, d), or (1, d, d) where all
    components share one; standard deviations (K, d) where covariances are diagonal. All float64.
    Returns (N, K).
    """
    width = means.shape[1]
    diagonal = factor if factor.ndim == 2 else factor.diagonal(dim1=1, dim2=2)  # (K or 1, d)
    constant = diagonal.log().sum(1) + 0.5 * width * math.log(2 * math.pi)
    found = []
    for part in _chunks(rows, means.numel()):
        apart = part - means[:, None]  # (K, n, d)
        white = (
            apart / factor[:, None]
            if factor.ndim == 2
            else torch.linalg.solve_triangular(factor, apart.mT, upper=False).mT
        )
        found.append((-0.5 * white.square().sum(2) - constant[:, None]).T)
    return torch.cat(found)


def forward(
    log_densities: Sequence[Tensor], log_prior: Tensor, log_transitions: Sequence[Tensor]
) -> Tensor:
    """log P(x_1, …, x_m) by α_1(z) = P(x_1|z) P(z), α_i(z) = P(x_i|z) Σ_z' P(z|z') α_{i−1}(z')
    (LSGM, §3.3), the sum over z of α_m(z). Exact where whole rows of α underflow.

    log_densities: (N, K_i) for each of m layers; log_prior: (K_1,); log_transitions: m − 1 of
    (K_{i−1}, K_i), −inf where there is no way. Returns (N,), −inf where every trace is impossible.
    """
    alpha = log_densities[0] + log_prior
    for density, transition in zip(log_densities[1:], log_transitions, strict=True):
        alpha = density + torch.cat([paths.logsumexp(1) for paths in _paths(alpha, transition)])
    return alpha.logsumexp(1)


def most_probable_trace(
    log_densities: Sequence[Tensor], log_prior: Tensor, log_transitions: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """argmax and max over z_1, …, z_m of log P(x_1, …, x_m, z_1, …, z_m), Viterbi's recursion:
    ``forward`` with max in place of Σ, then back along the largest terms.

    Takes what ``forward`` takes. Returns (N, m) int64 and (N,).
    """
    alpha = log_densities[0] + log_prior
    before = []
    for density, transition in zip(log_densities[1:], log_transitions, strict=True):
        best = [paths.max(1) for paths in _paths(alpha, transition)]
        before.append(torch.cat([each.indices for each in best]))  # (N, K_i)
        alpha = density + torch.cat([each.values for each in best])
    value, last = alpha.max(1)
    trace = [last]
    for came_from in reversed(before):
        trace.insert(0, came_from.gather(1, trace[0][:, None])[:, 0])
    return torch.stack(trace, 1), value


def _paths(alpha: Tensor, log_transition: Tensor) -> Iterator[Tensor]:
    """log P(z|z') α(z') for chunks of rows, (n, K', K)."""
    for part in _chunks(alpha, log_transition.numel()):
        yield part[:, :, None] + log_transition


def _chunks(rows: Tensor, numbers: int) -> Iterator[Tensor]:
    """At least one chunk, of as many rows as fit when each takes so many numbers."""
    size = max(1, AT_ONCE // numbers)
    return (rows[start : start + size] for start in range(0, max(1, len(rows)), size))


def transition_matrix(counts: Tensor) -> Tensor:
    """P(z_i = k | z_{i−1} = j) as rows of frequencies, not smoothed; a component never left has a
    uniform row. counts: (K', K). Returns (K', K) float64, rows sum to 1."""
    total = counts.sum(1, keepdim=True)
    return torch.where(total > 0, counts.double() / total.clamp(min=1), 1 / counts.shape[1])


@dataclass(frozen=True)
class Projection:
    """y = (x − center) @ axes. center: (C,), axes: (C, d), orthonormal columns."""

    center: Tensor
    axes: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return (rows - self.center) @ self.axes

    @classmethod
    def fit(cls, rows: Tensor, width: int) -> tuple[Self, float]:
        """The axes of largest variance, in falling order, the largest entry of each positive; and
        their share of the variance. rows: (N, C) float64."""
        center = rows.mean(0)
        values, vectors = torch.linalg.eigh((rows - center).T @ (rows - center))
        axes = vectors.flip(1)[:, :width]
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        total = values.clamp(min=0).sum()
        kept = values.flip(0)[:width].clamp(min=0).sum()
        return cls(center, axes), float(kept / total) if total > 0 else 1.0


@dataclass(frozen=True)
class Mixture:
    """One layer's. weights: (K,), means: (K, d); covariance: (K, d, d) where ``kind`` is full,
    (d, d) where it is tied, (K, d) where it is diag. projection: what rows go through first."""

    weights: Tensor
    means: Tensor
    covariance: Tensor
    kind: str
    projection: Projection | None = None

    @cached_property
    def factor(self) -> Tensor:
        """As gaussian_log_density takes it."""
        if self.kind == "diag":
            return self.covariance.sqrt()
        lower: Tensor = torch.linalg.cholesky(self.covariance)
        return lower[None] if self.kind == "tied" else lower

    @property
    def width(self) -> int:
        """Channels of the rows that it takes."""
        return (self.means if self.projection is None else self.projection.axes.T).shape[1]

    def log_density(self, rows: Tensor) -> Tensor:
        """(N, K) float64. rows: (N, C) float64."""
        within = rows if self.projection is None else self.projection(rows)
        return gaussian_log_density(within, self.means, self.factor)

    def assigned(self, rows: Tensor) -> Tensor:
        """(N,) argmax_k P(k) P(x|k)."""
        return (self.weights.log() + self.log_density(rows)).argmax(1)


@dataclass(frozen=True)
class LSGM(Detector):
    """−log P(x_1, …, x_m) over the spatial means of m layers, summed over all traces, by the
    forward
    algorithm of a hidden Markov model. z: a component of a layer's Gaussian mixture; P(z | z'): how
    often rows go from one to the other.

    layer_names: m, in order. weights, means, covariance: layer → as ``Mixture`` has them, of
    covariances that are ``covariance_kind``. transitions: later layer → (K_{i−1}, K_i). shares:
    layer → (K,), of the rows fitted on that were assigned. pca_center, pca_axes: layer → (C,),
    (C, d), of layers that were too wide. prior: ``first``, or ``every-layer``, which multiplies
    P(z_i) at each layer as eq. 4 does. traced: the trace is wanted along with every score.
    """

    name = "lsgm"
    source = "LSGM, eq. 3 and §3.3"
    about = "improbability of the path through Gaussian mixtures of the stages' channel means"
    formula = r"""
        s = -\log \sum_z \alpha_m(z)

        \alpha_1(z) = P(x_1 \mid z) \, P(z),
        \qquad \alpha_i(z) = P(x_i \mid z) \sum_{z'} P(z \mid z') \, \alpha_{i-1}(z')
    """
    needs = frozenset({"layers.mean"})
    fitted = True
    better_on_real = True
    heavy = True
    explains = True

    layer_names: tuple[str, ...]
    weights: Mapping[str, Tensor]
    means: Mapping[str, Tensor]
    covariance: Mapping[str, Tensor]
    covariance_kind: str
    transitions: Mapping[str, Tensor]
    shares: Mapping[str, Tensor]
    pca_center: Mapping[str, Tensor]
    pca_axes: Mapping[str, Tensor]
    prior: str
    traced: bool

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        layers: Annotated[str, LAYERS] = "stages",
        components: Annotated[int, "components of a layer's mixture; with dp, at most"] = 50,
        mixture: Annotated[Literal["dp", "em"], "dp: Dirichlet process; em: plain mixture"] = "dp",
        covariance: Annotated[Literal["full", "tied", "diag"], "kind of covariance"] = "full",
        pca: Annotated[int, "dimensions to which wider layers are reduced; 0: never"] = 64,
        rows: Annotated[int, "most rows that mixtures are fitted on, drawn at random"] = 20_000,
        prior: Annotated[
            Literal["first", "every-layer"], "layers at which P(z) counts; every-layer: as in eq. 4"
        ] = "first",
        explain: Annotated[bool, "add the most probable path to each score, in words"] = False,
        seed: Annotated[int, "seed of the draw of rows and of the mixtures"] = 0,
    ) -> Self:
        """Three passes: rows are counted, then at most ``rows`` of them gathered and mixtures
        fitted, then the steps of all rows from layer to layer counted. Layers wider than ``pca``
        are reduced to it; 0 means none is. Raises DetectorError when a mixture cannot be fitted."""
        require_positive(cls.name, components=components, rows=rows)
        for key, value in {"pca": pca, "seed": seed}.items():
            if value < 0:
                raise DetectorError(f"{cls.name}.{key}={value} must not be negative")
        blocks = partial(finite_rows, train, cls.needs, cls.name)
        sample = _sample(blocks, layers, rows, seed)
        fitted = _fit_mixtures(sample, components, pca, Recipe(mixture, covariance, seed))
        counts = count_steps(blocks(), fitted)
        later = list(fitted)[1:]
        projected = {
            name: each.projection for name, each in fitted.items() if each.projection is not None
        }
        return cls(
            layer_names=tuple(fitted),
            weights={name: each.weights for name, each in fitted.items()},
            means={name: each.means for name, each in fitted.items()},
            covariance={name: each.covariance for name, each in fitted.items()},
            covariance_kind=covariance,
            transitions={name: transition_matrix(counts[name]) for name in later},
            shares={name: each.sum(0) / each.sum() for name, each in counts.items()},
            pca_center={name: each.center for name, each in projected.items()},
            pca_axes={name: each.axes for name, each in projected.items()},
            prior=prior,
            traced=explain,
        )

    @cached_property
    def mixtures(self) -> dict[str, Mixture]:
        """By layer, in order."""
        return {
            name: Mixture(
                self.weights[name],
                self.means[name],
                self.covariance[name],
                self.covariance_kind,
                Projection(self.pca_center[name], self.pca_axes[name])
                if name in self.pca_axes
                else None,
            )
            for name in self.layer_names
        }

    def _evidence(self, test: Features) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """What ``forward`` takes."""
        densities: list[Tensor] = []
        for name, mixture in self.mixtures.items():
            density = mixture.log_density(layer_mean(test, name, self.name, mixture.width))
            again = self.prior == "every-layer" and bool(densities)
            densities.append(density + mixture.weights.log() if again else density)
        first, *later = self.layer_names
        return densities, self.weights[first].log(), [self.transitions[n].log() for n in later]

    @property
    def layers_read(self) -> frozenset[str] | None:
        return frozenset(self.layer_names)

    def _score(self, test: Features) -> Tensor:
        return -forward(*self._evidence(test))

    @property
    def always_explains(self) -> bool:
        """The trace is wanted even where nobody asked for explanations of scores."""
        return self.traced

    def explain(self, test: Features) -> list[str]:
        """For each row its most probable trace, in words."""
        test.require(self.needs, self.name)
        if not len(test):
            return []
        evidence = self._evidence(test)
        traces = most_probable_trace(*evidence)[0].tolist()
        scores = (-forward(*evidence)).tolist()
        finite = test.finite(self.needs).tolist()
        return [
            f"{self._words(trace)}, -log p = {score:.1f}" if good else "not finite"
            for trace, score, good in zip(traces, scores, finite, strict=True)
        ]

    def _words(self, trace: Sequence[int]) -> str:
        words = []
        for index, (name, component) in enumerate(zip(self.layer_names, trace, strict=True)):
            share = f"{100 * self.shares[name][component]:.2g} %"
            if index:
                last = trace[index - 1]
                chance = self.transitions[name][last, component]
                share += f", reached from {last} with probability {chance:.2g}"
            else:
                share += " of the rows fitted on"
            words.append(f"{name}: component {component} ({share})")
        return " > ".join(words)


@dataclass(frozen=True)
class Recipe:
    """How a mixture is fitted. kind: dp or em."""

    kind: str
    covariance: str
    seed: int

    def fitted(self, data: Tensor, components: int) -> Fitted:
        """A mixture of data, (N, d) float64 of unit mean variance."""
        shape: dict[str, Any] = {"ridge": RIDGE, "most": MAX_ITERATIONS, "seed": self.seed}
        if self.kind == "em":
            return fit_gaussian_mixture(data, components, self.covariance, **shape)
        # A component without rows gets the prior divided by its degrees of freedom, d. That is to
        # be the layer's covariance: scikit-learn's default, a d-th of it, has a component for every
        # few rows, other ones with every seed. The ridge keeps it positive definite.
        width = data.shape[1]
        ridge = RIDGE * torch.eye(width, dtype=data.dtype)
        whole = width * (data.T @ data / len(data) + ridge)
        prior = whole.diagonal() if self.covariance == "diag" else whole
        return fit_dirichlet_process(data, components, self.covariance, prior=prior, **shape)


def _sample(
    blocks: Callable[[], Iterator[Features]], which: str, most: int, seed: int
) -> dict[str, Tensor]:
    """Layer → at most ``most`` rows (N, C), drawn without replacement. float32, which features are
    recorded in."""
    count = sum(len(block) for block in blocks())
    drawn = drawn_of(count, most, seed)
    if count > most:
        log.info("lsgm: mixtures are fitted on %d of %d rows (lsgm.rows=%d)", most, count, most)
    parts: dict[str, list[Tensor]] = {}
    start = 0
    for block in blocks():
        parts = parts or {name: [] for name in chosen_layers(block, which, LSGM.name)}
        kept = drawn[start : start + len(block)]
        for name, rows in parts.items():
            rows.append(layer_rows(block, name)[kept].float())
        start += len(block)
    return {name: torch.cat(rows) for name, rows in parts.items()}


def _fit_mixtures(
    sample: dict[str, Tensor], components: int, pca: int, recipe: Recipe
) -> dict[str, Mixture]:
    """A mixture for each layer. Says what that will cost before, and what came of it after."""
    size = len(next(iter(sample.values())))
    if size < 2:
        raise DetectorError("lsgm: a mixture needs at least two rows to fit on")
    if components > size and recipe.kind == "em":
        raise DetectorError(
            f"lsgm.components={components} must not exceed the {size} rows to fit on "
            "(-p lsgm.mixture=dp takes it as an upper bound)"
        )
    widths = {name: min(rows.shape[1], pca or rows.shape[1]) for name, rows in sample.items()}
    _say_cost(widths, size, components, recipe)
    reduced, projections = {}, {}
    for name, width in widths.items():
        reduced[name] = _in_canonical_order(sample.pop(name)).double()
        full = reduced[name].shape[1]
        if width < full:
            projections[name], share = Projection.fit(reduced[name], width)
            reduced[name] = projections[name](reduced[name])
            log.info(
                "lsgm: PCA takes %s from %d to %d dimensions, which have %.2f %% of the variance "
                "(lsgm.pca=%d)",
                *(name, full, width, 100 * share, pca),
            )
    fitted, outcome = {}, []
    for name, rows in reduced.items():
        mixture, words = _fit_mixture(rows, min(components, size), recipe)
        fitted[name] = replace(mixture, projection=projections.get(name))
        outcome.append(f"{name} {words}")
    log.info("lsgm: components in use: %s", "; ".join(outcome))
    return fitted


def _say_cost(widths: Mapping[str, int], size: int, asked: int, recipe: Recipe) -> None:
    components = min(asked, size)
    largest = max(widths.values())
    square = sum(width * width for width in widths.values())
    # Two operations a number, in each half of an iteration: densities, then covariances.
    operations, matrices = {
        "full": (4 * components * square, components * largest**2),
        "tied": (2 * (components + 1) * square, largest**2),
        "diag": (8 * components * sum(widths.values()), components * largest),
    }[recipe.covariance]
    memory = 8 * (size * (sum(widths.values()) + largest + 2 * components) + 2 * matrices)
    products = size * (largest if recipe.covariance == "diag" else largest * (largest + 1) // 2)
    memory += 8 * products if products <= KEPT else 0
    if components < asked:
        log.info("lsgm: at most %d components instead of %d, one a row", components, asked)
    if recipe.covariance == "full" and size <= components * largest:
        log.info(
            "lsgm: %.0f rows a component are few for full covariances of %d dimensions, so scores "
            "may depend on the seed: -p lsgm.covariance=tied has one for all components",
            *(size / components, largest),
        )
    log.info(
        "lsgm: fitting %s mixtures of at most %d components with %s covariances on %d rows of %s: "
        "about %.1e operations an iteration, at most %d iterations a layer, and %s of memory",
        {"dp": "Dirichlet-process", "em": "Gaussian"}[recipe.kind],
        components,
        recipe.covariance,
        size,
        ", ".join(f"{name} ({width} dimensions)" for name, width in widths.items()),
        size * operations,
        MAX_ITERATIONS,
        f"{memory / 1e9:.1f} GB" if memory >= 1e9 else f"{max(memory / 1e6, 1):.0f} MB",
    )


def _in_canonical_order(rows: Tensor) -> Tensor:
    """The same rows, sorted by their first channel, then by the second, and so on: where a mixture
    ends depends a little on the order that its rows come in. rows: (N, C)."""
    values = np.ascontiguousarray(rows.numpy())
    # One comparison of whole rows: np.lexsort sorts once for every channel.
    whole = values.view([("", values.dtype)] * values.shape[1])[:, 0]
    return rows[torch.from_numpy(whole.argsort(kind="stable"))]


def _fit_mixture(rows: Tensor, components: int, recipe: Recipe) -> tuple[Mixture, str]:
    """The mixture of (N, d) float64, and what to say of it. The rows are centred and scaled as one,
    so that neither the ridge nor rounding depends on the layer's scale."""
    center = rows.mean(0)
    apart = rows - center
    scale = float(apart.square().mean().sqrt()) or 1.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = recipe.fitted(apart / scale, components)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            reason = first_line(error)
            raise DetectorError(f"lsgm: no mixture could be fitted ({reason})") from error
    found = Mixture(
        model.weights,
        model.means * scale + center,
        model.covariance * scale**2,
        recipe.covariance,
    )
    used = int((found.assigned(rows).bincount() > 0).sum())
    words = f"{used} of {components} after {model.steps} iterations"
    # k-means warns once, with advice that follows.
    notes = dict.fromkeys(str(each.message).split(". ")[0] for each in caught)
    notes |= {} if model.converged else {"did not converge": None}
    return found, f"{words} ({'; '.join(notes)})" if notes else words


def count_steps(blocks: Iterator[Features], mixtures: Mapping[str, Mixture]) -> dict[str, Tensor]:
    """Layer → (K', K) how often a row went from which component to which; for the first layer
    (1, K) how often it began where."""
    counts: dict[str, Tensor] = {}
    for block in blocks:
        last = torch.zeros(len(block), dtype=torch.int64)
        before = 1
        for name, mixture in mixtures.items():
            here = mixture.assigned(layer_rows(block, name))
            after = len(mixture.weights)
            steps = torch.bincount(last * after + here, minlength=before * after)
            counts[name] = counts.get(name, 0) + steps.view(before, after)
            last, before = here, after
    return counts
