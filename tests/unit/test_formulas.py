"""Each formula of the fit-free and last-layer detectors against a naive one, and by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import networks
import numpy as np
import pytest
import torch
from naive import NAIVE, Fit, dms_aos_of, dms_of, dss_ext_of, dss_of
from scipy import stats
from torch import nn

from oodcli import detectors
from oodcli.detectors import dss_ext, percentiles, rg, thinkback
from oodcli.detectors.class_statistics import column_moments
from oodcli.detectors.energy import energy
from oodcli.detectors.energy_norm import energy_norm
from oodcli.detectors.entropy import entropy
from oodcli.detectors.hyperparameters import hyperparameters, parse
from oodcli.detectors.igoe import igoe
from oodcli.detectors.klm import kl_matching
from oodcli.detectors.last_layer_gradients import length
from oodcli.detectors.msp import max_softmax, softmax
from oodcli.detectors.one_class_sum import SUMMED
from oodcli.errors import DetectorError
from oodcli.features import INPUT, BatchNorm, Features, LinearHead, OdinStep, concatenate
from oodcli.recording.recorder import Recorder

CHEAP = frozenset({"logits", "embedding", "batchnorm.mean", "batchnorm.var"})


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def rows(count=40, classes=4, width=5, seed=0):
    """Rows of a linear head in float32, so that logits, embedding and head belong together."""
    head = LinearHead(normal(classes, width, seed=1), normal(classes, seed=2))
    embedding = normal(count, width, seed=seed)
    return Features(
        count, logits=embedding @ head.weight.T + head.bias, embedding=embedding, head=head
    )


def score(name, block, **hyperparameters):
    return detectors.get(name)(**hyperparameters).score(block)


HEAD = frozenset({"logits", "logits.level", "embedding", "head"})
OF_THE_HEAD = [
    name
    for name in detectors.names()
    if detectors.get(name).needs | detectors.get(name).fit_needs() <= HEAD
]


@pytest.mark.parametrize("name", OF_THE_HEAD)
def test_against_naive(name):
    """On embeddings of both signs, which no ReLU has made, in blocks."""
    train, test = rows(), rows(15, seed=5)
    blocks = [train.select(slice(0, 13)), train.select(slice(13, 40))]
    found = detectors.get(name).fit(blocks).score(test)
    expected = torch.from_numpy(NAIVE[name](test, Fit(train)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------------- output space


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


def test_odin_refuses_logits_of_another_step():
    test = networks.recorded(5)
    with pytest.raises(DetectorError, match=r"wants epsilon=0\.1"):
        detectors.get("odin")(epsilon=0.1).score(test)
    other = replace(test, made_with={"odin": OdinStep(0.1, 1000.0)})
    torch.testing.assert_close(
        detectors.get("odin")(epsilon=0.1).score(other), max_softmax(test.odin_logits, 1000.0)
    )


def test_entropy():
    p = 0.25, 0.75
    by_hand = -sum(each * math.log(each) for each in p)
    found = entropy(torch.tensor([[0.0, math.log(3.0)], [1e4, -1e4], [2.0, 2.0]]))
    torch.testing.assert_close(found, double([by_hand, 0.0, math.log(2.0)]), rtol=1e-7, atol=0)
    logits = normal(7, 5) * 3
    p = torch.softmax(logits.double(), 1)
    naive = [-sum(float(x) * math.log(float(x)) for x in row) for row in p]
    torch.testing.assert_close(entropy(logits), double(naive))


def test_t1000_and_mls():
    block = Features(3, logits=torch.tensor([[1.0, 2.0, 4.0], [1e4, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    p = torch.softmax(block.logits.double() / 1000, 1)
    torch.testing.assert_close(score("t1000", block), 1 - p.amax(1))
    assert score("mls", block).tolist() == [-4.0, -1e4, 0.0]


# ---------------------------------------------------------------------------- latent space


def latent(embedding, weight, bias=None):
    """All seven by name, for rows of the first class."""
    u, w = torch.tensor(embedding), torch.tensor(weight)
    head = LinearHead(torch.stack([w, torch.zeros_like(w)]), torch.tensor([1e6, 0.0]))
    logits = u @ head.weight.T + head.bias
    block = Features(len(u), logits=logits, embedding=u, head=head)
    names = ("norm", "ang", "proj", "act", "norm+", "ang++", "act+")
    return {name: score(name, block).tolist() for name in names}


@pytest.mark.parametrize("name", ["norm", "norm+", "ang", "ang++", "proj", "act", "act+"])
def test_rows_with_more_or_fewer_classes_than_there_are_rows(name):
    block = rows(count=10)  # of four classes
    detector = detectors.get(name)()
    few = [detector.score(block.select(slice(row, row + 2))) for row in range(0, 10, 2)]
    assert torch.equal(torch.cat(few), detector.score(block))


def test_latent_space_by_hand():
    found = latent([[3.0, 4.0], [0.0, 0.0]], [2.0, 0.0])
    expected = {"norm": -5, "ang": 0.4, "proj": -3, "act": -6}
    assert {name: found[name][0] for name in expected} == pytest.approx(expected)
    # Where u = 0 the cosine is 0.
    assert [found[name][1] for name in expected] == [0, 1, 0, 0]
    found = latent([[3.0, 4.0]], [2.0, -1.0])
    expected = {"act": -2, "proj": -2 / math.sqrt(5), "norm+": -3, "ang++": 0, "act+": -6}
    assert {name: found[name][0] for name in expected} == pytest.approx(expected)
    # No positive component: the cosine is 0.
    found = latent([[3.0, 4.0]], [-2.0, -1.0])
    assert (found["norm+"], found["ang++"], found["act+"]) == ([0], [1], [0])
    found = latent([[3.0, 4.0]], [0.0, 0.0])
    assert (found["ang"], found["proj"]) == ([1], [0])


def test_the_predicted_class_is_that_of_the_logits():
    # The bias makes it the second class, whose weights are (0, 1).
    head = LinearHead(torch.eye(2), torch.tensor([0.0, 9.0]))
    u = torch.tensor([[5.0, 2.0]])
    block = Features(1, logits=u @ head.weight.T + head.bias, embedding=u, head=head)
    assert score("act", block).tolist() == [-2.0]


def test_angles_do_not_depend_on_scale():
    block = rows()
    larger = replace(block, embedding=block.embedding * 3)
    for name, factor in (("ang", 1), ("ang++", 1), ("norm", 3), ("proj", 3), ("act", 3)):
        torch.testing.assert_close(
            score(name, larger), score(name, block) * factor, rtol=1e-6, atol=1e-6
        )
    # It is the weight whose sign counts, not the embedding's.
    found = latent([[-1.0, 4.0]], [2.0, -1.0])
    assert (found["norm+"], found["act+"]) == ([-1], [2])


# ---------------------------------------------------------------------------- BatchNorm

NAIVE_BATCHNORM = {"dms": dms_of, "dms-aos": dms_aos_of, "dss": dss_of, "dss-ext": dss_ext_of}
BATCHNORM = tuple(NAIVE_BATCHNORM)


def of_maps(layers):
    """layers: of each, y (N, C, HW) float64. The naive indicators of the maps themselves."""
    rows = []
    for row in range(len(layers[0])):
        channels = [channel.tolist() for y in layers for channel in y[row]]
        rows.append([(np.mean(y), np.var(y, ddof=len(y) > 1), len(y)) for y in channels])
    return {
        name: double([sum(NAIVE_BATCHNORM[name](*c) for c in row) / len(row) for row in rows])
        for name in BATCHNORM
    }


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("network", [networks.Residual, networks.Shared])
def test_batchnorm_against_activation_maps(network, inplace):
    """On the maps themselves; Shared calls one layer twice and has one with a single position."""
    module = network(inplace=inplace) if network is networks.Residual else network()
    classifier = networks.classifier(module)
    images = networks.images(6) * torch.linspace(0.2, 2, 6)[:, None, None, None]
    found = Recorder(classifier, CHEAP)(images)
    maps = [images.double().flatten(2)]

    def keep(norm, args):
        x = args[0].double().reshape(*args[0].shape[:2], -1).clone()
        centre, spread = norm.running_mean.double(), norm.running_var.double() + norm.eps
        maps.append((x - centre[:, None]) / spread[:, None].sqrt())

    norms = [
        m for m in classifier.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    handles = [norm.register_forward_pre_hook(keep) for norm in norms]
    with torch.no_grad():
        classifier.network(images)
    for handle in handles:
        handle.remove()
    assert len(maps) == len(found.batchnorm) == (10 if network is networks.Residual else 4)
    for prefix, layers in (("", maps), ("in-", maps[:1])):
        for name, expected in of_maps(layers).items():
            torch.testing.assert_close(
                score(prefix + name, found), expected, rtol=1e-4, atol=1e-6, msg=prefix + name
            )
    assert len(set(score("dss-ext", found).tolist())) > 1


def layer(mean, var, running_mean=0.0, running_var=1.0, eps=0.0, positions=101):
    mean = torch.tensor(mean)
    width = mean.shape[1]
    return BatchNorm(
        torch.full((width,), running_mean),
        torch.full((width,), running_var),
        torch.zeros(width),  # the layer's own weight may be 0
        torch.zeros(width),
        eps,
        positions,
        mean,
        torch.tensor(var),
    )


def test_batchnorm_by_hand():
    # One channel of the image with M = 1, S = 1; one of a layer with M = (5−1)/2, S = 6/2.
    norms = {INPUT: layer([[1.0]], [[1.0]]), "bn": layer([[5.0]], [[36.0]], 1.0, 3.5, 0.5)}
    block = Features(1, batchnorm=norms)
    found = {name: score(name, block).item() for name in BATCHNORM}
    aos = (1 + 100 / 101 + 4 + 9 * 100 / 101) / 2
    expected = {"dms": (1 + 4) / 2, "dms-aos": aos, "dss": (0 + 4) / 2, "dss-ext": 0.5}
    assert found == pytest.approx(expected)
    found = {name: score(f"in-{name}", block).item() for name in BATCHNORM}
    expected = {"dms": 1, "dms-aos": 1 + 100 / 101, "dss": 0, "dss-ext": 0}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("positions", [2, 5, 64, 1024, 50176])
def test_extreme_variances(positions):
    """p < 0.1 exactly where S² leaves the bounds."""
    low, high = dss_ext.variance_bounds(positions)
    freedom = positions - 1
    for bound, outside in ((low, 1 - 1e-6), (high, 1 + 1e-6)):
        for factor, extreme in ((outside, True), (2 - outside, False)):
            half = double([freedom / 2])
            below = torch.special.gammainc(half, half * bound * factor).item()
            assert (2 * min(below, 1 - below) < 0.1) is extreme
            variance, bounds = double([[bound * factor]]), double([[low], [high]])
            assert dss_ext.dss_ext(variance, bounds).item() == extreme
    expected = stats.chi2.ppf([0.05, 0.95], freedom) / freedom
    assert (low, high) == pytest.approx(expected.tolist(), rel=1e-9)


def test_one_position_has_no_variance():
    """It adds nothing to dss and dss-ext, but its channel counts in the divisor."""
    norms = {
        INPUT: layer([[0.0]], [[9.0]]),
        "flat": layer([[3.0]], [[0.0]], positions=1),
    }
    found = {name: score(name, Features(1, batchnorm=norms)).item() for name in BATCHNORM}
    aos = (9 * 100 / 101 + 9) / 2
    expected = {"dms": 4.5, "dms-aos": aos, "dss": 2.0, "dss-ext": 0.5}
    assert found == pytest.approx(expected)
    alone = Features(1, batchnorm={INPUT: norms["flat"]})
    assert score("in-dss", alone).item() == score("in-dss-ext", alone).item() == 0


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_running_variance_of_zero(eps):
    """Finite, whether the channel is as dead as it was or wakes up; never NaN."""
    norms = {
        INPUT: layer([[0.0], [0.0]], [[1.0], [1.0]]),
        "dead": layer([[2.0], [2.5]], [[0.0], [1.0]], 2.0, 0.0, eps),
    }
    for name in BATCHNORM:
        asleep, awake = score(name, Features(2, batchnorm=norms)).tolist()
        assert math.isfinite(asleep)
        assert math.isfinite(awake)
        assert awake > asleep or name == "dss-ext"


# ---------------------------------------------------------------------------- last-layer gradients


def weight_gradients(block, loss):
    """∂loss(z)/∂W of each row by autograd, float64: list of (K, D)."""
    found = []
    for u in block.embedding.double():
        linear = nn.Linear(u.shape[0], block.logits.shape[1]).double()
        with torch.no_grad():
            linear.weight.copy_(block.head.weight)
            linear.bias.copy_(block.head.bias)
        found.append(torch.autograd.grad(loss(linear(u)), linear.weight)[0])
    return found


@pytest.fixture(scope="module")
def exact():
    """Rows whose logits are those of the head in float64, to compare with autograd to 1e-12."""
    block = rows(12)
    logits = block.embedding.double() @ block.head.weight.double().T + block.head.bias.double()
    return replace(block, logits=logits)


def same(found, expected):
    torch.testing.assert_close(found, double([float(e) for e in expected]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_thinkback_against_autograd(exact, temperature):
    def loss(z):
        return nn.functional.cross_entropy(z / temperature, z.argmax())

    gradients = weight_gradients(exact, loss)
    expected = [gradient.square().sum() for gradient in gradients]
    same(score("thinkback", exact, T=temperature), expected)
    mean = sum(gradient.square() for gradient in gradients) / len(gradients)
    expected = [(gradient.square() / (1e-16 + mean)).sum() for gradient in gradients]
    detector = detectors.get("thinkback-norm").fit(exact, T=temperature)
    torch.testing.assert_close(detector.expected, mean, rtol=1e-12, atol=0)
    same(detector.score(exact), expected)


def test_gradnorm_against_autograd(exact):
    def divergence(z):  # KL(uniform ‖ softmax), without the constant
        return -torch.log_softmax(z, 0).mean()

    expected = [-gradient.abs().sum() for gradient in weight_gradients(exact, divergence)]
    same(score("gradnorm", exact), expected)


def test_igoe_against_autograd(exact):
    lengths = []
    for y in range(exact.logits.shape[1]):
        found = weight_gradients(exact, lambda z, y=y: torch.log_softmax(z, 0)[y])
        lengths.append(torch.stack([gradient.abs().sum() for gradient in found]))
    p = torch.softmax(exact.logits, 1)
    same(score("igoe", exact), (p * torch.stack(lengths, 1)).sum(1))


def test_expgrad_against_autograd(exact):
    found = weight_gradients(exact, lambda z: z.exp().sum())
    same(score("expgrad", exact), [-gradient.abs().sum().log() for gradient in found])


def test_last_layer_gradients_by_hand():
    # p = (1/4, 3/4), ‖u‖₁ = 3, ‖u‖² = 5, logsumexp = log 4.
    logits, embedding = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[1.0, -2.0]])
    head = LinearHead(torch.zeros(2, 2), logits[0])
    block = Features(1, logits=logits, embedding=embedding, head=head)
    expected = {
        "thinkback": 5 * 2 / 16,
        "gradnorm": -3 * 0.5,
        "igoe": 3 * 2 * (3 / 16 + 3 / 16),
        "expgrad": -math.log(4 * 3),
        "energy-norm": -3 * math.log(4),
        "rg": -math.log(4) * (1 - 2),
    }
    assert {name: score(name, block).item() for name in expected} == pytest.approx(expected)
    assert thinkback.residual(logits, 2.0).sum().item() == pytest.approx(0)


def test_small_differences_keep_their_digits():
    """In float64, too, 1 − p is exactly 0 at a gap of 40."""
    logits, embedding = torch.tensor([[40.0, 0.0, 0.0]]), torch.ones(1, 1)
    q = math.exp(-40)
    assert igoe(softmax(logits), length(embedding)).item() == pytest.approx(8 * q, rel=1e-9, abs=0)
    expected = (2 * q) ** 2 + 2 * q**2
    found = thinkback.thinkback(logits, embedding.square().sum(1)).item()
    assert found == pytest.approx(expected, rel=1e-9, abs=0)


def test_expgrad_neither_overflows_nor_diverges():
    head = LinearHead(torch.zeros(2, 1), torch.full((2,), 1e4))
    embedding = torch.tensor([[0.0], [1.0]])
    block = Features(2, logits=torch.full((2, 2), 1e4), embedding=embedding, head=head)
    zero, one = score("expgrad", block).tolist()
    assert one == pytest.approx(-1e4 - math.log(2))
    assert one < zero < math.inf


# ---------------------------------------------------------------------------- rg, rg-add


@pytest.mark.parametrize("name", ["rg", "rg-add", "react"])
def test_settings_against_naive(name):
    block = rows()
    settings = {
        "rg": {"T": 2.0, "k": 0.5},
        "rg-add": {"ratio": 0.3, "k": 0.5, "rows": 7},
        "react": {"percentile": 50.0},
    }[name]
    found = detectors.get(name).fit(block, **settings).score(block)
    named = {"temperature" if key == "T" else key: value for key, value in settings.items()}
    expected = NAIVE[name](block, Fit(block), **named)
    torch.testing.assert_close(found, torch.from_numpy(expected))


def test_rg_of_an_embedding_that_is_not_clipped():
    block = rows()
    torch.testing.assert_close(
        rg.rg(block.logits, block.embedding.abs(), k=1e9),
        energy_norm(block.logits, length(block.embedding)),
    )


def test_rg_add_balances_the_first_rows():
    block = rows(60)
    for used in (7, 50, 1000):
        first = block.select(slice(0, used))
        energy = torch.logsumexp(first.logits.double(), 1)
        clipped = first.embedding.double().clamp(max=0.5).sum(1)
        alpha = 0.6 * float(energy.std() / clipped.std())
        blocks = [block.select(slice(start, start + 11)) for start in range(0, 60, 11)]
        for train in (block, blocks):
            found = detectors.get("rg-add").fit(train, k=0.5, rows=used)
            assert found.alpha == pytest.approx(alpha, rel=1e-12)
            assert found.k == 0.5
    half = detectors.get("rg-add").fit(block, k=0.5, ratio=0.3)
    assert half.alpha == pytest.approx(alpha / 2)


def test_rg_add_where_a_term_does_not_vary():
    """Its spread counts as 1, as that of 1c-sum's constant indicators."""
    block = rows()
    saturated = replace(block, embedding=block.embedding.abs() + 1)
    found = detectors.get("rg-add").fit(saturated)
    assert found.alpha == pytest.approx(0.6 * float(torch.logsumexp(block.logits, 1).std(0, False)))


# ---------------------------------------------------------------------------- thinkback, fitted


def test_automatic_temperature_has_the_smallest_spread():
    block = rows()
    blocks = [block.select(slice(0, 13)), block.select(slice(13, 40))]
    squares = block.embedding.double().square().sum(1)
    spread = {
        float(T): float(thinkback.thinkback(block.logits, squares, T).std()) for T in range(1, 6)
    }
    kind = detectors.get("thinkback")
    assert kind.fit(blocks, T="auto").T == min(spread, key=spread.get) == 5
    # Of confident rows the score is 0 at T = 1, and larger at higher temperatures.
    confident = replace(block, logits=block.logits * 0 + torch.tensor([20.0, 0.0, 0.0, 0.0]))
    assert kind.fit(confident, T="auto").T == 1
    assert kind.fit([], T=3.0).T == 3
    assert parse(kind, {"T": "auto"}) == {"T": "auto"}
    assert parse(kind, {"T": "2"}) == {"T": 2.0}
    assert kind.fit_needs(T="auto") == {"logits", "embedding", "head"}
    assert kind.fit_needs() == frozenset()
    with pytest.raises(DetectorError, match="T=auto must be fitted first"):
        kind(T="auto")
    with pytest.raises(DetectorError, match="T=warm: expected float or auto"):
        parse(kind, {"T": "warm"})


def test_a_weight_that_no_row_moves():
    """Its E is 0: ε makes it count for very much, not for infinity."""
    block = rows()
    dead = replace(block, embedding=block.embedding * torch.tensor([1.0, 1, 1, 1, 0]))
    detector = detectors.get("thinkback-norm").fit(dead)
    assert torch.isfinite(detector.score(block)).all()
    assert (detector.score(block) > 1e6 * detector.score(dead)).all()


# ---------------------------------------------------------------------------- react, klm


@pytest.mark.parametrize("percent", [0, 12.5, 50, 90, 99.9, 100])
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e30])
def test_percentile_is_exact(percent, spread):
    entries = normal(5, 41) * spread
    entries[0, :7] = 0.0
    entries[1, :3] = -0.0
    entries[2, :20] = entries[2, 20]
    expected = np.percentile(entries.double().numpy(), percent)
    found = percentiles.percentile_of(lambda: entries.split(2), percent)
    assert found == pytest.approx(expected, rel=1e-12)
    both = percentiles.percentiles_of(lambda: entries.split(2), [50, percent])
    assert both == [percentiles.percentile_of(lambda: entries.split(2), 50), found]


def test_react():
    block = rows()
    kind = detectors.get("react")
    c = kind.fit([block.select(slice(0, 13)), block.select(slice(13, 40))]).c
    assert c == pytest.approx(np.percentile(block.embedding.double().numpy(), 90))
    assert kind.fit(block, **parse(kind, {"c": "1"})).c == 1
    assert kind.fit(block, percentile=50.0).c < c
    # Nothing is clipped at the largest entry: plain energy.
    torch.testing.assert_close(
        kind.fit(block, percentile=100.0).score(block), score("energy", block), rtol=1e-5, atol=1e-5
    )


def test_klm_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [1e4, 0.0]])
    templates = double([[0.5, 0.5], [0.0, 1.0]])
    # KL((¼, ¾) ‖ (½, ½)) is the smaller one; 0 log 0 = 0; a 0 in the template is no infinity.
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    found = kl_matching(logits, templates)
    torch.testing.assert_close(found, double([expected, math.log(2)]), rtol=1e-7, atol=0)
    assert 700 < kl_matching(logits[1:], templates[1:]).item() < math.inf


def test_klm_leaves_out_a_class_that_nothing_is_predicted_as():
    block = rows()
    some = block.select(block.logits.argmax(1) != 2)
    assert detectors.get("klm").fit(some).templates.shape == (3, 4)
    assert torch.isfinite(detectors.get("klm").fit(some).score(block)).all()


# ---------------------------------------------------------------------------- 1c-sum, supervised


@pytest.fixture(scope="module")
def recorded():
    recorder = Recorder(networks.classifier(networks.Residual()), CHEAP)
    return recorder(networks.images(30)), recorder(networks.images(20, seed=2) * 0.6)


def test_one_class_sum(recorded):
    noise, test = recorded
    detector = detectors.get("1c-sum").fit([noise.select(slice(0, 9)), noise.select(slice(9, 30))])
    names = [
        *("t1000", "msp", "entropy", "norm", "norm+", "act", "act+", "proj", "ang", "ang++"),
        *("dms", "dms-aos", "dss", "dss-ext"),
    ]
    expected = torch.from_numpy(NAIVE["1c-sum"](test, Fit(noise)))
    torch.testing.assert_close(detector.score(test), expected, rtol=1e-9, atol=1e-9)
    terms = detector.contributions(test)
    torch.testing.assert_close(terms[1].sum(1), detector.score(test))
    assert [term.split(",")[0] for term in terms[0]] == names
    assert list(SUMMED) == names
    assert detector.reference == "uniform"
    assert detectors.get("1c-sum").reference_images == "noise:uniform?n=2000&seed=0"
    kind = detectors.get("1c-sum")
    assert kind.fit(noise, **parse(kind, {"reference": "virtual"})).reference == "virtual"


def test_a_constant_column_has_a_spread_of_one():
    third = 1 / 3
    columns = double([[1.0, third], [3.0, third], [5.0, third], [math.inf, third]])
    mean, sd = column_moments(columns)
    torch.testing.assert_close(mean, double([3.0, third]))
    torch.testing.assert_close(sd, double([math.sqrt(8 / 3), 1.0]))
    with pytest.raises(DetectorError, match="no row to fit on has finite scores"):
        column_moments(columns[3:])


def test_supervised(recorded):
    inside, outside = recorded
    kind = detectors.get("supervised")
    assert kind.uses_ood
    detector = kind.fit(inside, ood=[outside.select(slice(0, 7)), outside.select(slice(7, 20))])
    for block in recorded:
        expected = torch.from_numpy(NAIVE["supervised"](block, Fit(inside, ood=outside)))
        torch.testing.assert_close(detector.score(block), expected, rtol=1e-6, atol=1e-6)
    assert detector.score(inside).mean() < 0 < detector.score(outside).mean()
    assert "ood" not in hyperparameters(kind)
    with pytest.raises(DetectorError, match=r"also needs OOD rows.* --ood"):
        kind.fit(inside)


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [
        ("rg", {"T": 0.0}),
        ("rg", {"k": -1.0}),
        ("rg-add", {"ratio": 0.0}),
        ("rg-add", {"rows": 0}),
        ("thinkback", {"T": math.nan}),
        ("thinkback-norm", {"T": -1.0}),
        ("react", {"c": 0.0}),
        ("react", {"percentile": 101.0}),
        ("supervised", {"C": 0.0}),
    ],
)
def test_hyperparameters_out_of_range(name, hyperparameters):
    ((key, value),) = hyperparameters.items()
    with pytest.raises(DetectorError, match=rf"{name}\.{key}={value:g} must be"):
        detectors.get(name).fit(rows(), **hyperparameters)


def test_what_detectors_share_is_computed_once(recorded):
    block = recorded[0].select(slice(0, 5))
    calls = []

    def mean(block, only_input):
        calls.append(only_input)
        return block.batchnorm[INPUT].mean.mean(1)

    first = block.shared(mean, True)
    assert block.shared(mean, True) is first
    assert calls == [True]
    block.shared(mean, False)
    replace(block).shared(mean, True)
    assert calls == [True, False, True]


def test_blocks_can_be_joined():
    train = networks.recorded(24)
    halves = [train.select(slice(0, 10)), train.select(slice(10, 24))]
    joined = concatenate(halves).rows()
    assert all(torch.equal(rows, joined[name]) for name, rows in train.rows().items())
    with pytest.raises(ValueError, match="differ in what was recorded"):
        concatenate([halves[0], Features(count=1, logits=torch.zeros(1, 2))])
    with pytest.raises(ValueError, match="/logits has 2 rows, expected 3"):
        Features(count=3, logits=torch.zeros(2, 2))
