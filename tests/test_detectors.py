"""What every detector must survive, and each formula against a naive one."""

from __future__ import annotations

import math
import re
from dataclasses import FrozenInstanceError, replace

import networks
import pytest
import torch

from oodcli import detectors
from oodcli.detectors import serial
from oodcli.detectors.bank import Bank
from oodcli.detectors.c2ir import channel_importance, deviation, layer_importance
from oodcli.detectors.c2ir_z import RIDGE, standardised_deviation
from oodcli.detectors.class_statistics import class_moments
from oodcli.detectors.energy import energy
from oodcli.detectors.hyperparameters import parse
from oodcli.detectors.msp import max_softmax
from oodcli.errors import DetectorError
from oodcli.features import KNOWN_RECORDS, Features, Layer, OdinStep, concatenate
from oodcli.recording import Recorder, recordable


@pytest.fixture(scope="module", params=[2, 3], ids=["K=2", "K=3"])
def network(request):
    return networks.classifier(networks.Residual(classes=request.param))


def record(network, count, seed=1, labelled=True):
    recorder = Recorder(network, recordable(network))
    labels = torch.arange(count) % network.num_classes if labelled else None
    seen = recorder(networks.images(count, seed), labels)
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: replace(layer, sensitivity=torch.randn(layer.mean.shape, generator=generator))
        for name, layer in seen.layers.items()
    }
    others = torch.randn(count, 2, generator=generator).sigmoid().log()
    return replace(seen, layers=layers, deconf_h=seen.logits / 2, mos_others=others)


@pytest.fixture(scope="module")
def train(network):
    return record(network, 24)


@pytest.fixture(scope="module")
def test(network):
    return record(network, 9, seed=2, labelled=False)


def fitted(name, train, **hyperparameters):
    kind = detectors.get(name)
    if kind.uses_ood:  # the same rows, some way off
        blocks = [train] if isinstance(train, Features) else train
        hyperparameters["ood"] = [block.map_rows(far_off, len(block)) for block in blocks]
    if kind.noise_images is not None:
        hyperparameters["noise"] = train
    if kind.needs_pool:
        hyperparameters["pool"] = train
    return kind.fit(train, **hyperparameters)


def far_off(name, rows):
    return rows if name == "label" else rows * 1.5


every = pytest.mark.parametrize("name", detectors.names())


@every
def test_listing(name):
    kind = detectors.get(name)
    assert kind.name == name
    assert kind.source
    assert kind.about
    assert kind.needs | kind.fit_needs() <= KNOWN_RECORDS
    assert kind.__doc__


@every
def test_one_score_a_row(name, train, test):
    scores = fitted(name, train).score(test)
    assert scores.shape == (9,)
    assert scores.dtype == torch.float64
    assert torch.isfinite(scores).all()
    assert len(set(scores.tolist())) > 1


@every
def test_neither_batches_nor_order_matter(name, train, test):
    detector = fitted(name, train)
    whole = detector.score(test)
    parts = [detector.score(test.select(slice(start, start + 2))) for start in range(0, 9, 2)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=0)
    order = torch.tensor([3, 1, 8, 0, 2, 7, 5, 6, 4])
    torch.testing.assert_close(detector.score(test.select(order)), whole[order], rtol=1e-9, atol=0)


@every
def test_fitting_does_not_depend_on_blocks_or_order(name, train, test):
    whole = fitted(name, train).score(test)
    blocks = [train.select(slice(start, start + 7)) for start in range(0, 24, 7)]
    torch.testing.assert_close(fitted(name, blocks).score(test), whole, rtol=1e-8, atol=1e-10)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    shuffled = fitted(name, train.select(order)).score(test)
    torch.testing.assert_close(shuffled, whole, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in detectors.names() if detectors.get(n).heavy])
def test_rows_are_halved_where_the_memory_is_short(name, train, test, monkeypatch):
    """Those that are scored on a GPU."""
    detector = fitted(name, train)
    whole = detector.score(test)
    score, most = type(detector)._score, 2
    sizes = []

    def limited(self, block):
        sizes.append(len(block))
        if len(block) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return score(self, block)

    monkeypatch.setattr(type(detector), "_score", limited)
    torch.testing.assert_close(detector.score(test), whole, rtol=1e-9, atol=0)
    assert sizes == [9, 4, 2, 2, 2, 2, 1]
    most = 0
    with pytest.raises(
        DetectorError, match=f"not enough memory to score one image with {name} .*CUDA"
    ):
        detector.score(test)


@every
def test_one_row_and_none(name, train, test):
    detector = fitted(name, train)
    assert detector.score(test.select(slice(0, 1))).shape == (1,)
    assert detector.score(test.select(slice(0, 0))).shape == (0,)


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_out_of_distribution(name, bad, train, test):
    detector = fitted(name, train)
    spoilt = test.map_rows(lambda _, rows: rows.clone(), len(test))
    for rows in spoilt.rows().values():
        if rows.ndim == 2:
            rows[4, 0] = bad
    scores = detector.score(spoilt)
    assert scores[4] == math.inf
    good = torch.arange(9) != 4
    torch.testing.assert_close(scores[good], detector.score(test)[good], rtol=1e-12, atol=0)


@every
def test_rows_that_are_not_finite_do_not_spoil_a_fit(name, train, test):
    bad = train.select(slice(0, 1)).map_rows(lambda _, r: r * math.nan if r.ndim > 1 else r, 1)
    with_bad = fitted(name, [train, bad]).score(test)
    torch.testing.assert_close(with_bad, fitted(name, train).score(test))


@every
def test_huge_logits(name, train, test):
    large = replace(test, logits=test.logits * 1e4, odin_logits=test.odin_logits * 1e4)
    assert not torch.isnan(fitted(name, train).score(large)).any()


@every
def test_zero_features(name, train, test):
    nothing = test.map_rows(lambda _, rows: torch.zeros_like(rows), len(test))
    assert torch.isfinite(fitted(name, train).score(nothing)).all()


@every
def test_a_class_without_rows(name, train, test):
    some = fitted(name, train.select(train.label > 0))
    assert torch.isfinite(some.score(test)).all()


@every
def test_nothing_to_fit_on(name):
    if detectors.get(name).fitted:
        with pytest.raises(DetectorError, match="no row to fit on"):
            fitted(name, [])


@every
def test_on_a_device(name, train, test):
    detector = fitted(name, train)
    moved = detector.to(torch.device("meta"))
    for tensor in serial.state(moved).values():
        parts = tensor.blocks() if isinstance(tensor, Bank) else [tensor]
        assert all(part.is_meta for part in parts)
    if detector.heavy:  # no number of it is read, and nothing of another device gets in
        assert moved.score(test.to(torch.device("meta"))).is_meta
    assert serial.settings(moved) == serial.settings(detector)


@every
def test_what_was_not_recorded_is_named(name, train, test):
    detector = fitted(name, train)
    empty = Features(count=9, label=test.label)
    with pytest.raises(DetectorError, match=rf"{re.escape(name)} needs .*not recorded"):
        detector.score(empty)


@every
def test_state_is_the_whole_detector(name, train, test):
    detector = fitted(name, train)
    again = serial.restore(type(detector), serial.state(detector), serial.settings(detector))
    assert torch.equal(again.score(test), detector.score(test))
    with pytest.raises(DetectorError, match="unknown 'more'"):
        serial.restore(
            type(detector), serial.state(detector), {**serial.settings(detector), "more": 1}
        )
    for field in (*serial.state(detector), *serial.settings(detector)):
        if "/" not in field:
            tensors = {key: value for key, value in serial.state(detector).items() if key != field}
            settings = {
                key: value for key, value in serial.settings(detector).items() if key != field
            }
            with pytest.raises(DetectorError, match="missing"):
                serial.restore(type(detector), tensors, settings)


@every
def test_frozen_and_argument_untouched(name, train, test):
    before = {key: rows.clone() for key, rows in test.rows().items()}
    detector = fitted(name, train)
    detector.score(test)
    assert all(torch.equal(rows, before[key]) for key, rows in test.rows().items())
    with pytest.raises(FrozenInstanceError):
        detector.anything = 1


def test_hyperparameters_from_strings():
    kind = detectors.get("c2ir")
    assert parse(kind, {"weights": "uniform", "seed": "3"}) == {"weights": "uniform", "seed": 3}
    with pytest.raises(DetectorError, match="expected one of mgi, uniform, random, penultimate"):
        parse(kind, {"weights": "best"})
    with pytest.raises(DetectorError, match="no hyper-parameter 'colour': known are weights"):
        parse(kind, {"colour": "red"})
    with pytest.raises(DetectorError, match="T=warm: expected float"):
        parse(detectors.get("energy"), {"T": "warm"})
    with pytest.raises(DetectorError, match="must be positive"):
        detectors.get("energy")(T=0.0)
    with pytest.raises(DetectorError, match="no detector is called 'magic': known are msp"):
        detectors.get("magic")


# ---------------------------------------------------------------------------- formulas


def test_max_softmax_by_hand():
    # p = 1/(1+e), e/(1+e): the other probability is the smaller one.
    assert max_softmax(torch.tensor([[0.0, 1.0]])).item() == pytest.approx(1 / (1 + math.e))
    # 1 − p in float32 would be 0.
    assert max_softmax(torch.tensor([[30.0, 0.0, 0.0]])).item() == pytest.approx(
        2 * math.exp(-30), rel=1e-9
    )
    naive = 1 - torch.softmax(torch.tensor([[1.0, 2.0, 4.0]]).double() / 7, 1).max(1).values
    torch.testing.assert_close(max_softmax(torch.tensor([[1.0, 2.0, 4.0]]), 7.0), naive)


def test_energy_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [1e4, -1e4]])
    torch.testing.assert_close(
        energy(logits), torch.tensor([-math.log(4.0), -1e4], dtype=torch.float64)
    )
    expected = -2 * math.log(1 + math.sqrt(3.0))
    assert energy(logits, 2.0)[0].item() == pytest.approx(expected, rel=1e-7)


def test_odin_refuses_logits_of_another_step(test):
    with pytest.raises(DetectorError, match=r"wants epsilon=0\.1"):
        detectors.get("odin")(epsilon=0.1).score(test)
    other = replace(test, odin_step=OdinStep(0.1, 1000.0))
    torch.testing.assert_close(
        detectors.get("odin")(epsilon=0.1).score(other), max_softmax(test.odin_logits, 1000.0)
    )


def test_c2ir_against_loops(train, test, network):
    """Equations 6 to 10, one image, layer and channel at a time."""
    names = [name for name, layer in train.layers.items() if layer.kind == "batchnorm"]
    classes = network.num_classes
    expected = []
    for row in range(len(test)):
        c = int(test.logits[row].argmax())
        members = [i for i in range(len(train)) if int(train.label[i]) == c]
        deltas, deviations = [], []
        for name in names:
            layer = train.layers[name]
            width = layer.mean.shape[1]
            w = [
                sum(float(layer.gradient[i, k]) for i in members) / len(members)
                for k in range(width)
            ]
            total = sum(math.exp(x) for x in w)
            beta = [math.exp(x) / total for x in w]
            delta = 0.0
            average = 0.0
            for i in members:
                delta += sum(b * float(s) for b, s in zip(beta, layer.sensitivity[i], strict=True))
                average += sum(b * float(m) for b, m in zip(beta, layer.mean[i], strict=True))
            mine = sum(b * float(m) for b, m in zip(beta, test.layers[name].mean[row], strict=True))
            deltas.append(delta / len(members))
            deviations.append(abs(mine - average / len(members)))
        total = sum(math.exp(d) for d in deltas)
        expected.append(
            sum(math.exp(d) / total * v for d, v in zip(deltas, deviations, strict=True))
        )
    assert classes in (2, 3)
    scores = fitted("c2ir", train).score(test)
    torch.testing.assert_close(
        scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


def test_c2ir_z_against_loops(train, test):
    names = [name for name, layer in train.layers.items() if layer.kind == "batchnorm"]
    groups = [torch.nonzero(train.label == c)[:, 0] for c in train.label.unique()]
    freedom = len(train) - len(groups)
    head = test.head.weight.double()
    evidence = [-(train.embedding[g].double() @ head[c]) for c, g in enumerate(groups)]
    spread = sum(float((e - e.mean()).square().sum()) for e in evidence) / freedom
    expected = []
    for row in range(len(test)):
        c = int(test.logits[row].argmax())
        layers = []
        for name in names:
            mean = train.layers[name].mean.double()
            scatter = sum((mean[g] - mean[g].mean(0)).square().sum(0) for g in groups)
            var = scatter / freedom
            var = var + RIDGE * var.mean()
            d = test.layers[name].mean[row].double() - mean[groups[c]].mean(0)
            layers.append(float((d.square() / var).mean()))
        mine = float(-(test.embedding[row].double() @ head[c]))
        z = (mine - float(evidence[c].mean())) / math.sqrt(spread * (1 + RIDGE))
        expected.append(sum(layers) / len(layers) + z)
    torch.testing.assert_close(
        fitted("c2ir-z", train).score(test),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-8,
        atol=1e-8,
    )


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


def test_one_row_a_class_has_no_spread(train, network):
    with pytest.raises(DetectorError, match="no class has two rows"):
        fitted("c2ir-z", train.select(slice(0, network.num_classes)))
    with pytest.raises(DetectorError, match="no row to fit on"):
        fitted("c2ir-z", [])


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


def test_blocks_can_be_joined(train):
    halves = [train.select(slice(0, 10)), train.select(slice(10, 24))]
    joined = concatenate(halves).rows()
    assert all(torch.equal(rows, joined[name]) for name, rows in train.rows().items())
    with pytest.raises(ValueError, match="differ in what was recorded"):
        concatenate([halves[0], Features(count=1, logits=torch.zeros(1, 2))])
    with pytest.raises(ValueError, match="/logits has 2 rows, expected 3"):
        Features(count=3, logits=torch.zeros(2, 2))
