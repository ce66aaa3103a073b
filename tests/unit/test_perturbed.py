"""Records of changed images and of gradients, against their definitions; the detectors of them at
the edges."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import h5py
import networks
import numpy as np
import pytest
import torch
from torch import nn

from oodcli import detectors, notes
from oodcli.detectors import adascale, shaping
from oodcli.detectors.energy import energy
from oodcli.detectors.gen import class_variances, generalised_entropy
from oodcli.detectors.pro import ascent, uncertainty
from oodcli.errors import DetectorError
from oodcli.features import AdaScaleStep, Features, LinearHead, OdinStep, ProSteps, concatenate
from oodcli.files.cache import open_cache
from oodcli.recording.recorder import Recorder, recordable

CONFIDENCES = ("gen", "msp", "entropy")
HEAD = LinearHead(torch.eye(2, 4), torch.tensor([0.5, -0.25]))
USUAL = {"adascale": AdaScaleStep()}


@pytest.fixture(params=[False, True], ids=["relu", "inplace-relu"])
def residual(request):
    return networks.classifier(networks.Residual(inplace=request.param))


def in_double(classifier):
    return copy.deepcopy(classifier.network).double()


def gradient(number, x):
    return torch.autograd.grad(number, x)[0]


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# ---------------------------------------------------------------------------- the records


def confidence(p, how):
    """As the paper has it: higher = more in distribution."""
    if how.confidence == "msp":
        return p.amax(1)
    if how.confidence == "entropy":
        return (p * p.log()).sum(1)
    largest = p.sort(1, descending=True).values[:, : how.M]
    return -(largest**how.gamma * (1 - largest) ** how.gamma).sum(1)


@pytest.mark.parametrize(
    "how",
    [
        ProSteps(epsilon=0.01),
        ProSteps(epsilon=0.02, gamma=0.5, M=2),
        ProSteps("msp", 0.02, 4, temperature=2.0),
        ProSteps("entropy", 0.01, 1),
    ],
    ids=lambda how: f"{how.confidence}-{how.steps}-{how.M}",
)
def test_pro_steps_against_the_confidence(residual, how):
    images = networks.images(5)
    seen = Recorder(residual, frozenset({"pro.steps"}), made_with={"pro": how})(images)
    network, x, expected = in_double(residual), images.double(), []
    for _ in range(how.steps + 1):
        x = x.detach().requires_grad_()
        found = confidence(torch.softmax(network(x) / how.temperature, 1), how)
        expected.append(-found.detach() + (how.confidence == "msp"))
        x = x - how.epsilon * gradient(found.sum(), x).sign()
    torch.testing.assert_close(
        seen.pro_steps.double(), torch.stack(expected, 1), rtol=1e-3, atol=1e-5
    )
    assert (seen.pro_steps.diff(dim=1).mean(0) > 0).all()
    assert seen.made_with == {"pro": how}


@pytest.mark.parametrize("kind", CONFIDENCES)
def test_pro_climbs_where_the_softmax_is_saturated(kind):
    """1 − p is 0 in float32 for the second row, and underflows in float64 for the last."""
    z = torch.tensor([[2.0, 0, 1], [60.0, 0, 1], [0.0, 0, 0], [1e4, -1e4, 0]])
    how = ProSteps(kind)
    found = ascent(z, how)
    assert (found[:2, 0] < 0).all()
    assert (found[:2, 1:] > 0).all()
    assert found[:2].abs().amax(1).tolist() == [1, 1]
    assert torch.isfinite(found).all()
    assert torch.isfinite(uncertainty(z, how)).all()
    assert (uncertainty(z, how)[:2].diff() < 0).all()


def test_the_uncertainty_is_that_of_the_detectors_named_so():
    z = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)) * 4
    rows = Features(9, logits=z)
    for kind in CONFIDENCES:
        expected = detectors.get(kind)().score(rows)
        torch.testing.assert_close(uncertainty(z, ProSteps(kind)), expected)
    fewer = generalised_entropy(class_variances(rows), 0.5, 2)
    torch.testing.assert_close(uncertainty(z, ProSteps(gamma=0.5, M=2)), fewer)


def test_adascale_moves_the_values_of_smallest_gradient(residual):
    images = networks.images(4)
    how = AdaScaleStep(0.25, 0.1)
    seen = Recorder(residual, frozenset({"adascale.u"}), made_with={"adascale": how})(images)
    network, x = in_double(residual), images.double().requires_grad_()
    slopes = gradient(network(x).amax(1).sum(), x)
    moved = images.double().clone()
    for row in range(4):
        sizes = slopes[row].abs().flatten().tolist()
        for place in sorted(range(len(sizes)), key=sizes.__getitem__)[: int(len(sizes) * 0.1)]:
            moved[row].view(-1)[place] += 0.25 * slopes[row].flatten()[place].sign()
    assert int((moved != images).sum()) == 4 * 19
    expected = []
    handle = network.fc.register_forward_hook(lambda _, args, out: expected.append(args[0]))
    with torch.no_grad():
        network(moved)
    handle.remove()
    torch.testing.assert_close(seen.adascale_u.double(), expected[0], rtol=1e-4, atol=1e-5)


def test_odin_may_move_one_value(residual):
    images = networks.images(4)
    step = OdinStep(0.02, 10.0, "largest")
    seen = Recorder(residual, frozenset({"odin.logits"}), made_with={"odin": step})(images)
    network, x = in_double(residual), images.double().requires_grad_()
    z = network(x)
    loss = nn.functional.cross_entropy(z / 10, z.argmax(1), reduction="sum")
    slopes = gradient(loss, x)
    moved = images.double().clone()
    for row in range(4):
        channel, y, x_ = np.unravel_index(int(slopes[row].abs().argmax()), (3, 8, 8))
        std = networks.PREPROCESSING.std[channel]
        moved[row, channel, y, x_] -= 0.02 / std * slopes[row, channel, y, x_].sign()
    assert int((moved != images).sum()) == 4
    with torch.no_grad():
        torch.testing.assert_close(seen.odin_logits.double(), network(moved), rtol=1e-4, atol=1e-5)
    everywhere = Recorder(residual, frozenset({"odin.logits"}), made_with={"odin": OdinStep(0.02)})
    assert (everywhere(images).odin_logits - seen.odin_logits).abs().max() > 1e-3


def test_which_gradients_are_not_zero(residual):
    images = networks.images(3)
    seen = Recorder(residual, frozenset({"layers.nonzero"}))(images)
    network, found = in_double(residual), {}

    def hook(name):
        return lambda _, args, out: out.register_hook(lambda g: found.__setitem__(name, g)) and None

    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(hook(name))
    network(images.double().requires_grad_()).amax(1).sum().backward()
    shares = {name: layer.nonzero for name, layer in seen.layers.items()}
    for name, slopes in found.items():
        expected = [[float((slopes[n, c] != 0).sum()) / 64 for c in range(6)] for n in range(3)]
        if name.startswith("layer2"):
            expected = [[4 * each for each in row] for row in expected]  # 16 positions
        torch.testing.assert_close(shares.pop(name), torch.tensor(expected))
    assert len(found) == 9
    assert all(each is None for each in shares.values())
    scores = detectors.get("gaia-z")().score(seen)
    both = torch.cat(
        [layer.nonzero for layer in seen.layers.values() if layer.nonzero is not None], 1
    )
    assert 0 < both.min() < both.max() <= 1 or 0 <= both.min() < both.max()
    torch.testing.assert_close(scores, both.double().square().mean(1))


ALL = frozenset({"layers.gradient", "layers.nonzero", "odin.logits", "pro.steps", "adascale.u"})
TOGETHER = ALL | {"embedding", "logits", "layers.mean"}


def test_each_record_is_the_same_alone(residual):
    """With labels that the network does not agree with, too."""
    images = networks.images(6)
    for labels in (None, torch.tensor([0, 1, 2, -1, 0, 1])):
        whole = Recorder(residual, TOGETHER)(images, labels).rows()
        for word in ALL:
            alone = Recorder(residual, frozenset({word}))(images, labels).rows()
            alone.pop("label")
            assert alone
            for name, rows in alone.items():
                torch.testing.assert_close(rows, whole[name], msg=name)


def test_rows_do_not_depend_on_their_batch(residual):
    images = networks.images(16)
    recorder = Recorder(residual, TOGETHER)
    whole = recorder(images).rows()
    for size in (1, 7):
        parts = concatenate([recorder(each) for each in images.split(size)]).rows()
        for name, rows in whole.items():
            torch.testing.assert_close(parts[name], rows, rtol=1e-4, atol=1e-5, msg=name)


def test_one_backward_pass_serves_what_has_one_loss(residual, monkeypatch):
    images = networks.images(4)
    count = 0
    grad = torch.autograd.grad

    def counted(*args, **more):
        nonlocal count
        count += 1
        return grad(*args, **more)

    monkeypatch.setattr("oodcli.recording.perturbed.torch.autograd.grad", counted)
    one = frozenset({"layers.gradient", "layers.nonzero", "adascale.u"})
    recorder = Recorder(residual, one)
    seen = recorder(images)
    assert (count, recorder.passes) == (1, (2, 1))
    predicted = residual.network(images).argmax(1)
    recorder(images, predicted)
    assert count == 2
    other = recorder(images, (predicted + 1) % 3)
    assert count == 4
    for name, layer in seen.layers.items():
        assert not torch.equal(layer.gradient, other.layers[name].gradient)
        assert layer.nonzero is None or torch.equal(layer.nonzero, other.layers[name].nonzero)
    assert torch.equal(seen.adascale_u, other.adascale_u)
    assert Recorder(residual, ALL).passes == (6, 5)
    assert Recorder(residual, frozenset({"logits"})).passes == (1, 0)


def test_the_mirror_image_is_changed_by_itself(residual):
    images = networks.images(4)
    seen = Recorder(residual, TOGETHER | {"mirror"})(images)
    flipped = Recorder(residual, TOGETHER)(images.flip(3)).rows()
    for name, rows in seen.mirror.rows().items():
        torch.testing.assert_close(rows, flipped[name], msg=name)


class Smooth(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.SiLU())
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


def test_smooth_activations_let_every_gradient_pass(caplog, monkeypatch):
    smooth = networks.classifier(Smooth())
    assert "layers.nonzero" not in recordable(smooth)
    with pytest.raises(DetectorError, match="only activations without a flat part, such as GELU"):
        Recorder(smooth, frozenset({"layers.nonzero"}))
    with pytest.raises(DetectorError, match="no layers were found in it"):
        Recorder(networks.classifier(networks.Plain()), frozenset({"layers.nonzero"}))
    hidden = networks.classifier(networks.Apart(nn.BatchNorm2d))  # a SiLU that is no module
    monkeypatch.setattr(notes, "_SAID", set())
    caplog.set_level(logging.INFO)
    rows = Recorder(hidden, frozenset({"layers.nonzero"}))(networks.images(4))
    for _ in range(2):
        assert detectors.get("gaia-z")().score(replace(rows)).tolist() == [1] * 4
    assert caplog.text.count("not of smooth activations such as GELU or SiLU") == 1


def test_an_image_without_finite_logits_is_out_of_distribution(residual):
    images = networks.images(3)
    images[1, 0, 2, 2] = torch.nan
    seen = Recorder(residual, TOGETHER)(images)
    for name in ("pro", "gaia-z", "odin"):
        scores = detectors.get(name)().score(seen)
        assert torch.isfinite(scores).tolist() == [True, False, True]


# ---------------------------------------------------------------------------- settings


def test_settings_are_kept_in_the_cache(small, tmp_path):
    from commands import fails, oodcli

    cache = tmp_path / "c.h5"
    made = oodcli(
        *("extract", small / "net.pt", "noise:uniform?n=20", "-o", cache),
        *("--for", "odin,pro,adascale-a,adascale-l", "-p", "odin.where=largest"),
        *("-p", "pro.confidence=msp", "-p", "pro.steps=2", "-p", "pro.epsilon=0.01"),
        *("-p", "adascale-a.epsilon=0.2", "-p", "adascale-l.epsilon=0.2"),
    )
    assert made.status == 0, made.err
    with open_cache(cache) as found:
        (rows,) = found.blocks()
    assert rows.features.made_with == {
        "odin": OdinStep(where="largest"),
        "pro": ProSteps("msp", 0.01, 2),
        "adascale": AdaScaleStep(0.2),
    }
    usual = "pro wants confidence=gen, epsilon=0.0001, steps=3"
    fails(usual, "score", cache, "-d", "pro")
    fails("odin wants epsilon=0.0014, temperature=1000, where=all", "score", cache, "-d", "odin")
    set_ = ("-p", "pro.confidence=msp", "-p", "pro.epsilon=0.01", "-p", "pro.steps=1")
    fewer = oodcli("score", cache, "-d", "pro", *set_, "-d", "odin", "-p", "odin.where=largest")
    assert fewer.status == 0, fewer.err
    fails("steps=3", "score", cache, "-d", "pro", *set_[:4], "-p", "pro.steps=3")
    fails(
        "wants epsilon=0.5, fraction=0.05, but these rows were recorded with epsilon=0.2",
        *("fit", cache, "-d", "adascale-l", "-o", tmp_path / "fitted"),
    )
    with h5py.File(cache, "a") as file:
        del file["odin"].attrs["where"]
    with open_cache(cache) as found:  # of an older version
        (rows,) = found.blocks()
    assert rows.features.made_with["odin"] == OdinStep()
    detectors.get("odin")().score(rows.features)


def test_one_record_is_made_in_one_way(small, tmp_path):
    from commands import fails

    fails(
        "adascale-a.fraction=5 must be in 0 … 1, a fraction and not a percentage",
        *("extract", small / "net.pt", "noise:uniform?n=9", "--for", "adascale-a"),
        *("-p", "adascale-a.fraction=5", "-o", tmp_path / "c.h5"),
    )

    two = ("--for", "adascale-a,adascale-l", "-p", "adascale-a.epsilon=0.25")
    fails(
        "adascale-a wants epsilon=0.25, fraction=0.05, but adascale-l wants epsilon=0.5",
        *("extract", small / "net.pt", "noise:uniform?n=9", *two, "-o", tmp_path / "c.h5"),
    )
    fails(
        "-p energy.…: energy is not among the detectors of --for",
        *("extract", small / "net.pt", "noise:uniform?n=9", "-p", "energy.T=2"),
        *("-o", tmp_path / "c.h5"),
    )


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("pro", {"steps": 0}, r"pro\.steps=0 must be positive"),
        ("pro", {"epsilon": -0.1}, r"pro\.epsilon=-0\.1 must be positive"),
        ("adascale-a", {"low": 0.75}, r"adascale-a\.low=0\.75 must be in 1 … 99: a percentage"),
        ("adascale-l", {"low": 90.0}, r"adascale-l\.low=90 must not be above high=85"),
        ("adascale-l", {"fraction": 5.0}, r"adascale-l\.fraction=5 must be in 0 … 1, a fraction"),
        ("adascale-a", {"weight": 0.0}, r"adascale-a\.weight=0 must be positive"),
    ],
)
def test_settings_out_of_range(name, settings, sentence):
    with pytest.raises(DetectorError, match=sentence):
        detectors.get(name).fit([block(torch.rand(5, 4))], **settings)


# ---------------------------------------------------------------------------- adascale


def block(embedding, moved=None, head=HEAD):
    u = torch.as_tensor(embedding, dtype=torch.float32)
    moved = u if moved is None else torch.as_tensor(moved, dtype=torch.float32)
    logits = u @ head.weight.T + head.bias
    return Features(
        len(u), embedding=u, adascale_u=moved, head=head, logits=logits, made_with=USUAL
    )


def test_a_percentile_for_each_image_by_hand():
    u = torch.tensor([[1.0, 5, 2, 4], [0.0, 3, 0, 1]])
    moved = torch.tensor([[1.0, 3, 2, 9], [0.0, -3, 0, 1]])
    # The largest entry is the second one: it moves by 2 and by 6. The two largest become 3 + 9,
    # and 0 + 1.
    assert adascale.shift(u, moved, 25, 50, 10.0).tolist() == [32, 61]
    known = double([10, 20, 32, 40])
    p = adascale.percentile_of_each(double([32, 61, 5]), known, 50, 90)
    torch.testing.assert_close(p, double([60, 50, 90]))
    # At 50 % two of four entries are summed, at 75 % one.
    r = adascale.sum_over_largest_of_each(u.double(), double([50, 75]))
    torch.testing.assert_close(r, double([12 / 9, 4 / 3]))


def test_of_many_rows_some_stand_for_all():
    rows = torch.randperm(12_345, generator=torch.Generator().manual_seed(0)).double()
    few = adascale.order_statistics(rows, 500)
    assert len(few) == 500
    q = torch.linspace(-5, 12_350, 4001).double()
    shares = [
        torch.searchsorted(each, q, right=True) / len(each) for each in (rows.sort().values, few)
    ]
    assert (shares[0] - shares[1]).abs().max() <= 1 / 500
    assert torch.equal(adascale.order_statistics(rows, 20_000), rows.sort().values)


@pytest.mark.parametrize("name", ["adascale-a", "adascale-l"])
def test_with_one_percentile_it_is_scale_or_lts(name):
    rows = networks.recorded(12)
    detector = detectors.get(name).fit(rows, low=80.0, high=80.0)
    other = detectors.get({"adascale-a": "scale", "adascale-l": "lts"}[name])(p=80.0)
    torch.testing.assert_close(detector.score(rows), other.score(rows))


@pytest.mark.parametrize("name", ["adascale-a", "adascale-l"])
def test_an_image_that_moves_far_scores_higher(name):
    train = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) * 4
    head = LinearHead(torch.rand(3, 30), torch.zeros(3))
    detector = detectors.get(name).fit([block(train, train + 0.1, head)], low=60.0, high=95.0)
    u = train[:1].expand(5, 30)
    moved = u + torch.linspace(0, 4, 5)[:, None]
    scores = detector.score(block(u, moved, head))
    assert (scores.diff() >= -1e-5).all()
    assert scores[-1] > scores[0]


EDGES = {
    "zeros": torch.zeros(4),
    "one entry": torch.tensor([0.0, 3, 0, 0]),
    "equal entries": torch.full((4,), 2.0),
    "negative": torch.tensor([-1.0, -2, -3, -4]),
    "large": torch.tensor([1e4, 0, 1e4, 0]),
}


@pytest.mark.parametrize("name", ["adascale-a", "adascale-l"])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("weight", [torch.eye(2, 4), torch.ones(2, 4), torch.ones(6, 4)])
def test_edges_have_a_finite_score(name, edge, weight):
    """Also with equal rows of the head, and with more classes than entries."""
    head = LinearHead(weight, torch.linspace(-1, 1, len(weight)))
    train = torch.rand(20, 4)
    detector = detectors.get(name).fit([block(train, train / 2, head)])
    u = EDGES[edge][None]
    for moved in (u, u * 0, -u):
        assert torch.isfinite(detector.score(block(u, moved, head))).all()


@pytest.mark.parametrize("name", ["adascale-a", "adascale-l"])
def test_neither_the_order_of_channels_nor_of_classes_matters(name):
    train = torch.rand(20, 4), torch.rand(20, 4)
    test = torch.rand(9, 4), torch.rand(9, 4)
    channels, classes = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 0])
    head = LinearHead(HEAD.weight[classes][:, channels], HEAD.bias[classes])
    turned = [block(*(each[:, channels] for each in rows), head) for rows in (train, test)]
    kind = detectors.get(name)
    before = kind.fit([block(*train)]).score(block(*test))
    torch.testing.assert_close(kind.fit(turned[:1]).score(turned[1]), before, rtol=1e-6, atol=1e-6)


def test_a_uniform_embedding_has_the_largest_ratio():
    u = torch.ones(1, 40, dtype=torch.float64)
    torch.testing.assert_close(
        adascale.sum_over_largest_of_each(u, double([85])), shaping.sum_over_largest(u, 85)
    )
    assert adascale.sum_over_largest_of_each(u, double([99.0])).tolist() == [40]


def test_lts_of_one_row_by_hand():
    rows = block([[4.0, 3, 2, 1]], [[4.0, 3, 2, 1]])
    detector = detectors.get("adascale-l").fit(rows, low=25.0, high=75.0)
    # Its own Q' is the largest known: p = 25, three of four entries count, r = 10/9.
    torch.testing.assert_close(detector.score(rows), energy(rows.logits.double() * (10 / 9) ** 2))
