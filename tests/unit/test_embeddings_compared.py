"""optfs, openmax, pnml, actsub and weiper: by hand, and at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from naive import NAIVE, Fit
from scipy import stats

from oodcli import detectors
from oodcli.detectors import weiper
from oodcli.detectors.actsub import balanced, closeness, directions
from oodcli.detectors.blocks import drawn_rows
from oodcli.detectors.openmax import distribution, unknown_log_odds, weibull
from oodcli.detectors.optfs import bin_of
from oodcli.detectors.pnml import normalised_logits, regret
from oodcli.detectors.weiper import counts, divergence, perturbed_logits, smoothed
from oodcli.errors import DetectorError
from oodcli.features import Features, LinearHead

NAMES = ("optfs", "openmax", "pnml", "actsub", "weiper")
FEW = {"weiper": {"copies": 5}, "openmax": {"tail": 4}}
"""Settings for few rows, and for a fast test."""


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def block(embedding, head, **more):
    u = torch.as_tensor(embedding, dtype=torch.float32)
    return Features(len(u), embedding=u, head=head, logits=u @ head.weight.T + head.bias, **more)


def some(count=80, width=12, classes=4, seed=0):
    """Rows around the weights of their classes, after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    head = LinearHead(
        torch.randn(classes, width, generator=torch.Generator().manual_seed(9)),
        torch.randn(classes, generator=torch.Generator().manual_seed(8)),
    )
    label = torch.arange(count) % classes
    noise = torch.randn(count, width, generator=generator) / 2
    return block((head.weight[label] + noise).clamp_min(0), head, label=label)


def made(name, train, **settings):
    return detectors.get(name).fit(train, **FEW.get(name, {}) | settings)


# ---------------------------------------------------------------------------- by hand


def test_bins_of_optfs():
    u = double([-0.1, 0.0, 0.24, 0.25, 0.99, 1.0, 7.0])
    assert bin_of(u, 0.0, 1.0, 4).tolist() == [4, 0, 0, 1, 3, 4, 4]


def test_optfs_by_hand():
    head = LinearHead(torch.tensor([[1.0, 2, 0], [0.0, 0, 0]]), torch.tensor([0.0, 0]))
    train = block([[0.0, 1, 4], [1.0, 3, 4]], head)  # both of the first class
    found = made("optfs", train, bins=2, low=0.0, high=100.0)
    # [0, 2): 0·1 + 1·2 and 1·1; [2, 4): 3·2; 4 is outside.
    expected = double([3, 6]) * 1000 / math.sqrt(45)
    torch.testing.assert_close(found.theta, expected)
    score = found.score(block([[1.0, 2, 9]], head)).item()
    z = float(expected[0] * 1 + expected[1] * 2 * 2)
    assert score == pytest.approx(-z)


def test_weibull_is_scipys():
    law = stats.weibull_min(1.7, scale=2.5)
    tails = 3 + law.rvs(400, random_state=0)
    (shift, scale, shape), *_ = weibull(torch.from_numpy(tails)[None]).tolist()
    assert shift == tails.min()
    over = tails[tails > shift] - shift
    expected_shape, _, expected_scale = stats.weibull_min.fit(over, floc=0)
    assert (shape, scale) == pytest.approx((expected_shape, expected_scale), rel=1e-4)
    distance = double([1.0, 3.5, 7.0, 1e9])
    found = distribution(distance, double([[shift, scale, shape]] * 4))
    cdf = stats.weibull_min.cdf(distance.numpy() - shift, shape, scale=scale)
    np.testing.assert_allclose(found, cdf, atol=1e-12)


def test_weibull_of_too_few_distances():
    none = math.nan
    few = [1, none, none, none], [1, 2, none, none], [1, 1, 1, 1], [1, 3, 3, 1]
    assert weibull(double([[none] * 4, *few]))[:, 2].tolist() == [0] * 5
    assert (distribution(double([9.0]), double([[0.0, 0, 0]])) == 0).all()
    assert weibull(double([[1, 2, 3, none]]))[0, 2] > 0


def test_openmax_by_hand():
    logits = double([[2.0, 1, -1]])
    centre = torch.zeros(3, 3, dtype=torch.float64)
    law = double([[0, 1, 1], [0, 0, 0], [0, 1, 1]])  # the second class is not revised
    share = 1 - math.exp(-math.sqrt(6))  # F at ‖z‖, for the first rank
    unknown = 2 * share - 1 * share / 3  # the third rank counts a third
    others = [2 * (1 - share), 1, -1 * (1 - share / 3)]
    expected = unknown - math.log(sum(math.exp(v) for v in others))
    assert unknown_log_odds(logits, centre, law, 3).item() == pytest.approx(expected)
    assert unknown_log_odds(logits, centre, law, 9).item() == pytest.approx(expected)


def test_openmax_keeps_the_largest_distances_of_each_class():
    train, test = some(), some(9, seed=1)
    whole = made("openmax", train, tail=6)
    for size in (1, 7):
        parts = [train.select(slice(start, start + size)) for start in range(0, 80, size)]
        torch.testing.assert_close(made("openmax", parts, tail=6).law, whole.law)
    expected = NAIVE["openmax"](test, Fit(train), tail=6)
    np.testing.assert_allclose(whole.score(test), expected, rtol=1e-7)


def test_openmax_without_rows_that_are_classified_rightly():
    train = some()
    wrong = train.map_rows(lambda name, rows: (rows + 1) % 4 if name == "label" else rows, 80)
    right = train.logits.argmax(1) == wrong.label
    with pytest.raises(DetectorError, match="no row to fit on is classified as its label"):
        made("openmax", wrong.select(~right))
    with pytest.raises(DetectorError, match=r"openmax\.tail=1 must be at least 2"):
        made("openmax", train, tail=1)


def test_regret_by_hand():
    p = double([[0.5, 0.5], [1, 0], [0.5, 0.5]])
    found = regret(p, double([0, 0, 1e30]))
    # κ = 0: p/(p + 1 − p) sums to 1. κ = 1: p/(p + p(1 − p)) = 2/3 each.
    torch.testing.assert_close(found, double([0, 0, math.log(4 / 3) / math.log(2)]))


def test_logits_of_the_normalised_embedding():
    rows = some(5)
    u = rows.embedding.double()
    naive = (u / u.norm(dim=1, keepdim=True)) @ rows.head.weight.double().T + rows.head.bias
    torch.testing.assert_close(
        normalised_logits(rows.logits, rows.embedding, rows.head), naive, rtol=1e-5, atol=1e-6
    )


def test_actsub_by_hand():
    head = LinearHead(torch.tensor([[0.0, 3, 0], [2.0, 0, 0]]), torch.zeros(2))
    basis = directions(head)
    torch.testing.assert_close(basis.abs(), double([[0, 1], [1, 0], [0, 0]]))
    # The second entry first: 3 beside 4 and 5, 3 beside 5.
    assert balanced([torch.tensor([[3.0, 4, 0]])], basis) == 1
    assert balanced([torch.tensor([[3.0, 1, 3]])], basis) == 2
    bank = double([[1, 0], [0, 1], [0.6, 0.8]])
    found = closeness(double([[2, 0], [0, 3], [-1, 0], [0, 0]]), bank, 2)
    expected = [-math.log(1 - 0.8), -math.log(1 - 0.9), 0, 0]
    torch.testing.assert_close(found, double(expected))


def test_rows_are_drawn_at_random():
    rows = torch.arange(100.0)[:, None]
    assert torch.equal(drawn_rows(lambda: rows.split(7), 100, 0), rows)
    found = drawn_rows(lambda: rows.split(7), 10, 0)
    assert len(found) == 10
    assert (found.diff(dim=0) > 0).all()
    assert found.max() > 50
    assert torch.equal(found, drawn_rows(lambda: rows.split(100), 10, 0))
    assert not torch.equal(found, drawn_rows(lambda: rows.split(100), 10, 1))


def test_histograms_of_weiper():
    values = double([[0.0, 0.5, 1.0, 2.0, -1.0]])
    assert counts(values, double([0, 1]), 4).tolist() == [[1, 0, 1, 1]]
    assert counts(double([[3.0, 3]]), double([3, 3]), 2).tolist() == [[2, 0]]
    assert smoothed(double([[0, 0, 4, 0]]), 2).tolist() == [[0, 2, 2, 0]]
    assert smoothed(double([[3, 0, 0, 6]]), 3).tolist() == [[2, 1, 2, 4]]
    same = double([[0.25, 0.75]])
    assert divergence(same, same[0], 1, 0.0).item() == 0
    other = divergence(same, double([0.75, 0.25]), 1, 0.0).item()
    assert other == pytest.approx(2 * 0.5 * math.log(3))


@pytest.mark.parametrize("classes", [4, 600])
def test_perturbed_heads_are_the_same_however_many_at_a_time(classes, monkeypatch):
    """The logits of unit vectors are the weights."""
    head = some(classes=classes).head
    unit = torch.eye(head.weight.shape[1])

    def weights():
        found = [z.clone() for z in perturbed_logits(unit, head, 1.8, 3, 0)]
        return torch.cat(found, 1).permute(1, 2, 0) - head.bias.double()[:, None]

    noise = weights() - head.weight.double()  # (3, K, D)
    length = 1.8 * head.weight.double().norm(dim=1)
    torch.testing.assert_close(noise.norm(dim=2), length.expand(3, -1))
    generator = torch.Generator().manual_seed(0)
    for each in noise:
        drawn = torch.randn(head.weight.shape, generator=generator).double()
        torch.testing.assert_close(each, drawn * (length / drawn.norm(dim=1))[:, None])
    before = weights()
    for rows in (1, 2 * classes):
        monkeypatch.setattr(weiper, "ROWS_OF_WEIGHTS", rows)
        torch.testing.assert_close(weights(), before, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------- at the edges

EDGES = {
    "zeros": torch.zeros(4),
    "one entry": torch.tensor([0.0, 3, 0, 0]),
    "equal entries": torch.full((4,), 2.0),
    "negative": torch.tensor([-1.0, -2, -3, -4]),
    "large": torch.tensor([1e4, 0, 1e4, 0]),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weight", [torch.eye(2, 4), torch.ones(2, 4), torch.ones(6, 4)])
def test_edges_have_a_finite_score(name, weight):
    """Also with equal rows of the head, and with more classes than entries."""
    head = LinearHead(weight, torch.linspace(-1, 1, len(weight)))
    rows = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    detector = made(name, block(rows, head))
    edges = torch.stack([*EDGES.values(), rows.mean(0)])
    assert torch.isfinite(detector.score(block(edges, head))).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "weiper"])  # it has a seed
def test_neither_the_order_of_channels_nor_of_classes_matters(name):
    channels = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    classes = torch.tensor([3, 1, 0, 2])

    def turned(rows):
        head = LinearHead(rows.head.weight[classes][:, channels], rows.head.bias[classes])
        return block(rows.embedding[:, channels], head, label=classes.argsort()[rows.label])

    before = made(name, some()).score(some(9, seed=1))
    after = made(name, turned(some())).score(turned(some(9, seed=1)))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_no_class_score_higher(name):
    train = some()
    generator = torch.Generator().manual_seed(5)
    away = block(torch.rand(40, 12, generator=generator) * 0.3, train.head)
    detector = made(name, train)
    assert detector.score(away).median() > detector.score(some(40, seed=1)).median()


def test_settings_out_of_range():
    train = some()
    for name, settings, words in (
        ("optfs", {"low": -1.0}, r"optfs\.low=-1 must be in 0 … 100: a percentage"),
        ("optfs", {"low": 60.0, "high": 40.0}, "no entries between their percentiles 60 and 40"),
        ("actsub", {"dim": 5}, r"actsub\.dim=5 must be in 1 … 4, the rank"),
        ("actsub", {"p": 0.95}, r"actsub\.p=0\.95 must be in 1 … 99"),
        ("actsub", {"power": -1.0}, r"actsub\.power=-1 must not be negative"),
        ("weiper", {"delta": 0.0}, r"weiper\.delta=0 must be positive"),
        ("openmax", {"alpha": 0}, r"openmax\.alpha=0 must be positive"),
    ):
        with pytest.raises(DetectorError, match=words):
            made(name, train, **settings)
