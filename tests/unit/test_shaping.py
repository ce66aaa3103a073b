"""Detectors that read the energy of the head on a changed embedding: by hand, and at the edges."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import networks
import numpy as np
import pytest
import torch

from oodcli import detectors, notes
from oodcli.detectors import percentiles, shaping
from oodcli.detectors.energy import energy, head_energy
from oodcli.detectors.percentiles import percentiles_by_column
from oodcli.detectors.ras import with_usual_values
from oodcli.detectors.temp_scaling import TemperatureScaling
from oodcli.detectors.vra import rectified
from oodcli.errors import DetectorError
from oodcli.features import Features, LinearHead

OF_THE_SUM = ("scale", "lts", "ash-p", "ash-b", "ash-s")
FITTED = ("dice", "vra", "ras")
HEAD = LinearHead(torch.eye(2, 4), torch.tensor([0.5, -0.25]))


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def block(embedding, head=HEAD, **more):
    u = torch.as_tensor(embedding, dtype=torch.float32)
    return Features(len(u), embedding=u, head=head, logits=u @ head.weight.T + head.bias, **more)


def some(count=60, width=40, classes=5, seed=0):
    """Rows after a ReLU, about half of whose entries are 0."""
    generator = torch.Generator().manual_seed(seed)
    head = LinearHead(
        torch.randn(classes, width, generator=torch.Generator().manual_seed(9)),
        torch.randn(classes, generator=torch.Generator().manual_seed(8)),
    )
    return block(torch.randn(count, width, generator=generator).clamp_min(0), head)


def made(name, train=None, **settings):
    kind = detectors.get(name)
    return kind.fit(train, **settings) if kind.fitted else kind(**settings)


# ---------------------------------------------------------------------------- by hand


def test_ratio_by_hand():
    rows = block([[4.0, 3, 2, 1], [1.0, 1, 1, 1], [5.0, 0, 0, 0], [0.0, 0, 0, 0], [-1.0, 4, 0, 0]])
    assert shaping.largest_count(4, 50) == 2
    assert shaping.ratio(rows, 50).tolist() == [10 / 7, 2, 1, 1, 1]
    # D/q for a flat u, 1 if all of it is among the largest.
    assert shaping.ratio(block([[1.0] * 4]), 75).tolist() == [4]


@pytest.mark.parametrize(("width", "p", "count"), [(64, 90, 6), (2048, 85, 307), (6, 99, 1)])
def test_how_many_entries_are_largest(width, p, count):
    assert shaping.largest_count(width, p) == count


def test_of_equal_entries_the_first_are_largest():
    u = double([[0, 2, 2, 2], [0, 0, 0, 0], [1, 0, 3, 0]])
    expected = [[False, True, True, False], [True, True, False, False], [True, False, True, False]]
    assert shaping.largest(u, shaping.ascending(u), 2).tolist() == expected


def test_scores_by_hand():
    rows = block([[4.0, 3, 2, 1]])
    r = 10 / 7

    def expected(first, second):
        return [-math.log(math.exp(first + 0.5) + math.exp(second - 0.25))]

    for name, values in {
        "ash-p": (4, 3),
        "ash-b": (5, 5),
        "ash-s": (4 * math.exp(r), 3 * math.exp(r)),
        "scale": (4 * math.exp(r), 3 * math.exp(r)),
    }.items():
        assert made(name, p=50).score(rows).tolist() == pytest.approx(expected(*values)), name
    lts = -math.log(math.exp(4.5 * r**2) + math.exp(2.75 * r**2))
    assert made("lts", p=50).score(rows).item() == pytest.approx(lts)


def test_scale_is_the_energy_of_the_scaled_embedding():
    """The closed form needs no product."""
    rows = some()
    scaled = rows.embedding.double() * shaping.ratio(rows, 85).exp()[:, None]
    torch.testing.assert_close(
        made("scale").score(rows), head_energy(scaled, rows.head), rtol=1e-5, atol=0
    )


def test_dice_by_hand():
    head = LinearHead(torch.tensor([[1.0, 2, 3, 4], [-1.0, 0, 1, 2]]), torch.tensor([0.0, 1]))
    train = block([[2.0, 0, 0, 1], [0.0, 0, 2, 1]], head)  # W ∘ μ: 1 0 3 4, −1 0 1 2
    dice = made("dice", train, p=60)
    assert dice.weight.tolist() == [[0, 0, 3, 4], [0, 0, 0, 2]]
    score = dice.score(block([[9.0, 9, 1, 1]], head))
    assert score.item() == pytest.approx(-math.log(math.exp(7) + math.exp(3)))
    clipped = made("dice", block([[8.0, 0, 0, 4]], head), p=60, c=1.0)
    torch.testing.assert_close(
        clipped.score(block([[9.0, 9, 9, 9]], head)),
        head_energy(torch.ones(1, 4), LinearHead(clipped.weight, head.bias)),
    )


def test_vra_by_hand():
    u = double([[0.0, 1, 2, 3]])
    low, high = double([1.0] * 4), double([2.5] * 4)
    assert rectified(u, low, high).tolist() == [[0, 1, 2, 2.5]]
    assert rectified(u, low, high, 0.75).tolist() == [[0, 1.75, 2.5, 2.5]]
    given = made("vra", some(), alpha=0.5, beta=1.0)
    assert set(given.low.tolist()) == {0.5}
    assert set(given.high.tolist()) == {1.0}
    one = made("vra", some(), beta=1.0)
    torch.testing.assert_close(one.low, made("vra", some()).low)


@pytest.mark.parametrize("strip", [1, 3, 64])
def test_percentiles_of_columns(strip, monkeypatch):
    monkeypatch.setattr(percentiles, "STRIP", strip)
    rows = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)).clamp_min(-0.5)
    rows[:, 3], rows[:, 4] = 0, rows[:, 4] * 1e-38
    found = percentiles_by_column(lambda: rows.split(130), [1, 60, 95])
    expected = np.percentile(rows.double(), [1, 60, 95], axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)
    one = rows[:1]
    assert torch.equal(percentiles_by_column(lambda: [one], [50])[0], one[0].double())


def test_ras_by_hand():
    usual = double([0, 1, 5, 9])
    u = torch.tensor([[3.0, 4, 2, 1], [0.0, 7, 0, 0], [-1.0, -2, -3, -4]])
    assert with_usual_values(u, usual).tolist() == [[5, 9, 1, 0], [2, 9, 2, 2], [9, 5, 1, 0]]
    train = block([[3.0, 1, 0, 2], [5.0, 4, 1, 2]])
    assert made("ras", train).usual.tolist() == [0.5, 1.5, 3, 4]


def test_temperature_by_hand():
    # Two of three rows are right, all with the same margin m: p = 2/3 at T = m/log 2.
    rows = Features(3, logits=torch.tensor([[3.0, 0]] * 3), label=torch.tensor([0, 0, 1]))
    assert pytest.approx(3 / math.log(2), rel=1e-9) == TemperatureScaling.fit(rows).T
    more = replace(rows, label=torch.tensor([0, 1, -1]))
    assert pytest.approx(50) == TemperatureScaling.fit(more).T  # undecided: p = 1/2


def test_a_temperature_that_the_labels_do_not_limit(caplog):
    rows = Features(2, logits=torch.tensor([[3.0, 0], [0, 1.0]]), label=torch.tensor([0, 1]))
    assert pytest.approx(1 / 50) == TemperatureScaling.fit(rows).T
    assert "the end of its range" in caplog.text
    with pytest.raises(DetectorError, match="no row to fit on has a label"):
        TemperatureScaling.fit(replace(rows, label=torch.tensor([-1, -1])))


def test_gen_of_rows_whose_probabilities_saturate():
    """1 − p of the first is 0 in float32, and about 1e-17 in float64."""
    z = torch.tensor([[40.0, 0, 0]])
    rest = 2 * math.exp(-40)
    expected = rest**0.1 + 2 * math.exp(-40) ** 0.1
    assert made("gen").score(Features(1, logits=z)).item() == pytest.approx(expected, rel=1e-9)
    assert made("gen", M=1).score(Features(1, logits=z)).item() == pytest.approx(rest**0.1)
    assert made("doctor").score(Features(1, logits=z)).item() == pytest.approx(2 * rest, rel=1e-9)
    assert made("doctor").score(Features(1, logits=torch.zeros(1, 4))).item() == pytest.approx(3)


# ---------------------------------------------------------------------------- the last map


def test_davis_is_the_energy_of_another_pooling():
    rows = networks.recorded(5)
    layer = next(layer for layer in rows.layers.values() if layer.peak is not None)
    torch.testing.assert_close(
        made("davis", pool="max").score(rows), head_energy(layer.peak, rows.head)
    )
    spread = layer.std.double() @ rows.head.weight.double().T
    closed = energy(rows.logits.double() + 2 * spread)
    torch.testing.assert_close(made("davis", gamma=2.0).score(rows), closed, rtol=1e-5, atol=0)
    with pytest.raises(DetectorError, match="the embedding is not the mean of the last map"):
        made("davis").score(replace(rows, pooled=False))


def test_catalyst_with_the_mean_is_rg():
    rows = networks.recorded(5)
    found = made("catalyst", rows, stat="mean", c=1.0)
    torch.testing.assert_close(found.score(rows), made("rg").score(rows))
    assert found.score_needs == {"logits", "logits.level", "layers.mean", "layers.peak"}
    high = made("catalyst", rows, stat="max")
    assert high.c > made("catalyst", rows).c


@pytest.mark.parametrize(
    ("network", "pooled"),
    [(networks.Residual(), True), (networks.Shared(), False), (networks.Plain(), False)],
)
def test_whether_the_embedding_is_the_mean_of_the_last_map(network, pooled):
    assert networks.classifier(network).pooled == pooled


# ---------------------------------------------------------------------------- at the edges

EDGES = {
    "zeros": torch.zeros(4),
    "one entry": torch.tensor([0.0, 3, 0, 0]),
    "equal entries": torch.full((4,), 2.0),
    "negative": torch.tensor([-1.0, -2, -3, -4]),
    "large": torch.tensor([1e4, 0, 1e4, 0]),
}


@pytest.mark.parametrize("name", [*OF_THE_SUM, *FITTED])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("weight", [torch.eye(2, 4), torch.ones(2, 4), torch.ones(6, 4)])
def test_edges_have_a_finite_score(name, edge, weight):
    """Also with equal rows of the head, and with more classes than entries."""
    head = LinearHead(weight, torch.linspace(-1, 1, len(weight)))
    detector = made(name, block(torch.rand(20, 4), head))
    assert torch.isfinite(detector.score(block(EDGES[edge][None], head))).all()


@pytest.mark.parametrize("name", [*OF_THE_SUM, *FITTED])
def test_neither_the_order_of_channels_nor_of_classes_matters(name):
    train, test = some(), some(9, seed=1)
    channels = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    classes = torch.tensor([3, 1, 0, 4, 2])

    def turned(rows):
        head = LinearHead(rows.head.weight[classes][:, channels], rows.head.bias[classes])
        return block(rows.embedding[:, channels], head)

    before = made(name, train).score(test)
    torch.testing.assert_close(
        made(name, turned(train)).score(turned(test)), before, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", [*OF_THE_SUM, *FITTED])
def test_a_shorter_embedding_scores_higher(name):
    """Along the weights of a class; of ras, which sees no length, with less order in it."""
    train = some()
    if name == "ras":
        mixed = [torch.linspace(1, 0, 5)[:, None], torch.rand(1, 40)]
        u = train.head.weight[:1] * mixed[0] + mixed[1] * (1 - mixed[0])
    else:
        u = train.head.weight[:1].clamp_min(0) * torch.linspace(6, 0, 5)[:, None]
    assert (made(name, train).score(block(u, train.head)).diff() > 0).all()


@pytest.mark.parametrize("name", ["scale", "lts"])
def test_rows_of_equal_ratio_keep_their_order(name):
    u = torch.tensor([[4.0, 3, 2, 1], [2.0, 4, 3, 1], [3.0, 1, 2, 4]])
    rows = block(u)
    assert len(set(shaping.ratio(rows, 50).tolist())) == 1
    assert made(name, p=50).score(rows).argsort().tolist() == energy(rows.logits).argsort().tolist()


@pytest.mark.parametrize("name", OF_THE_SUM)
def test_a_fraction_is_no_percentile(name):
    with pytest.raises(DetectorError, match=f"{name}.p=0.85 must be in 1 … 99: a percentage"):
        made(name, p=0.85)


def test_settings_out_of_range():
    with pytest.raises(DetectorError, match=r"dice\.p=0\.9 must be in 1 … 100"):
        made("dice", some(), p=0.9)
    with pytest.raises(DetectorError, match=r"vra\.low=95 must be below high=60"):
        made("vra", some(), low=95.0, high=60.0)
    with pytest.raises(DetectorError, match=r"vra\.alpha=2 must be below beta=1"):
        made("vra", some(), alpha=2.0, beta=1.0)
    with pytest.raises(DetectorError, match=r"vra\.shift=-1 must not be negative"):
        made("vra", some(), shift=-1.0)
    with pytest.raises(DetectorError, match=r"gen\.M=0 must be positive"):
        made("gen", M=0)


def test_many_negative_entries_are_said_once(caplog, monkeypatch):
    monkeypatch.setattr(notes, "_SAID", set())
    caplog.set_level(logging.INFO)
    made("scale").score(some())
    assert not caplog.text
    for name in OF_THE_SUM:
        made(name).score(block(torch.randn(5, 4)))
    assert caplog.text.count("more than 1 % of the embedding's entries are negative") == 1
