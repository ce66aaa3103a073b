"""A naive formula for every detector, from its paper: loops and NumPy in float64, slow and plain.

Each takes the rows to score and, where the detector is fitted, the rows to fit on, and returns (N,)
scores. ``NAIVE`` has one for each name; tests/contract/test_detectors.py compares all of them.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import optimize, stats
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import BayesianGaussianMixture
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from oodcli.features import INPUT, Features

Array = np.ndarray


@dataclass(frozen=True)
class Fit:
    """What a detector is fitted on, under the names that its ``fit`` has for them."""

    train: Features
    ood: Features | None = None
    noise: Features | None = None
    pool: Features | None = None


def array(rows: torch.Tensor) -> Array:
    return rows.double().numpy()


def each(rows: Features):
    """Logits z and embedding u of one row after the other."""
    return zip(array(rows.logits), array(rows.embedding), strict=True)


def softmax(z: Array) -> Array:
    """Of one row."""
    e = np.exp(z - z.max())
    return e / e.sum()


def free_energy(z: Array, temperature: float = 1.0) -> float:
    return -temperature * float(logsumexp(z / temperature))


# ---------------------------------------------------------------------------- logits


def msp(test, fit=None, temperature=1.0):
    return np.array([1 - softmax(z / temperature).max() for z in array(test.logits)])


def entropy(test, fit=None):
    found = []
    for z in array(test.logits):
        p = softmax(z)
        found.append(-sum(x * math.log(x) for x in p if x > 0))
    return np.array(found)


def t1000(test, fit=None):
    return msp(test, temperature=1000.0)


def temp_scaling(test, fit):
    """T by the root of the likelihood's slope in 1/T."""
    pairs = list(zip(array(fit.train.logits), labels_of(fit.train), strict=True))

    def slope(beta):
        return sum(softmax(beta * z) @ z - z[label] for z, label in pairs)

    ends = 1 / 50, 50.0
    if slope(ends[0]) >= 0:
        beta = ends[0]
    elif slope(ends[1]) <= 0:
        beta = ends[1]
    else:
        beta = optimize.brentq(slope, *ends, xtol=1e-14, rtol=1e-14)
    return msp(test, temperature=1 / beta)


def gen(test, fit=None, gamma=0.1, m=100):
    found = []
    for z in array(test.logits):
        p = sorted(softmax(z))[::-1][:m]
        found.append(sum(x**gamma * (1 - x) ** gamma for x in p))
    return np.array(found)


def doctor(test, fit=None):
    found = []
    for z in array(test.logits):
        g = sum(x**2 for x in softmax(z))
        found.append((1 - g) / g)
    return np.array(found)


def mls(test, fit=None):
    return np.array([-max(z) for z in array(test.logits)])


def energy(test, fit=None):
    return np.array([free_energy(z) for z in array(test.logits)])


def odin(test, fit=None):
    return np.array([1 - softmax(z / 1000).max() for z in array(test.odin_logits)])


def pro(test, fit=None):
    return np.array([max(u) for u in array(test.pro_steps)])


def gaia_z(test, fit=None):
    found = np.zeros(len(test))
    count = 0
    for layer in test.layers.values():
        if layer.kind == "batchnorm":
            for channel in array(layer.nonzero).T:
                found += channel**2
                count += 1
    return found / count


def mc_dropout(test, fit=None, passes=5):
    found = []
    for row in array(test.dropout_logits):
        p = np.mean([softmax(z) for z in row.reshape(passes, -1)], axis=0)
        found.append(-sum(x * math.log(x) for x in p if x > 0))
    return np.array(found)


def joint_energy(test, fit=None):
    return np.array([-sum(np.logaddexp(0, z)) for z in array(test.logits)])


def godin(test, fit=None):
    return np.array([-max(h) for h in array(test.deconf_h)])


def mos(test, fit=None):
    return np.array([math.exp(min(row)) for row in array(test.mos_others)])


def klm(test, fit):
    by_class = {}
    for z in array(fit.train.logits):
        by_class.setdefault(int(z.argmax()), []).append(softmax(z))
    templates = [np.mean(group, axis=0) for group in by_class.values()]

    def divergence(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    return np.array([min(divergence(softmax(z), q) for q in templates) for z in array(test.logits)])


# ---------------------------------------------------------------------------- embedding and head


def latent(test, indicator, positive=False):
    """indicator: of u and w, the weights of the predicted class; positive: where those are."""
    weight = array(test.head.weight)
    found = []
    for z, u in each(test):
        w = weight[z.argmax()]
        kept = [i for i in range(len(w)) if w[i] > 0 or not positive]
        found.append(indicator([u[i] for i in kept], [w[i] for i in kept]))
    return np.array(found)


def dot(u, w):
    return sum(a * b for a, b in zip(u, w, strict=True))


def length(u):
    return math.sqrt(dot(u, u))


def norm(test, fit=None, positive=False):
    return latent(test, lambda u, w: -length(u), positive)


def ang(test, fit=None, positive=False):
    return latent(test, lambda u, w: 1 - dot(u, w) / (length(u) * length(w)), positive)


def proj(test, fit=None):
    return latent(test, lambda u, w: -dot(u, w) / length(w))


def act(test, fit=None, positive=False):
    return latent(test, lambda u, w: -dot(u, w), positive)


def head_gradients(test, by_logits):
    """∂L/∂W (K, D) of each row, by_logits: z → ∂L/∂z."""
    return [np.outer(by_logits(z), u) for z, u in each(test)]


def of_predicted(temperature):
    """∂CE(z/T, argmax z)/∂z."""

    def by_logits(z):
        e = softmax(z / temperature)
        e[z.argmax()] -= 1
        return e / temperature

    return by_logits


def thinkback(test, fit=None, temperature=1.0):
    return np.array([(g**2).sum() for g in head_gradients(test, of_predicted(temperature))])


def thinkback_norm(test, fit, temperature=1.0):
    expected = np.mean([g**2 for g in head_gradients(fit.train, of_predicted(temperature))], axis=0)
    gradients = head_gradients(test, of_predicted(temperature))
    return np.array([(g**2 / (1e-16 + expected)).sum() for g in gradients])


def gradnorm(test, fit=None):
    gradients = head_gradients(test, lambda z: softmax(z) - 1 / len(z))
    return np.array([-np.abs(g).sum() for g in gradients])


def igoe(test, fit=None):
    found = []
    for z, u in each(test):
        p = softmax(z)
        lengths = [np.abs(np.outer(np.eye(len(z))[y] - p, u)).sum() for y in range(len(z))]
        found.append(dot(p, lengths))
    return np.array(found)


def expgrad(test, fit=None):
    return np.array([-math.log(np.abs(g).sum()) for g in head_gradients(test, np.exp)])


def energy_norm(test, fit=None):
    return np.array([free_energy(z) * sum(abs(u)) for z, u in each(test)])


def rg(test, fit=None, temperature=1.0, k=1.0):
    return np.array([free_energy(z, temperature) * sum(np.minimum(u, k)) for z, u in each(test)])


def rg_add(test, fit, ratio=0.6, k=1.0, rows=1000):
    terms = [(-free_energy(z), sum(np.minimum(u, k))) for z, u in each(fit.train)][:rows]
    first, second = np.std(terms, axis=0)
    alpha = ratio * (first or 1) / (second or 1)  # one that is the same for all rows has none
    return np.array([free_energy(z) - alpha * sum(np.minimum(u, k)) for z, u in each(test)])


def react(test, fit, percentile=90.0):
    c = np.percentile(array(fit.train.embedding), percentile)
    weight, bias = array(test.head.weight), array(test.head.bias)
    return np.array([free_energy(weight @ np.minimum(u, c) + bias) for _, u in each(test)])


def largest_of(u, p):
    """Indices of the entries above the percentile p, at least one."""
    count = max(1, len(u) - round(len(u) * p / 100))
    return sorted(range(len(u)), key=lambda i: -u[i])[:count]


def ratio(u, p):
    """Σ u / Σ of the largest entries, where negative ones count as 0."""
    u = np.maximum(u, 0)
    top = sum(u[i] for i in largest_of(u, p))
    return sum(u) / top if top > 0 else 1.0


def scale(test, fit=None, p=85):
    weight, bias = array(test.head.weight), array(test.head.bias)
    found = [weight @ (u * math.exp(ratio(u, p))) + bias for _, u in each(test)]
    return np.array([free_energy(z) for z in found])


def lts(test, fit=None, p=95):
    return np.array([free_energy(z * ratio(u, p) ** 2) for z, u in each(test)])


def adascale(kind, low=75, high=85, top=1, level=5, weight=10):
    def shifts(rows):
        found = []
        for u, moved in zip(array(rows.embedding), array(rows.adascale_u), strict=True):
            far = sum(abs(u[i] - moved[i]) for i in largest_of(u, 100 - top))
            found.append(weight * far + sum(max(moved[i], 0) for i in largest_of(u, 100 - level)))
        return found

    def score(test, fit):
        known = shifts(fit.train)
        matrix, bias = array(test.head.weight), array(test.head.bias)
        found = []
        for (z, u), q in zip(each(test), shifts(test), strict=True):
            share = sum(k <= q for k in known) / len(known)
            r = ratio(u, low + (1 - share) * (high - low))
            found.append(
                free_energy(matrix @ (u * math.exp(r)) + bias if kind == "a" else z * r**2)
            )
        return np.array(found)

    return score


def ash(kind, p=90):
    def score(test, fit=None):
        weight, bias = array(test.head.weight), array(test.head.bias)
        found = []
        for _, u in each(test):
            u = np.maximum(u, 0)
            kept = largest_of(u, p)
            shaped = np.zeros(len(u))
            for i in kept:
                shaped[i] = {
                    "p": u[i],
                    "b": sum(u) / len(kept),
                    "s": u[i] * math.exp(ratio(u, p)),
                }[kind]
            found.append(free_energy(weight @ shaped + bias))
        return np.array(found)

    return score


def dice(test, fit, p=90):
    weight, bias = array(test.head.weight), array(test.head.bias)
    contribution = weight * array(fit.train.embedding).mean(0)
    kept = contribution > np.percentile(contribution, p)
    return np.array([free_energy((weight * kept) @ u + bias) for _, u in each(test)])


def vra(test, fit, low=60, high=95):
    weight, bias = array(test.head.weight), array(test.head.bias)
    bounds = [np.percentile(column, [low, high]) for column in array(fit.train.embedding).T]

    def shaped(value, alpha, beta):
        return 0.0 if value < alpha else min(value, beta)

    found = []
    for _, u in each(test):
        kept = [shaped(x, *ends) for x, ends in zip(u, bounds, strict=True)]
        found.append(free_energy(weight @ np.array(kept) + bias))
    return np.array(found)


def ras(test, fit):
    weight, bias = array(test.head.weight), array(test.head.bias)
    usual = np.mean([sorted(u) for u in array(fit.train.embedding)], axis=0)
    found = []
    for _, u in each(test):
        # Equal entries get the mean of the values at their places in the order.
        places = [[j for j, other in enumerate(sorted(u)) if other == x] for x in u]
        shaped = np.array([usual[which].mean() for which in places])
        found.append(free_energy(weight @ shaped + bias))
    return np.array(found)


def optfs(test, fit, bins=100, low=0.1, high=99.9):
    weight, bias = array(test.head.weight), array(test.head.bias)
    start, end = np.percentile(array(fit.train.embedding), [low, high])
    edges = start + (end - start) / bins * np.arange(1, bins)

    def bin_of(x):
        return int(np.searchsorted(edges, x, side="right")) if start <= x < end else None

    importance = np.zeros(bins)
    for z, u in each(fit.train):
        for w, x in zip(weight[z.argmax()], u, strict=True):
            if bin_of(x) is not None:
                importance[bin_of(x)] += w * x / len(fit.train)
    theta = 1000 * importance / np.linalg.norm(importance)
    found = []
    for _, u in each(test):
        shaped = [0 if bin_of(x) is None else theta[bin_of(x)] * x for x in u]
        found.append(free_energy(weight @ np.array(shaped) + bias))
    return np.array(found)


def pnml(test, fit):
    weight, bias = array(test.head.weight), array(test.head.bias)
    train = np.array([u / length(u) for u in array(fit.train.embedding)])
    inverse = np.linalg.pinv(train.T @ train, rcond=1e-10, hermitian=True)
    found = []
    for _, u in each(test):
        u = u / length(u)
        p, g = softmax(weight @ u + bias), u @ inverse @ u
        terms = [x / (x + (1 - x) * x ** (g / (1 + g))) for x in p]
        found.append(math.log(sum(terms)) / math.log(len(p)))
    return np.array(found)


def openmax(test, fit, tail=20, alpha=3):
    """Weibull distributions by the root of their likelihood's slope."""

    def shape_and_scale(x):
        x = np.array(x)

        def slope(k):
            power = (x / x.max()) ** k
            return power @ np.log(x) / power.sum() - 1 / k - np.log(x).mean()

        k = optimize.brentq(slope, 1e-2, 1e4, xtol=1e-14, rtol=1e-14)
        return k, x.max() * ((x / x.max()) ** k).mean() ** (1 / k)

    logits, labels = array(fit.train.logits), labels_of(fit.train)
    classes = logits.shape[1]
    laws = {}
    for c in range(classes):
        rows = [z for z, label in zip(logits, labels, strict=True) if label == c == z.argmax()]
        if not rows:
            continue
        centre = np.mean(rows, axis=0)
        tails = sorted(length(z - centre) for z in rows)[-tail:]
        over = [d - tails[0] for d in tails if d > tails[0]]
        law = shape_and_scale(over) if len(set(over)) > 1 else None
        laws[c] = centre, tails[0], law
    found = []
    for z in array(test.logits):
        revised, unknown = z.copy(), 0.0
        for i, c in enumerate(sorted(range(classes), key=lambda c: -z[c])[: min(alpha, classes)]):
            centre, shift, law = laws.get(c, (z, 0, None))
            far = length(z - centre) - shift
            share = 0 if law is None else 1 - math.exp(-((max(far, 0) / law[1]) ** law[0]))
            omega = 1 - (min(alpha, classes) - i) / min(alpha, classes) * share
            unknown += z[c] * (1 - omega)
            revised[c] = z[c] * omega
        found.append(unknown - logsumexp(revised))
    return np.array(found)


def actsub(test, fit, p=95, power=2, neighbours=10):
    weight, bias = array(test.head.weight), array(test.head.bias)
    train = array(fit.train.embedding)
    directions = np.linalg.svd(weight)[2][: np.linalg.matrix_rank(weight)]

    def parts(u, dim):
        decisive = sum((u @ v) * v for v in directions[:dim])
        return decisive, u - decisive

    def imbalance(dim):
        pairs = [[length(x) for x in parts(u, dim)] for u in train]
        return abs(np.mean([a - b for a, b in pairs]))

    dim = min(range(1, len(directions) + 1), key=imbalance)
    bank = [parts(u, dim)[1] for u in train]
    found = []
    for u in array(test.embedding):
        decisive, rest = parts(u, dim)
        z = weight @ (decisive * math.exp(ratio(decisive, p))) + bias
        cosines = sorted(dot(rest, v) / (length(rest) * length(v)) for v in bank)
        near = max(np.mean(cosines[-neighbours:]), 0)
        found.append(-np.logaddexp(0, logsumexp(z)) * (-math.log(1 - near)) ** power)
    return np.array(found)


def weiper(test, fit, delta=1.8, copies=100, bins=100, factors=(2.5, 0.1), sizes=(4, 15)):
    weight, bias = array(test.head.weight), array(test.head.bias)
    generator = torch.Generator().manual_seed(0)
    heads = []
    for _ in range(copies):
        noise = array(torch.randn(weight.shape, generator=generator))
        scaled = [length(w) * n / length(n) for w, n in zip(weight, noise, strict=True)]
        heads.append(weight + delta * np.array(scaled))

    def logits(u):
        return np.array([head @ u + bias for head in heads])

    def histogram(values, ends):
        return np.histogram(values, bins=bins, range=ends)[0] / np.size(values)

    def distance(p, q, size, epsilon):
        before = (size - 1) // 2
        wide = np.pad(p, (before, size - 1 - before), mode="edge")
        p = np.array([wide[i : i + size].mean() for i in range(bins)]) + epsilon
        p, q = p / p.sum(), (q + epsilon) / (q + epsilon).sum()
        return sum(p * np.log(p / q)) + sum(q * np.log(q / p))

    train = array(fit.train.embedding)
    many = np.array([logits(u) for u in train])
    ends = (train.min(), train.max()), (many.min(), many.max())
    usual = [
        np.mean([histogram(x, e) for x in xs], axis=0)
        for xs, e in zip((train, many), ends, strict=True)
    ]
    found = []
    for u in array(test.embedding):
        z = logits(u)
        own = distance(histogram(u, ends[0]), usual[0], sizes[0], 0.01)
        others = distance(histogram(z, ends[1]), usual[1], sizes[1], 0.025)
        sure = np.mean([softmax(row).max() for row in z])
        found.append(own + factors[0] * others - factors[1] * sure)
    return np.array(found)


def last(rows: Features):
    """The last map."""
    (layer,) = [layer for layer in rows.layers.values() if layer.peak is not None]
    return layer


def davis(test, fit=None, gamma=1):
    weight, bias = array(test.head.weight), array(test.head.bias)
    pairs = zip(array(last(test).mean), array(last(test).std), strict=True)
    return np.array([free_energy(weight @ (m + gamma * s) + bias) for m, s in pairs])


def rankfeat(test, fit=None):
    """What tests/unit/test_rankfeat.py compares with the singular values is recorded."""
    weight, bias = array(test.head.weight), array(test.head.bias)
    pairs = zip(array(test.embedding), array(last(test).rank1), strict=True)
    return np.array([free_energy(weight @ (u - first) + bias) for u, first in pairs])


def catalyst(test, fit, percentile=95):
    c = np.percentile(array(last(fit.train).std), percentile)
    pairs = zip(array(test.logits), array(last(test).std), strict=True)
    return np.array([free_energy(z) * sum(min(max(x, 0), c) for x in s) for z, s in pairs])


def feature_norm(test, fit=None):
    pairs = zip(array(last(test).mean), array(last(test).std), strict=True)
    return np.array([-np.mean(np.sqrt(m**2 + s**2)) for m, s in pairs])


def boundary_distances(test):
    """Mean distance of each row to the boundaries of its class, and its embedding."""
    weight = array(test.head.weight)
    for z, u in each(test):
        k = z.argmax()
        others = [c for c in range(len(z)) if c != k]
        yield np.mean([(z[k] - z[c]) / length(weight[k] - weight[c]) for c in others]), u


def fdbd(test, fit):
    mean = array(fit.train.embedding).mean(0)
    return np.array([-d / length(u - mean) for d, u in boundary_distances(test)])


def fdbd_norm(test, fit=None):
    return np.array([-d / length(u) for d, u in boundary_distances(test)])


def ora(test, fit):
    train, labels = array(fit.train.embedding), labels_of(fit.train)
    centre = np.mean([train[labels == c].mean(0) for c in sorted(set(labels.tolist()))], axis=0)
    weight = array(test.head.weight)
    found = []
    for z, u in each(test):
        k = z.argmax()
        angles = []
        for c in range(len(z)):
            normal = weight[k] - weight[c]
            if c != k:
                foot = u - (z[k] - z[c]) / dot(normal, normal) * normal
                cosine = dot(u - centre, foot - centre) / length(u - centre) / length(foot - centre)
                angles.append(math.acos(cosine))
        found.append(-max(angles) / math.pi)
    return np.array(found)


def nci(test, fit, alpha=1e-4):
    mean, weight = array(fit.train.embedding).mean(0), array(test.head.weight)
    found = []
    for z, u in each(test):
        along = dot(weight[z.argmax()], u - mean) / length(u - mean)
        found.append(-along - alpha * sum(abs(u)))
    return np.array(found)


def from_means(test, fit):
    """Logits, embedding, and its difference from the mean of the rows predicted alike."""
    train, predicted = array(fit.train.embedding), array(fit.train.logits).argmax(1)
    for z, u in each(test):
        alike = train[predicted == z.argmax()]
        yield z, u, u - (alike if len(alike) else train).mean(0)


def caref(test, fit):
    return np.array([sum(abs(d)) / sum(abs(u)) for _, u, d in from_means(test, fit)])


def cadref(test, fit):
    weight, average = array(test.head.weight), positive_energy(fit.train).mean()
    found = []
    for energy, (z, u, d) in zip(positive_energy(test), from_means(test, fit), strict=True):
        towards = [a * np.sign(w) for a, w in zip(d, weight[z.argmax()], strict=True)]
        first = sum(a for a in towards if a > 0) / sum(abs(u))
        second = sum(-a for a in towards if a < 0) / sum(abs(u))
        found.append(first / energy + second / average)
    return np.array(found)


def vim(test, fit, dim=None):
    weight, bias = array(test.head.weight), array(test.head.bias)
    origin = -np.linalg.pinv(weight) @ bias
    train, rows = (array(f.embedding) - origin for f in (fit.train, test))
    dim = min(train.shape[1] // 2, 1000) if dim is None else dim
    # The right singular vectors of the rows are the eigenvectors of their second moments.
    residual = np.linalg.svd(train)[2][dim:].T
    largest = array(fit.train.logits).max(1).mean()
    alpha = largest / np.linalg.norm(train @ residual, axis=1).mean()
    virtual = alpha * np.linalg.norm(rows @ residual, axis=1)
    return virtual + energy(test)


# ---------------------------------------------------------------------------- BatchNorm


def channels(test, only_input=False):
    """For each row the (M, S², HW) of every channel of every layer, the image's first."""
    names = [INPUT] if only_input else list(test.batchnorm)
    rows = [[] for _ in range(len(test))]
    for norm in (test.batchnorm[name] for name in names):
        centre, spread = array(norm.running_mean), array(norm.running_var) + norm.eps
        for row, mean, var in zip(rows, array(norm.mean), array(norm.var), strict=True):
            m, s2 = (mean - centre) / np.sqrt(spread), var / spread
            row += [(a, b, norm.spatial_size) for a, b in zip(m, s2, strict=True)]
    return rows


def dms_of(m, s2, size):
    return m**2


def dms_aos_of(m, s2, size):
    return m**2 + s2 * (size - 1) / size


def dss_of(m, s2, size):
    return (math.sqrt(s2) - 1) ** 2 if size > 1 else 0.0


def dss_ext_of(m, s2, size):
    if size == 1:
        return 0.0
    below = stats.chi2.cdf((size - 1) * s2, size - 1)
    return float(2 * min(below, 1 - below) < 0.1)


def batchnorm(of, only_input=False):
    """The mean over all channels."""

    def score(test, fit=None):
        rows = channels(test, only_input)
        return np.array([sum(of(*channel) for channel in row) / len(row) for row in rows])

    return score


# ---------------------------------------------------------------------------- indicators together

OUTPUT = ("t1000", "msp", "entropy")
LATENT = ("norm", "norm+", "act", "act+", "proj", "ang", "ang++")
SPREAD = ("dms", "dms-aos", "dss", "dss-ext")


def indicators(rows, names=(*OUTPUT, *LATENT, *SPREAD)):
    return np.stack([NAIVE[name](rows, None) for name in names], 1)


def one_class_sum(test, fit):
    on_noise = indicators(fit.train)
    spread = np.std(on_noise, axis=0)
    spread[spread <= 1e-12 * abs(on_noise.mean(0))] = 1
    return ((indicators(test) - on_noise.mean(0)) / spread).sum(1)


def supervised(test, fit):
    names = (*OUTPUT, *LATENT, *SPREAD, *(f"in-{name}" for name in SPREAD))
    inside, outside = indicators(fit.train, names), indicators(fit.ood, names)
    scaler = StandardScaler().fit(np.concatenate([inside, outside]))
    svm = LinearSVC(dual=False, class_weight="balanced", tol=1e-8, max_iter=10_000)
    labels = np.repeat([0, 1], [len(inside), len(outside)])
    svm.fit(scaler.transform(np.concatenate([inside, outside])), labels)
    return svm.decision_function(scaler.transform(indicators(test, names)))


# ---------------------------------------------------------------------------- distances


def labels_of(rows: Features) -> Array:
    """The labels; where they are unknown, the predicted classes."""
    predicted = array(rows.logits).argmax(1)
    if rows.label is None:
        return predicted
    return np.where(rows.label.numpy() >= 0, rows.label.numpy(), predicted)


def predicted_of(rows: Features, present) -> list[int]:
    """The class with the largest logit among some."""
    present = sorted(present)
    return [present[int(z[present].argmax())] for z in array(rows.logits)]


def nearest_mahalanobis(train: Array, labels: Array, test: Array, pseudo: bool = False) -> Array:
    """Squared distances to the nearest class mean; one covariance, divisor N. pseudo: directions
    of less than 1e-10 of the largest variance do not count."""
    means = {c: train[labels == c].mean(0) for c in sorted(set(labels.tolist()))}
    centred = np.array([x - means[c] for x, c in zip(train, labels.tolist(), strict=True)])
    covariance = centred.T @ centred / len(train)
    precision = np.linalg.pinv(covariance, 1e-10) if pseudo else np.linalg.inv(covariance)
    return np.array([min((x - m) @ precision @ (x - m) for m in means.values()) for x in test])


def mds(test, fit):
    labels = labels_of(fit.train)
    return nearest_mahalanobis(array(fit.train.embedding), labels, array(test.embedding))


def unit_rows(rows: Array) -> Array:
    return np.array([x / length(x) for x in rows])


def mds_on_directions(test, fit):
    train, rows = (unit_rows(array(f.embedding)) for f in (fit.train, test))
    return nearest_mahalanobis(train, labels_of(fit.train), rows)


def rmds(test, fit, directions=False):
    train, rows = (array(f.embedding) for f in (fit.train, test))
    if directions:
        train, rows = unit_rows(train), unit_rows(rows)
    one = np.zeros(len(train), dtype=int)
    nearest = nearest_mahalanobis(train, labels_of(fit.train), rows, pseudo=True)
    return nearest - nearest_mahalanobis(train, one, rows, pseudo=True)


def gmm(test, fit, tied=True):
    train, labels = array(fit.train.embedding), labels_of(fit.train)
    classes = sorted(set(labels.tolist()))
    groups = [train[labels == c] for c in classes]
    covariances = [np.cov(group.T, ddof=0) for group in groups]
    if tied:
        shares = [len(group) / len(train) for group in groups]
        covariances = [sum(s * c for s, c in zip(shares, covariances, strict=True))] * len(classes)
    densities = [
        math.log(len(group) / len(train))
        + stats.multivariate_normal.logpdf(array(test.embedding), group.mean(0), covariance)
        for group, covariance in zip(groups, covariances, strict=True)
    ]
    return -logsumexp(densities, axis=0)


def class_mean_rows(rows: Array, labels: Array) -> dict[int, Array]:
    return {c: rows[labels == c].mean(0) for c in sorted(set(labels.tolist()))}


def she(test, fit):
    train, labels = fit.train, labels_of(fit.train)
    right = labels == array(train.logits).argmax(1)
    pattern = class_mean_rows(array(train.embedding)[right], labels[right])
    predicted = predicted_of(test, pattern)
    return np.array(
        [-dot(u, pattern[c]) for u, c in zip(array(test.embedding), predicted, strict=True)]
    )


def cosine(a, b):
    return dot(a, b) / length(a) / length(b)


def ctm(test, fit):
    means = class_mean_rows(array(fit.train.embedding), labels_of(fit.train))
    return np.array([-max(cosine(u, m) for m in means.values()) for u in array(test.embedding)])


def proto_fusion(test, fit):
    total = np.zeros(len(test))
    for name in stages(fit.train):
        train, rows = (array(f.layers[name].mean) for f in (fit.train, test))
        prototypes = class_mean_rows(unit_rows(train), labels_of(fit.train))
        total += [max(cosine(x, p) for p in prototypes.values()) for x in rows]
    return -total / len(stages(fit.train))


def nnguide(test, fit):
    """A tenth of the rows, all of which are stored."""
    train = fit.train
    bank = unit_rows(array(train.embedding)) * positive_energy(train)[:, None]
    k = max(1, len(bank) // 10)
    found = []
    for energy, u in zip(positive_energy(test), array(test.embedding), strict=True):
        guidance = sorted(dot(u, v) / length(u) for v in bank)[-k:]
        found.append(-energy * np.mean(guidance))
    return np.array(found)


def residual(test, fit):
    weight, bias = array(test.head.weight), array(test.head.bias)
    origin = -np.linalg.pinv(weight) @ bias
    train, rows = (array(f.embedding) - origin for f in (fit.train, test))
    off = np.linalg.svd(train)[2][train.shape[1] // 2 :]
    return np.array([length(off @ x) for x in rows])


def neco(test, fit, share=0.9):
    train = array(fit.train.embedding)
    spread = np.where(train.std(0) > 0, train.std(0), 1)
    train, rows = ((array(f.embedding) - train.mean(0)) / spread for f in (fit.train, test))
    _, values, directions = np.linalg.svd(train)
    held = np.cumsum(values**2) / sum(values**2)
    kept = directions[: next(i for i, part in enumerate(held) if part >= share) + 1]
    return np.array([-length(kept @ x) / length(x) for x in rows])


def reconstruction(train, rows, share=0.9):
    """Distances from the principal space that holds a share of the variance."""
    mean = train.mean(0)
    _, values, directions = np.linalg.svd(train - mean, full_matrices=False)
    held = np.cumsum(values**2) / sum(values**2)
    kept = directions[: next(i for i, part in enumerate(held) if part >= share) + 1]
    return np.array([length(x - mean - kept.T @ (kept @ (x - mean))) for x in rows])


def cop(test, fit):
    return reconstruction(*(unit_rows(array(f.embedding)) for f in (fit.train, test)))


def corp(test, fit, gamma=2.0):
    train, rows = (unit_rows(array(f.embedding)) for f in (fit.train, test))
    width = train.shape[1]
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    frequency = array(torch.randn(width, 4 * width, **draw)) * math.sqrt(2 * gamma)
    phase = array(torch.rand(4 * width, **draw)) * 2 * math.pi

    def features(u):
        angles = [dot(u, column) for column in frequency.T] + phase
        return [math.cos(angle) * math.sqrt(2 / len(phase)) for angle in angles]

    return reconstruction(*(np.array([features(u) for u in part]) for part in (train, rows)))


def pca_fused(test, fit, percentile=90.0):
    train, rows = array(fit.train.embedding), array(test.embedding)
    c = np.percentile(train, percentile)
    weight, bias = array(test.head.weight), array(test.head.bias)
    found = []
    for u, error in zip(rows, reconstruction(train, rows), strict=True):
        clipped = np.minimum(u, c)
        e = free_energy(np.append(weight @ clipped + bias, 0))
        found.append(e * (1 - error / length(clipped)))
    return np.array(found)


def relation(test, fit):
    bank = [(u / length(u), softmax(z)) for z, u in each(fit.train)]
    found = []
    for z, u in each(test):
        edges = [max(0, dot(u, v) / length(u)) * dot(softmax(z), q) for v, q in bank]
        found.append(-sum(e for e in edges if e > 0.03) / len(bank))
    return np.array(found)


def nac(test, fit, alpha=100.0, bins=50, share=0.05):
    weight = array(test.head.weight)

    def states(rows):
        for z, u in each(rows):
            gradient = weight.T @ (softmax(z) - 1 / len(z))
            yield [
                min(int(bins / (1 + math.exp(-alpha * a * g)) + 1e-9), bins - 1)
                for a, g in zip(u, gradient, strict=True)
            ]

    train = list(states(fit.train))
    found = []
    for row in states(test):
        alike = [sum(other[i] == bin_ for other in train) for i, bin_ in enumerate(row)]
        found.append(-np.mean([min(n / (share * len(train)), 1) for n in alike]))
    return np.array(found)


def stages(rows: Features) -> list[str]:
    return [name for name, layer in rows.layers.items() if layer.kind == "stage"]


def mds_sum(test, fit, strength=1.0):
    """With OOD rows, weighted by a logistic regression."""
    labels = labels_of(fit.train)

    def distances(rows):
        return np.stack(
            [
                nearest_mahalanobis(
                    array(fit.train.layers[name].mean), labels, array(rows.layers[name].mean)
                )
                for name in stages(fit.train)
            ],
            1,
        )

    if fit.ood is None:
        return distances(test).sum(1)
    inside, outside = distances(fit.train), distances(fit.ood)
    both = np.concatenate([inside, outside])
    scale = both.mean(0)
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000)
    model.fit(both / scale, np.repeat([0, 1], [len(inside), len(outside)]))
    return distances(test) @ (model.coef_[0] / scale)


def knn(test, fit, k=None):
    train = [u / length(u) for u in array(fit.train.embedding)]
    k = k or min(50, max(1, len(train) // (2 * fit.train.logits.shape[1])))
    return np.array(
        [sorted(length(u / length(u) - v) for v in train)[k - 1] for u in array(test.embedding)]
    )


def one_dimensional(test, fit):
    train, labels = array(fit.train.embedding), labels_of(fit.train)
    firsts = [np.linalg.svd(train[labels == c])[2][0] for c in sorted(set(labels.tolist()))]
    return np.array(
        [min(math.acos(abs(u @ v) / length(u)) for v in firsts) for u in array(test.embedding)]
    )


def outside(value, low, high):
    if value < low:
        return (low - value) / (abs(low) + 1e-6)
    if value > high:
        return (value - high) / (abs(high) + 1e-6)
    return 0.0


def gram_deviation(row, others):
    """How far a row leaves the range of others."""
    lows, highs = np.min(others, axis=0), np.max(others, axis=0)
    return sum(outside(*values) for values in zip(row, lows, highs, strict=True))


def gram(test, fit):
    """Each layer's deviation by what it is for rows fitted on, each left out in turn; those of a
    class without a second row do not count."""
    predicted = array(fit.train.logits).argmax(1).tolist()
    present = {c for c in predicted if predicted.count(c) > 1}
    total = np.zeros(len(test))
    for name, layer in fit.train.layers.items():
        if layer.gram is None:
            continue
        table = array(layer.gram)
        members = {c: [i for i, other in enumerate(predicted) if other == c] for c in present}
        left_out = [
            gram_deviation(table[i], table[[j for j in members[c] if j != i]])
            for i, c in enumerate(predicted)
            if c in present
        ]
        mean = sum(left_out) / len(left_out)
        for i, c in enumerate(predicted_of(test, present)):
            total[i] += gram_deviation(array(test.layers[name].gram)[i], table[members[c]]) / mean
    return total


# ---------------------------------------------------------------------------- lsgm


def over_all_traces(densities: Sequence[Array], prior: Array, transitions: Sequence[Array]):
    """log P(x_1, …, x_m), one trace of components after the other. densities: (N, K_i) logarithms
    for each layer; prior: (K_1,) and transitions: (K_{i−1}, K_i), probabilities."""
    traces = []
    with np.errstate(divide="ignore"):
        for trace in itertools.product(*(range(d.shape[1]) for d in densities)):
            value = np.log(prior[trace[0]]) + densities[0][:, trace[0]]
            for density, step, (j, k) in zip(
                densities[1:], transitions, itertools.pairwise(trace), strict=True
            ):
                value = value + density[:, k] + np.log(step[j, k])
            traces.append(value)
    return logsumexp(np.stack(traces), 0)


def lsgm(test, fit, components=50):
    """Mixtures by scikit-learn on each stage's sorted rows, in units of their mean variance."""
    densities, assigned, weights = [], [], []
    for name in stages(fit.train):
        rows = array(fit.train.layers[name].mean)
        rows = rows[np.lexsort(rows.T[::-1])]
        centre = rows.mean(0)
        scale = math.sqrt(np.square(rows - centre).mean())
        data = (rows - centre) / scale
        width = data.shape[1]
        model = BayesianGaussianMixture(
            n_components=min(components, len(data)),
            weight_concentration_prior_type="dirichlet_process",
            covariance_prior=width * (data.T @ data / len(data) + 1e-6 * np.eye(width)),
            reg_covar=1e-6,
            random_state=0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(data)

        def density(block, name=name, model=model, centre=centre, scale=scale, width=width):
            x = (array(block.layers[name].mean) - centre) / scale
            pairs = zip(model.means_, model.covariances_, strict=True)
            columns = [stats.multivariate_normal.logpdf(x, mean, cov) for mean, cov in pairs]
            return np.stack(columns, 1) - width * math.log(scale)

        densities.append(density(test))
        weights.append(model.weights_)
        assigned.append((np.log(model.weights_) + density(fit.train)).argmax(1))
    transitions = []
    for i in range(1, len(assigned)):
        counts = np.zeros((len(weights[i - 1]), len(weights[i])))
        for j, k in zip(assigned[i - 1], assigned[i], strict=True):
            counts[j, k] += 1
        even = np.full(counts.shape[1], 1 / counts.shape[1])
        transitions.append(np.array([row / row.sum() if row.sum() else even for row in counts]))
    return -over_all_traces(densities, weights[0], transitions)


# ---------------------------------------------------------------------------- virtual images


def batchnorm_outputs(rows: Features) -> list[str]:
    return [name for name, layer in rows.layers.items() if layer.kind == "batchnorm"]


def c2ir(test, fit):
    """Equations 6 to 10 of the paper, one image, layer and class at a time."""
    train, labels = fit.train, labels_of(fit.train)
    names = batchnorm_outputs(train)
    found = []
    for row, c in enumerate(predicted_of(test, set(labels.tolist()))):
        mine = labels == c
        deltas, deviations = [], []
        for name in names:
            layer = train.layers[name]
            beta = softmax(array(layer.gradient)[mine].mean(0))
            deltas.append(np.mean([dot(beta, s) for s in array(layer.sensitivity)[mine]]))
            average = np.mean([dot(beta, m) for m in array(layer.mean)[mine]])
            deviations.append(abs(dot(beta, array(test.layers[name].mean)[row]) - average))
        found.append(dot(softmax(np.array(deltas)), deviations))
    return np.array(found)


RIDGE = 1e-3


def standardised_deviations(test, train):
    """(N, L): mean over channels of the squared deviation from the class's mean, in variances
    within classes, which get a ridge."""
    labels = labels_of(train)
    present = sorted(set(labels.tolist()))
    columns = []
    for name in batchnorm_outputs(train):
        rows = array(train.layers[name].mean)
        means = {c: rows[labels == c].mean(0) for c in present}
        scatter = sum(np.square(rows[labels == c] - means[c]).sum(0) for c in present)
        variance = scatter / (len(rows) - len(present))
        variance = variance + RIDGE * variance.mean()
        tested = array(test.layers[name].mean)
        columns.append(
            [
                np.mean((x - means[c]) ** 2 / variance)
                for x, c in zip(tested, predicted_of(test, present), strict=True)
            ]
        )
    return np.array(columns).T


def c2ir_z(test, fit):
    train, labels = fit.train, labels_of(fit.train)
    present = sorted(set(labels.tolist()))
    weight = array(train.head.weight)
    evidence = {c: -array(train.embedding)[labels == c] @ weight[c] for c in present}
    scatter = sum(np.square(e - e.mean()).sum() for e in evidence.values())
    spread = math.sqrt(scatter / (len(train) - len(present)) * (1 + RIDGE))
    z = [
        (-dot(u, weight[c]) - evidence[c].mean()) / spread
        for u, c in zip(array(test.embedding), predicted_of(test, present), strict=True)
    ]
    return standardised_deviations(test, train).mean(1) + z


def last_peaks(rows: Features) -> Array:
    (found,) = [layer.peak for layer in rows.layers.values() if layer.peak is not None]
    return array(found)


def peak(test, fit=None):
    return np.array([-length(p) for p in last_peaks(test)])


def positive_energy(test):
    return np.array([math.log(1 + np.exp(z).sum()) for z in array(test.logits)])


def peak_energy(test, fit=None):
    return -(peak(test) ** 2) * positive_energy(test)


def on_scale(of_test, of_pool):
    """Both by the median and the interquartile range of the second."""
    low, median, high = np.percentile(of_pool, [25, 50, 75])
    return (of_test - median) / (high - low), (of_pool - median) / (high - low)


def summed(*parts):
    """Scores of parts, each on the scale that it has on the pool."""

    def score(test, fit):
        noise = Fit(fit.noise)
        total = 0.0
        for name in parts:
            its = noise if name == "1c-sum" else fit
            total += on_scale(NAIVE[name](test, its), NAIVE[name](fit.pool, its))[0]
        return total

    return score


def c2ir_peak(test, fit, near=0.5):
    """Peak counts where noise has the lower ones, and the last map over four positions. near: units
    of nci."""

    def log_energy(rows):
        return -np.log(positive_energy(rows))

    def log_deviation(rows):
        deviations = standardised_deviations(rows, fit.train)
        return np.log(np.maximum(deviations, 1e-3)).mean(1)

    def log_peak(rows):
        return -np.log(-peak(rows))

    def scaled(part):
        return on_scale(part(test), part(fit.pool))

    first, second = scaled(log_energy), scaled(log_deviation)
    total = on_scale(*(a + b for a, b in zip(first, second, strict=True)))[0]
    (last,) = (layer for layer in fit.pool.layers.values() if layer.peak is not None)
    active = last.peak.numpy() > 0
    times = last.peak.numpy()[active] / last.mean.numpy()[active]
    many = times.min() < 0 or times.max() > 4.5
    if many and np.median(-peak(fit.noise)) < np.median(-peak(fit.pool)):
        total = total + scaled(log_peak)[0]
    return total + near * scaled(lambda rows: nci(rows, Fit(fit.train)))[0]


NAIVE = {
    "msp": msp,
    "entropy": entropy,
    "t1000": t1000,
    "temp-scaling": temp_scaling,
    "gen": gen,
    "doctor": doctor,
    "mls": mls,
    "energy": energy,
    "odin": odin,
    "pro": pro,
    "gaia-z": gaia_z,
    "joint-energy": joint_energy,
    "mc-dropout": mc_dropout,
    "godin": godin,
    "mos": mos,
    "norm": norm,
    "norm+": lambda test, fit: norm(test, positive=True),
    "ang": ang,
    "ang++": lambda test, fit: ang(test, positive=True),
    "proj": proj,
    "act": act,
    "act+": lambda test, fit: act(test, positive=True),
    "dms": batchnorm(dms_of),
    "dms-aos": batchnorm(dms_aos_of),
    "dss": batchnorm(dss_of),
    "dss-ext": batchnorm(dss_ext_of),
    "in-dms": batchnorm(dms_of, only_input=True),
    "in-dms-aos": batchnorm(dms_aos_of, only_input=True),
    "in-dss": batchnorm(dss_of, only_input=True),
    "in-dss-ext": batchnorm(dss_ext_of, only_input=True),
    "1c-sum": one_class_sum,
    "supervised": supervised,
    "thinkback": thinkback,
    "thinkback-norm": thinkback_norm,
    "gradnorm": gradnorm,
    "igoe": igoe,
    "expgrad": expgrad,
    "rg": rg,
    "rg-add": rg_add,
    "energy-norm": energy_norm,
    "react": react,
    "scale": scale,
    "lts": lts,
    "ash-p": ash("p"),
    "ash-b": ash("b"),
    "ash-s": ash("s"),
    "dice": dice,
    "vra": vra,
    "adascale-a": adascale("a"),
    "adascale-l": adascale("l"),
    "ras": ras,
    "optfs": optfs,
    "fdbd-norm": fdbd_norm,
    "fdbd": fdbd,
    "ora": ora,
    "nci": nci,
    "caref": caref,
    "cadref": cadref,
    "nac": nac,
    "klm": klm,
    "openmax": openmax,
    "mds": mds,
    "mds++": mds_on_directions,
    "gmm": gmm,
    "rmds": rmds,
    "rmds++": lambda test, fit: rmds(test, fit, directions=True),
    "mds-sum": mds_sum,
    "she": she,
    "ctm": ctm,
    "proto-fusion": proto_fusion,
    "knn": knn,
    "nnguide": nnguide,
    "relation": relation,
    "residual": residual,
    "vim": vim,
    "pnml": pnml,
    "actsub": actsub,
    "weiper": weiper,
    "neco": neco,
    "cop": cop,
    "corp": corp,
    "pca-fused": pca_fused,
    "gram": gram,
    "1d": one_dimensional,
    "lsgm": lsgm,
    "c2ir": c2ir,
    "c2ir-z": c2ir_z,
    "peak": peak,
    "peak-energy": peak_energy,
    "davis": davis,
    "rankfeat": rankfeat,
    "catalyst": catalyst,
    "feature-norm": feature_norm,
    "c2ir-peak": c2ir_peak,
    "duo": summed("c2ir-z", "1c-sum"),
    "trio": summed("c2ir-z", "1c-sum", "peak"),
}
"""Detector → its naive score of (rows to score, what it is fitted on)."""
