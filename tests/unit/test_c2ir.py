"""c2ir and c2ir-z: by hand, their settings, and rows that they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import networks
import pytest
import torch

from oodcli import detectors
from oodcli.detectors.c2ir import channel_importance, deviation, layer_importance
from oodcli.detectors.c2ir_z import RIDGE, standardised_deviation
from oodcli.detectors.class_statistics import class_moments
from oodcli.errors import DetectorError
from oodcli.features import Features, Layer


@pytest.fixture(scope="module")
def train():
    return networks.recorded(24)


@pytest.fixture(scope="module")
def test():
    return networks.recorded(9, seed=2, labelled=False)


def fitted(name, train, **hyperparameters):
    return detectors.get(name).fit(train, **hyperparameters)


def test_c2ir_pieces_by_hand():
    beta = channel_importance(torch.tensor([[0.0, math.log(3.0)]]))
    torch.testing.assert_close(beta, torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(
        layer_importance(torch.tensor([[1.0, 1.0]])), torch.tensor([[0.5, 0.5]])
    )
    mean = torch.tensor([[1.0, 5.0]])
    torch.testing.assert_close(deviation(mean, beta, torch.tensor([5.0])), torch.tensor([1.0]))
    # The same channels, as c2ir-z sees them: ((1 − 0)²/1 + (5 − 3)²/4)/2.
    torch.testing.assert_close(
        standardised_deviation(mean, torch.tensor([[0.0, 3.0]]), torch.tensor([1.0, 4.0])),
        torch.tensor([1.0]),
    )


def test_c2ir_settings(train, test):
    uniform = fitted("c2ir", train, weights="uniform")
    width = train.layers["bn1"].mean.shape[1]
    assert torch.allclose(uniform.beta["bn1"], torch.tensor(1 / width, dtype=torch.float64))
    assert torch.allclose(uniform.alpha, torch.tensor(1 / len(uniform.layers), dtype=torch.float64))
    last = fitted("c2ir", train, weights="penultimate")
    assert torch.equal(last.alpha[:, -1], torch.ones(len(last.alpha), dtype=torch.float64))
    assert last.layers[-1] == "layer2.1.bn2"
    one, two, same = (fitted("c2ir", train, weights="random", seed=s) for s in (1, 2, 1))
    assert torch.equal(one.alpha, same.alpha)
    assert not torch.equal(one.alpha, two.alpha)
    memory = fitted("c2ir", train, weights="uniform", statistics="batchnorm")
    bias = train.batchnorm["bn1"].bias.double().mean()
    torch.testing.assert_close(memory.centre["bn1"], bias.expand(len(memory.alpha)))


def test_c2ir_does_without_gradients_where_it_can(train, test):
    layers = {
        name: Layer(layer.kind, layer.mean, layer.std) for name, layer in train.layers.items()
    }
    plain = replace(train, layers=layers)
    fitted("c2ir", plain, weights="uniform").score(test)
    fitted("c2ir-z", plain).score(test)
    with pytest.raises(DetectorError, match=r"c2ir needs layers\.gradient, layers\.sensitivity"):
        fitted("c2ir", plain)
    with pytest.raises(DetectorError, match=r"c2ir-z needs layers\.gradient"):
        fitted("c2ir-z", plain, weights="mgi")


def test_a_dead_channel_that_wakes_up_is_seen(train, test):
    def kill(name, rows):
        if name == "layers/bn1/mean":
            rows = rows.clone()
            rows[:, 2] = 0.1
        return rows

    dead = fitted("c2ir-z", train.map_rows(kill, len(train)))
    asleep = test.map_rows(kill, len(test))
    awake = test.map_rows(lambda n, r: kill(n, r) + (n == "layers/bn1/mean") * 1.0, len(test))
    assert torch.isfinite(dead.score(awake)).all()
    assert (dead.score(awake) > dead.score(asleep)).all()


def test_one_row_a_class_has_no_spread(train):
    with pytest.raises(DetectorError, match="no class has two rows"):
        fitted("c2ir-z", train.select(slice(0, 3)))
    with pytest.raises(DetectorError, match="no rows to fit on"):
        fitted("c2ir-z", [])


def test_many_classes_share_their_statistics():
    """With fewer than ten rows a class, by hand: every row counts for every class."""
    few = networks.recorded(30, classes=101)
    test = networks.recorded(7, seed=2, classes=101, labelled=False)
    found = fitted("c2ir-z", few)
    assert found.every_class
    predicted = test.logits.argmax(1)
    weight = few.head.weight.double()
    evidence = -(few.embedding.double() * weight[few.label]).sum(1)
    spread = (evidence.var() * (1 + RIDGE)).sqrt()
    own = -(test.embedding.double() * weight[predicted]).sum(1)
    expected = (own - evidence.mean()) / spread
    for name in found.layers:
        rows, mean = few.layers[name].mean.double(), test.layers[name].mean.double()
        variance = rows.var(0) + RIDGE * rows.var(0).mean()
        deviation = ((mean - rows.mean(0)).square() / variance).mean(1)
        expected = expected + deviation / len(found.layers)
    torch.testing.assert_close(found.score(test), expected)
    assert len(fitted("c2ir-z", few, weights="mgi").layer_weights) == 1


@pytest.mark.parametrize(("rows", "classes"), [(1010, 101), (30, 3), (27, 3)])
def test_enough_rows_or_few_classes_share_nothing(rows, classes):
    found = fitted("c2ir-z", networks.recorded(rows, classes=classes))
    assert not found.every_class
    assert found.evidence.shape == (classes,)


def test_another_network_is_refused(train, test):
    detector = fitted("c2ir-z", train)
    renamed = replace(test, layers={f"x{name}": layer for name, layer in test.layers.items()})
    with pytest.raises(DetectorError, match="fitted on layer 'bn1', which was not recorded"):
        detector.score(renamed)
    narrow = {name: replace(layer, mean=layer.mean[:, :4]) for name, layer in test.layers.items()}
    with pytest.raises(DetectorError, match="4 channels, but c2ir-z was fitted on 6"):
        detector.score(replace(test, layers=narrow))


def test_class_moments_by_hand():
    block = Features(
        count=4,
        label=torch.tensor([0, 0, 1, -1]),
        logits=torch.tensor([[0.0, 1.0]] * 4),
        embedding=torch.tensor([[1.0], [3.0], [10.0], [12.0]]),
    )
    moments = class_moments([block], lambda b: {"u": b.embedding})
    assert moments.mean("u")[:, 0].tolist() == [2.0, 11.0]
    # Scatter 2 + 2 over 4 − 2 degrees of freedom; the unknown label went to the predicted class 1.
    assert moments.within_variance("u").tolist() == [2.0]
