"""The latent sequential Gaussian mixture against enumeration, scipy and scikit-learn."""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from naive import over_all_traces
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.decomposition import PCA
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture

from oodcli.detectors import lsgm, mixture_fit, serial
from oodcli.detectors.lsgm import (
    LSGM,
    Projection,
    forward,
    gaussian_log_density,
    most_probable_trace,
    transition_matrix,
)
from oodcli.errors import DetectorError
from oodcli.features import Features, Layer

SIZES = (3, 2, 4, 3)
"""Components of each layer of the enumerated examples."""


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block(count=120, widths=(3, 4), seed=0, groups=3):
    """Rows in a few clusters, whose members move together from layer to layer."""
    group = torch.arange(count) % groups
    layers = {
        f"stage{i}": Layer(
            "stage",
            (
                random(count, width, seed=seed + i) + 6 * random(groups, width, seed=50 + i)[group]
            ).float(),
        )
        for i, width in enumerate(widths, start=1)
    }
    return Features(count=count, layers=layers)


def changed(rows, name, change):
    layers = {**rows.layers, name: replace(rows.layers[name], mean=change(rows.layers[name].mean))}
    return replace(rows, layers=layers)


# ---------------------------------------------------------------------------- formulas


@pytest.fixture
def chain():
    """Log densities down to −2000, a prior and transitions with zeros."""
    densities = [30 * random(5, size, seed=i) - 50 for i, size in enumerate(SIZES)]
    densities[1][0] -= 2000
    densities[2][1, 0] = -2000
    prior = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    transitions = []
    for i, (before, after) in enumerate(itertools.pairwise(SIZES)):
        matrix = random(before, after, seed=10 + i).exp()
        matrix[0, 1] = 0.0
        transitions.append((matrix / matrix.sum(1, keepdim=True)).log())
    return densities, prior.log(), transitions


def every_trace(densities, prior, transitions):
    """Trace → (N,) its log probability, one by one."""
    found = {}
    for trace in itertools.product(*(range(d.shape[1]) for d in densities)):
        value = prior[trace[0]] + sum(d[:, k] for d, k in zip(densities, trace, strict=True))
        for t, (j, k) in zip(transitions, itertools.pairwise(trace), strict=True):
            value = value + t[j, k]
        found[trace] = value
    return found


def test_forward_is_the_sum_over_all_traces(chain):
    values = torch.stack(list(every_trace(*chain).values()))
    assert len(values) == math.prod(SIZES)
    assert torch.isneginf(values).any()
    torch.testing.assert_close(
        forward(*chain), torch.from_numpy(logsumexp(values.numpy(), 0)), rtol=1e-12, atol=0
    )


def test_viterbi_is_the_largest_of_all_traces(chain):
    found = every_trace(*chain)
    values = torch.stack(list(found.values()))
    traces, best = most_probable_trace(*chain)
    torch.testing.assert_close(best, values.max(0).values, rtol=1e-12, atol=0)
    assert [tuple(t) for t in traces.tolist()] == [list(found)[i] for i in values.argmax(0)]


def test_chunks_do_not_matter(chain, monkeypatch):
    whole = forward(*chain), *most_probable_trace(*chain)
    densities = gaussian_log_density(random(9, 2), random(3, 2), torch.eye(2).double()[None])
    monkeypatch.setattr(lsgm, "AT_ONCE", 13)
    parts = forward(*chain), *most_probable_trace(*chain)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    again = gaussian_log_density(random(9, 2), random(3, 2), torch.eye(2).double()[None])
    assert torch.equal(densities, again)


def test_an_impossible_sequence(chain):
    densities, prior, transitions = chain
    nowhere = [*transitions[:1], torch.full_like(transitions[1], -torch.inf), *transitions[2:]]
    assert torch.isneginf(forward(densities, prior, nowhere)).all()
    assert torch.isneginf(most_probable_trace(densities, prior, nowhere)[1]).all()


def test_the_likeliest_component_may_lead_nowhere():
    """α of the first component is larger by e^1000, but only the second one leads on."""
    densities = [torch.tensor([[0.0, -1000.0]]).double(), torch.zeros(1, 2).double()]
    transition = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double().log()
    densities[1][0, 0] = -5000.0
    prior = torch.tensor([0.5, 0.5]).double().log()
    expected = math.log(0.5) - 1000
    assert forward(densities, prior, [transition]).item() == pytest.approx(expected, rel=1e-14)


def test_one_layer_is_a_plain_mixture():
    density, prior = random(4, 3), torch.tensor([0.2, 0.3, 0.5]).double().log()
    torch.testing.assert_close(forward([density], prior, []), (density + prior).logsumexp(1))


@pytest.mark.parametrize("kind", ["full", "tied", "diag"])
def test_log_density_against_scipy(kind):
    rows, means = random(7, 3), random(4, 3, seed=1)
    root = random(4, 3, 3, seed=2)
    covariance = root @ root.mT + 0.1 * torch.eye(3)
    factor = torch.linalg.cholesky(covariance)
    if kind == "tied":
        covariance, factor = covariance[:1].expand(4, 3, 3), factor[:1]
    if kind == "diag":
        covariance = covariance.diagonal(dim1=1, dim2=2).diag_embed()
        factor = covariance.diagonal(dim1=1, dim2=2).sqrt()
    expected = np.stack(
        [multivariate_normal.logpdf(rows, m, c) for m, c in zip(means, covariance, strict=True)], 1
    )
    torch.testing.assert_close(
        gaussian_log_density(rows, means, factor), torch.from_numpy(expected), rtol=1e-10, atol=0
    )


def test_transitions_by_hand():
    counts = torch.tensor([[3, 1, 0], [0, 0, 0]])
    expected = torch.tensor([[0.75, 0.25, 0.0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    torch.testing.assert_close(transition_matrix(counts), expected)


def test_projection_against_scikit_learn():
    rows = random(40, 5) @ random(5, 5, seed=1)
    mine, share = Projection.fit(rows, 2)
    theirs = PCA(2, svd_solver="full").fit(rows.numpy())
    assert share == pytest.approx(theirs.explained_variance_ratio_.sum(), rel=1e-10)
    signs = np.sign((mine.axes.numpy() * theirs.components_.T).sum(0))
    np.testing.assert_allclose(
        mine(rows).numpy() * signs, theirs.transform(rows.numpy()), atol=1e-10
    )
    assert (mine.axes.gather(0, mine.axes.abs().argmax(0, keepdim=True)) > 0).all()


# ---------------------------------------------------------------------------- fitting


def numpy_score(detector, rows):
    """The score from the artefact's parameters, one row and one trace at a time."""
    state = {key: tensor.numpy() for key, tensor in serial.state(detector).items()}
    names = serial.settings(detector)["layer_names"]
    kind = serial.settings(detector)["covariance_kind"]
    densities = []
    for i, name in enumerate(names):
        x = rows.layers[name].mean.double().numpy()
        if f"pca_axes/{name}" in state:
            x = (x - state[f"pca_center/{name}"]) @ state[f"pca_axes/{name}"]
        columns = []
        for k, mean in enumerate(state[f"means/{name}"]):
            covariance = state[f"covariance/{name}"]
            sigma = {
                "full": lambda c, k: c[k],
                "tied": lambda c, k: c,
                "diag": lambda c, k: np.diag(c[k]),
            }[kind](covariance, k)
            columns.append(multivariate_normal.logpdf(x, mean, sigma, allow_singular=True))
            if i and serial.settings(detector)["prior"] == "every-layer":
                columns[-1] = columns[-1] + np.log(state[f"weights/{name}"][k])
        densities.append(np.stack(columns, 1))
    transitions = [state[f"transitions/{name}"] for name in names[1:]]
    return torch.from_numpy(-over_all_traces(densities, state[f"weights/{names[0]}"], transitions))


@pytest.mark.parametrize("mixture", ["dp", "em"])
@pytest.mark.parametrize("covariance", ["full", "tied", "diag"])
@pytest.mark.parametrize("prior", ["first", "every-layer"])
def test_score_from_the_parameters_alone(mixture, covariance, prior):
    rows = block(widths=(3, 5))
    detector = LSGM.fit(
        rows, components=4, mixture=mixture, covariance=covariance, prior=prior, pca=4
    )
    assert list(detector.pca_axes) == ["stage2"]
    test = block(count=15, widths=(3, 5), seed=9)
    torch.testing.assert_close(
        detector.score(test), numpy_score(detector, test), rtol=1e-8, atol=1e-8
    )


def test_priors_differ():
    rows = block()
    first, every = (LSGM.fit(rows, components=3, prior=p) for p in ("first", "every-layer"))
    assert not torch.allclose(first.score(rows), every.score(rows))


@pytest.mark.parametrize("covariance", ["full", "tied", "diag"])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_em_is_scikit_learns(covariance, scale):
    rows = changed(block(), "stage2", lambda mean: 3 + scale * mean)
    detector = LSGM.fit(rows, components=3, mixture="em", covariance=covariance)
    for name, layer in rows.layers.items():
        data = layer.mean.double().numpy()
        ridge = 1e-6 * data.var(0).mean()
        theirs = GaussianMixture(
            3, covariance_type=covariance, reg_covar=ridge, max_iter=200, random_state=0, n_init=3
        ).fit(data)
        mine, other = detector.means[name].numpy(), theirs.means_
        order = [np.square(other - row).sum(1).argmin() for row in mine]
        assert sorted(order) == [0, 1, 2]
        which = slice(None) if covariance == "tied" else order
        spread = float(np.abs(theirs.covariances_).max())
        np.testing.assert_allclose(mine, other[order], rtol=1e-6)
        np.testing.assert_allclose(detector.weights[name], theirs.weights_[order], rtol=1e-6)
        np.testing.assert_allclose(
            detector.covariance[name], theirs.covariances_[which], rtol=1e-5, atol=1e-6 * spread
        )


@pytest.mark.parametrize("covariance", ["full", "tied", "diag"])
def test_dp_is_scikit_learns(covariance):
    """With a prior of which a component without rows is as wide as the layer."""
    rows = block(widths=(3,))
    detector = LSGM.fit(rows, components=6, covariance=covariance)
    data = rows.layers["stage1"].mean.double().numpy()
    data = data[np.lexsort(data.T[::-1])]
    ridge = 1e-6 * data.var(0).mean()
    whole = np.cov(data.T, bias=True) + ridge * np.eye(3)
    theirs = BayesianGaussianMixture(
        n_components=6,
        covariance_type=covariance,
        weight_concentration_prior_type="dirichlet_process",
        covariance_prior=3 * (np.diag(whole) if covariance == "diag" else whole),
        reg_covar=ridge,
        max_iter=200,
        random_state=0,
    ).fit(data)
    np.testing.assert_allclose(detector.means["stage1"], theirs.means_, rtol=1e-6)
    np.testing.assert_allclose(detector.weights["stage1"], theirs.weights_, rtol=1e-6)
    np.testing.assert_allclose(detector.covariance["stage1"], theirs.covariances_, rtol=1e-6)
    idle = int(detector.weights["stage1"].argmin())
    assert detector.shares["stage1"][idle] == 0
    if covariance == "full":
        np.testing.assert_allclose(detector.covariance["stage1"][idle], whole, rtol=1e-3)


@pytest.mark.parametrize("kept", [0, 1 << 19])
@pytest.mark.parametrize("at_once", [1, 1 << 19])
@pytest.mark.parametrize("covariance", ["full", "tied", "diag"])
def test_densities_that_differ_by_a_constant_are_computed_once(
    covariance, at_once, kept, monkeypatch
):
    """In passes of one row and of all, with products of channels kept or computed again."""
    monkeypatch.setattr(mixture_fit, "AT_ONCE", at_once)
    monkeypatch.setattr(mixture_fit, "KEPT", kept)
    rows = mixture_fit.Rows(random(3, 40), covariance)
    means = random(5, 3, seed=1)
    means[[1, 3, 4]] = 0.5
    spread = torch.ones(5, 3) if covariance == "diag" else torch.eye(3).expand(5, 3, 3)
    spread = spread.double()[: 1 if covariance == "tied" else 5]
    density, _ = mixture_fit.normal_density(rows, means, spread)
    density = density._replace(constant=density.constant + torch.arange(5) / 5)
    alike = torch.tensor([False, True, False, True, True])
    found, entropy = mixture_fit.grouped_expectation(rows, density, alike)
    apart, _, expected = mixture_fit.expectation(rows, density)
    for one, other in zip(found, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert entropy == pytest.approx(expected, rel=1e-12)
    # The shares of a row add up to 1, so the moments of all components to those of all rows.
    torch.testing.assert_close(found.size.sum(), torch.tensor(40.0).double())
    torch.testing.assert_close(found.total.sum(0), rows.x.sum(1))


def test_the_order_of_rows_does_not_matter():
    rows = block(count=300, groups=7)
    shuffled = rows.select(torch.randperm(300, generator=torch.Generator().manual_seed(3)))
    one, other = (LSGM.fit(each, components=12) for each in (rows, shuffled))
    for key, tensor in serial.state(one).items():
        assert torch.equal(tensor, serial.state(other)[key])


def test_scores_are_computed_where_the_detector_is():
    detector = LSGM.fit(block(), components=3, pca=3)
    there = torch.device("meta")
    assert detector.to(there)._score(block().to(there)).is_meta


def test_steps_are_counted_over_all_rows():
    """Two layers that repeat each other's groups, three rows of four in the first group."""
    group = torch.tensor([0, 0, 0, 1] * 10)
    first = (20.0 * group + random(40, seed=1))[:, None].float()
    second = (20.0 * (group * (torch.arange(40) % 8 == 3)) + random(40, seed=2))[:, None].float()
    rows = Features(count=40, layers={"a": Layer("stage", first), "b": Layer("stage", second)})
    detector = LSGM.fit(rows, components=2, mixture="em", rows=30)
    low_a, low_b = (int(detector.means[name][:, 0].argmin()) for name in "ab")
    assert detector.shares["a"][low_a].item() == 0.75
    # Of the ten rows of the second group, five go to the second group of the next layer.
    expected = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    found = detector.transitions["b"]
    found = found.flip(0) if low_a else found
    assert torch.equal(found.flip(1) if low_b else found, expected)
    assert detector.shares["b"][low_b].item() == 0.875


def test_a_dead_channel_that_wakes_up():
    dead = changed(block(), "stage1", lambda mean: mean * torch.tensor([1.0, 0.0, 1.0]))
    for mixture, covariance in itertools.product(("dp", "em"), ("full", "tied", "diag")):
        detector = LSGM.fit(dead, components=3, mixture=mixture, covariance=covariance)
        awake = changed(dead, "stage1", lambda mean: mean + torch.tensor([0.0, 0.5, 0.0]))
        assert detector.score(awake).min() > detector.score(dead).max() + 1000


def test_a_layer_without_any_variance(caplog):
    for value in (0.0, 0.1):
        rows = changed(block(), "stage1", lambda mean, value=value: torch.full_like(mean, value))
        for mixture in ("dp", "em"):
            with caplog.at_level(logging.INFO):
                detector = LSGM.fit(rows, components=3, mixture=mixture)
            assert torch.isfinite(detector.score(rows)).all()
            assert "stage1 1 of 3 after" in caplog.messages[-1]
            assert "Number of distinct clusters (1)" in caplog.messages[-1]
            awake = changed(rows, "stage1", lambda mean: mean + 1)
            assert detector.score(awake).min() > detector.score(rows).max() + 1000


def test_what_is_said(caplog):
    rows = block(count=150, widths=(3, 6))
    with caplog.at_level(logging.INFO):
        LSGM.fit(rows, pca=4, rows=40)
    drawn, capped, few, cost, reduced, used = caplog.messages
    assert drawn == "lsgm: mixtures are fitted on 40 of 150 rows (lsgm.rows=40)"
    assert capped == "lsgm: at most 40 components instead of 50, one a row"
    assert "1 rows a component are few for full covariances of 4 dimensions" in few
    assert (
        "at most 40 components with full covariances on 40 rows of stage1 (3 dimensions), " in cost
    )
    assert "stage2 (4 dimensions): about 1.6e+05 operations an iteration" in cost
    assert "and 1 MB of memory" in cost
    assert "stage2 from 6 to 4 dimensions" in reduced
    assert "stage1 " in used
    assert " of 40 after " in used
    caplog.clear()
    with caplog.at_level(logging.INFO):
        LSGM.fit(rows, components=2)
    assert len(caplog.messages) == 2


def test_the_share_of_the_variance_is_said(caplog):
    rows = block(widths=(3, 6))
    with caplog.at_level(logging.INFO):
        LSGM.fit(rows, components=2, pca=4)
    theirs = PCA(4).fit(rows.layers["stage2"].mean.double().numpy())
    share = 100 * theirs.explained_variance_ratio_.sum()
    assert f"have {share:.2f} % of the variance (lsgm.pca=4)" in caplog.text


def test_the_cost_is_said_before_it_is_paid(caplog, monkeypatch):
    def fit(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(lsgm, "_fit_mixture", fit)
    with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt):
        LSGM.fit(block())
    assert "120 rows of stage1 (3 dimensions), stage2 (4 dimensions)" in caplog.text


def test_a_fit_that_does_not_converge_says_so(caplog, monkeypatch):
    monkeypatch.setattr(lsgm, "MAX_ITERATIONS", 1)
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.simplefilter("error")
        LSGM.fit(block(), components=5)
    assert "(did not converge)" in caplog.messages[-1]


def test_the_sample_is_seeded_and_covers_all_blocks():
    rows = block(count=200)
    parts = [rows.select(slice(i, i + 30)) for i in range(0, 200, 30)]
    one, same, other = (
        LSGM.fit(each, rows=60, components=3, seed=seed)
        for each, seed in ((rows, 0), (parts, 0), (rows, 1))
    )
    assert torch.equal(one.means["stage1"], same.means["stage1"])
    assert not torch.equal(one.means["stage1"], other.means["stage1"])
    early = changed(rows, "stage1", lambda m: m + 1000 * (torch.arange(200) >= 100)[:, None])
    assert LSGM.fit(early, rows=60, components=2).means["stage1"][:, 0].max() > 900


@pytest.mark.parametrize("mixture", ["dp", "em"])
def test_the_scale_of_a_layer_adds_a_constant(mixture):
    """… the logarithm of the volume, the same for all rows."""
    rows, test = block(), block(count=20, seed=7)
    one = LSGM.fit(rows, components=4, mixture=mixture).score(test)
    scaled = [changed(each, "stage1", lambda mean: mean / 1024) for each in (rows, test)]
    other = LSGM.fit(scaled[0], components=4, mixture=mixture).score(scaled[1])
    torch.testing.assert_close(other, one - 3 * math.log(1024), rtol=1e-9, atol=1e-9)


def test_layers_are_chosen():
    rows = block(widths=(3, 4, 5))
    assert LSGM.fit(rows, components=2).layer_names == ("stage1", "stage2", "stage3")
    assert LSGM.fit(rows, components=2, layers="stage[13]").layer_names == ("stage1", "stage3")
    alone = LSGM.fit(rows, components=2, layers="stage2")
    assert not alone.transitions
    again = serial.restore(LSGM, serial.state(alone), serial.settings(alone))
    assert torch.equal(again.score(rows), alone.score(rows))


def test_no_dimension_is_dropped_unasked(caplog):
    rows = block(widths=(3, 6))
    with caplog.at_level(logging.INFO):
        for pca in (0, 6):
            assert LSGM.fit(rows, components=2, pca=pca).means["stage2"].shape == (2, 6)
    assert "PCA" not in caplog.text


def test_the_trace_in_words():
    rows = block()
    detector = LSGM.fit(rows, components=3, mixture="em", explain=True)
    assert detector.always_explains
    assert not replace(detector, traced=False).always_explains
    spoilt = changed(rows.select(slice(0, 3)), "stage2", lambda mean: mean.clone())
    spoilt.layers["stage2"].mean[1, 0] = math.nan
    words = detector.explain(spoilt)
    assert words[1] == "not finite"
    first, second = (
        int(detector.mixtures[n].assigned(rows.layers[n].mean.double()[:1]))
        for n in ("stage1", "stage2")
    )
    assert words[0] == (
        f"stage1: component {first} (33 % of the rows fitted on) > stage2: component {second} "
        f"(33 %, reached from {first} with probability 1), -log p = {detector.score(rows)[0]:.1f}"
    )
    assert detector.explain(rows.select(slice(0, 0))) == []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"components": 0}, r"lsgm\.components=0 must be positive"),
        ({"rows": -1}, r"lsgm\.rows=-1 must be positive"),
        ({"pca": -1}, r"lsgm\.pca=-1 must not be negative"),
        ({"seed": -1}, r"lsgm\.seed=-1 must not be negative"),
        ({"rows": 1}, "at least two rows"),
        ({"mixture": "em", "components": 121}, "must not exceed the 120 rows to fit on"),
        ({"layers": "fc"}, "no layer for 'fc'"),
    ],
)
def test_hyperparameters_that_make_no_sense(given, sentence):
    with pytest.raises(DetectorError, match=sentence):
        LSGM.fit(block(), **given)


def test_another_network_is_refused():
    detector = LSGM.fit(block(), components=2)
    with pytest.raises(DetectorError, match="fitted on layer 'stage2', which was not recorded"):
        detector.score(block(widths=(3,)))
    with pytest.raises(DetectorError, match="5 channels, but lsgm was fitted on 4"):
        detector.score(block(widths=(3, 5)))
