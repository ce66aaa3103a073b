"""The detectors on the head's geometry, class means, subspaces and stored rows: by hand, at edges,
and what must not matter."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from naive import array, labels_of
from scipy import stats

from oodcli import detectors
from oodcli.detectors import serial
from oodcli.detectors.blocks import drawn_blocks
from oodcli.detectors.cadref import confidence
from oodcli.detectors.corp import fourier_features, random_features
from oodcli.detectors.head_geometry import boundaries
from oodcli.detectors.knn import KNN
from oodcli.detectors.principal import leading_directions
from oodcli.detectors.rmds import pseudo_whitened
from oodcli.detectors.tied_gaussians import shortened
from oodcli.errors import DetectorError
from oodcli.features import Features, Layer, LinearHead

ON_HEAD = ("fdbd-norm", "fdbd", "ora", "nci", "caref", "cadref", "nac")
ON_MEANS = ("she", "ctm", "proto-fusion", "mds++", "gmm", "rmds", "rmds++")
ON_SPACES = ("residual", "neco", "cop", "corp", "pca-fused")
ON_ROWS = ("knn", "nnguide", "relation")
ALL = (*ON_HEAD, *ON_MEANS, *ON_SPACES, *ON_ROWS)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block(embedding, head, label=None, logits=None):
    """Rows of a head; the means of the only stage are the embedding."""
    found = embedding @ head.weight.T + head.bias if logits is None else logits
    stage = {"stage": Layer("stage", mean=embedding)}
    return Features(
        len(embedding), label, logits=found, embedding=embedding, head=head, layers=stage
    )


def rows(count=60, classes=4, width=5, seed=0, noise=0.5):
    """Rows around a mean for each class, which the head has as its weights: nearly all are
    classified as labelled."""
    weight = normal(classes, width, seed=100) * 2
    label = torch.arange(count) % classes
    embedding = (weight[label] + noise * normal(count, width, seed=seed)).relu() + 0.01
    return block(embedding, LinearHead(weight, normal(classes, seed=101) / 4), label)


@cache
def fitted(name):
    return detectors.get(name).fit(rows())


every = pytest.mark.parametrize("name", ALL)

# ---------------------------------------------------------------------------- by hand

HEAD = LinearHead(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]), torch.zeros(3))
"""z of u = (2, 1) is (6, 4, 0)."""
ONE = block(torch.tensor([[2.0, 1.0]]), HEAD)


def test_boundaries_by_hand():
    found = boundaries(ONE)
    assert found.predicted.tolist() == [0]
    assert found.gap.tolist() == [[0, 2, 6]]
    assert found.square.tolist() == [[math.inf, 25, 9]]
    twice = LinearHead(torch.cat([HEAD.weight, HEAD.weight[:1]]), torch.zeros(4))
    found = boundaries(block(ONE.embedding, twice))
    assert found.square.tolist() == [[math.inf, 25, 9, math.inf]]
    assert found.number.tolist() == [2]


def test_distances_to_boundaries_by_hand():
    mean_distance = (2 / 5 + 6 / 3) / 2
    score = detectors.get("fdbd-norm")().score(ONE)
    assert score.item() == pytest.approx(-mean_distance / math.sqrt(5))
    score = detectors.get("fdbd")(torch.tensor([2.0, 0.0]).double()).score(ONE)
    assert score.item() == pytest.approx(-mean_distance / 1)


def test_ora_by_hand():
    # Nearest points on the boundaries: u − 2/25 (3, −4) and u − 6/9 (3, 0), seen from (2, 0).
    feet = [(2 - 6 / 25 - 2, 1 + 8 / 25), (2 - 2 - 2, 1)]
    angles = [math.acos(y / math.hypot(x, y)) for x, y in feet]
    score = detectors.get("ora")(torch.tensor([2.0, 0.0]).double()).score(ONE)
    assert score.item() == pytest.approx(-max(angles) / math.pi)


def test_nci_by_hand():
    score = detectors.get("nci")(torch.tensor([-1.0, -3.0]).double(), 0.5).score(ONE)
    assert score.item() == pytest.approx(-(3 * 3) / 5 - 0.5 * 3)


def test_cadref_by_hand():
    mean = torch.tensor([[1.0, 3.0], [0.0, 0.0], [0.0, 0.0]]).double()
    assert detectors.get("caref")(mean).score(ONE).item() == pytest.approx((1 + 2) / 3)
    # u − μ = (1, −2), the signs of w are (+, 0): the second component speaks for neither.
    energy = math.log(1 + math.exp(6) + math.exp(4) + 1)
    of_two = detectors.get("cadref")(mean, torch.tensor(2.0).double(), "energy")
    assert of_two.score(ONE).item() == pytest.approx(1 / 3 / energy)
    turned = block(torch.tensor([[0.0, 1.0]]), HEAD)  # class 1 with μ = 0: 1 towards w
    assert of_two.score(turned).item() == pytest.approx(1 / math.log(1 + math.exp(4) + 2))


def test_nac_by_hand():
    # p of equal logits is 1/K, so the gradient is 0 and all states are ½: in bin 25 of 50.
    rows = block(torch.ones(4, 2), HEAD, logits=torch.zeros(4, 3))
    detector = detectors.get("nac").fit(rows)
    assert detector.coverage.nonzero().tolist() == [[0, 25], [1, 25]]
    assert detector.score(rows).tolist() == [-1.0] * 4
    assert detector.score(block(torch.ones(1, 2), HEAD)).item() > -1


def test_shortened():
    found = shortened(torch.tensor([[3.0, 4.0], [0.0, 0.0]]).double(), 0.5)
    assert found[0].norm().item() == pytest.approx(math.sqrt(5))
    assert found[1].tolist() == [0, 0]


def test_leading_directions_hold_a_share():
    covariance = torch.diag(torch.tensor([1.0, 6.0, 3.0]).double())
    assert [leading_directions(covariance, s).shape[1] for s in (0, 0.6, 0.61, 0.9, 1)] == [
        *(1, 1, 2, 2, 3)
    ]
    assert leading_directions(covariance, 0.6)[:, 0].abs().tolist() == [0, 1, 0]


# ---------------------------------------------------------------------------- settings


def test_nci_scaled():
    train = rows()
    alpha = detectors.get("nci").fit(train, alpha="scaled").alpha
    mean = array(train.embedding).mean(0)
    terms = []
    for z, u in zip(array(train.logits), array(train.embedding), strict=True):
        w, v = array(train.head.weight)[z.argmax()], u - mean
        terms.append((w @ v / np.linalg.norm(v), abs(u).sum()))
    first, second = np.std(terms, axis=0)
    assert alpha == pytest.approx(0.1 * first / second, rel=1e-6)


def test_cadref_by_other_confidences():
    z = torch.tensor([[0.0, math.log(3)], [-1e4, -2e4]])
    assert confidence(z, "msp").tolist() == pytest.approx([0.75, 1.0])
    assert confidence(z, "logit")[0].item() == pytest.approx(math.log(4), rel=1e-6)
    assert confidence(z, "energy")[0].item() == pytest.approx(math.log(5), rel=1e-6)
    assert (confidence(z, "energy") > 0).all()


def test_she_by_other_metrics():
    train, test = rows(), rows(9, seed=3)
    found = {m: detectors.get("she").fit(train, metric=m) for m in ("cosine", "distance")}
    pattern = found["cosine"].pattern[test.logits.argmax(1)]
    u = test.embedding.double()
    distance = (u - pattern).norm(dim=1)
    torch.testing.assert_close(found["distance"].score(test), distance)
    cosine = torch.nn.functional.cosine_similarity(u, pattern)
    torch.testing.assert_close(found["cosine"].score(test), -cosine)


def test_she_leaves_out_rows_that_are_classified_wrongly():
    train = rows()
    wrong = replace(train, label=(train.logits.argmax(1) + 1) % 4)
    with pytest.raises(DetectorError, match="no row fitted on is classified as it is labelled"):
        detectors.get("she").fit(wrong)
    both = [train, wrong.map_rows(lambda name, r: r if name == "label" else r * 9, 60)]
    expected = detectors.get("she").fit(train).pattern
    torch.testing.assert_close(detectors.get("she").fit(both).pattern, expected)


def test_ctm_of_the_predicted_class():
    train, test = rows(), rows(9, seed=3)
    detector = detectors.get("ctm").fit(train, compared="predicted")
    mean = detector.mean[test.logits.argmax(1)]
    expected = -torch.nn.functional.cosine_similarity(test.embedding.double(), mean)
    torch.testing.assert_close(detector.score(test), expected)
    assert (detectors.get("ctm").fit(train).score(test) <= expected + 1e-12).all()


def test_a_gaussian_for_each_class():
    train, test = (
        block(normal(len(r), 5, seed=1) + r.label[:, None], r.head, r.label)
        for r in (rows(200), rows(9))
    )
    found = detectors.get("gmm").fit(train)
    blocks = [train.select(slice(0, 90)), train.select(slice(90, 200))]
    full = detectors.get("gmm").fit(blocks, covariance="full").score(test)
    u, labels = array(train.embedding), labels_of(train)
    density = 0
    for c in range(4):
        mine = u[labels == c]
        law = stats.multivariate_normal(mine.mean(0), np.cov(mine.T, ddof=0))
        density += len(mine) / len(u) * law.pdf(array(test.embedding))
    np.testing.assert_allclose(full, -np.log(density), rtol=1e-6)
    assert not torch.allclose(full, found.score(test))


def test_a_gaussian_for_each_class_needs_rows_and_memory(caplog, monkeypatch):
    caplog.set_level("INFO")
    few = detectors.get("gmm").fit(rows(16), covariance="full").score(rows(9, seed=3))
    assert torch.isfinite(few).all()
    assert "the covariances of 4 of 4 classes are singular" in caplog.text
    monkeypatch.setattr("oodcli.detectors.gmm.BYTES", 700)
    with pytest.raises(DetectorError, match=r"4 times 5 x 5: use -p gmm\.covariance=tied"):
        detectors.get("gmm").fit(rows(), covariance="full")


def test_mds_without_classes():
    train, test = rows(), rows(9, seed=3)
    found = detectors.get("mds++").fit(train, classes="none").score(test)
    unit = torch.nn.functional.normalize
    u, v = unit(train.embedding.double()), unit(test.embedding.double())
    precision = torch.linalg.inv(torch.cov(u.T, correction=0))
    expected = torch.einsum("nd,de,ne->n", v - u.mean(0), precision, v - u.mean(0))
    torch.testing.assert_close(found, expected)
    same = detectors.get("mds").fit(train).score(test)
    torch.testing.assert_close(detectors.get("mds++").fit(train, normalize=0.0).score(test), same)


def test_rmds_leaves_out_directions_that_hardly_vary(caplog):
    caplog.set_level("INFO")
    values = torch.tensor([2.0, 1e-11, 0.5]).double()
    assert pseudo_whitened(torch.diag(values), "here").square().sum().item() == pytest.approx(2.5)
    assert "here: 1 of 3 directions hardly vary" in caplog.text


def test_knn_among_rows_predicted_alike():
    train, test = rows(), rows(9, seed=3)
    unit = torch.nn.functional.normalize
    u, v = unit(train.embedding.double()), unit(test.embedding.double())
    distance = torch.cdist(v, u)
    distance[test.logits.argmax(1)[:, None] != train.logits.argmax(1)] = math.inf
    nearest = distance.sort(1).values[:, :3]
    blocks = [train.select(slice(0, 7)), train.select(slice(7, 60))]
    found = detectors.get("knn").fit(blocks, k=3, among="predicted")
    torch.testing.assert_close(found.score(test), nearest[:, 2], rtol=1e-5, atol=1e-6)
    found = detectors.get("knn").fit(blocks, k=3, among="predicted", mean=True)
    torch.testing.assert_close(found.score(test), nearest.mean(1), rtol=1e-5, atol=1e-6)
    # With more neighbours than rows of the class, the farthest of these counts.
    last = torch.where(torch.isfinite(distance), distance, 0).amax(1)
    found = detectors.get("knn").fit(blocks, k=60, among="predicted").score(test)
    torch.testing.assert_close(found, last, rtol=1e-5, atol=1e-6)


def test_mean_distance_of_knn():
    train, test = rows(), rows(9, seed=3)
    each = [detectors.get("knn").fit(train, k=k).score(test) for k in (1, 2, 3)]
    found = detectors.get("knn").fit(train, k=3, mean=True).score(test)
    torch.testing.assert_close(found, torch.stack(each).mean(0), rtol=1e-5, atol=1e-6)


def test_a_knn_of_an_earlier_version():
    detector = detectors.get("knn").fit(rows(), k=3)
    state, settings = serial.state(detector), serial.settings(detector)
    again = serial.restore(KNN, {"bank": state["bank"]}, {"k": settings["k"]})
    assert torch.equal(again.score(rows(9)), detector.score(rows(9)))


def test_neco_of_given_dimensions_and_times_the_largest_logit():
    train, test = rows(), rows(9, seed=3)
    assert detectors.get("neco").fit(train, dim=2).basis.shape == (5, 2)
    whole = detectors.get("neco").fit(train, dim=5).score(test)
    torch.testing.assert_close(whole, -torch.ones(9).double())
    times = detectors.get("neco").fit(train, max_logit=True)
    assert times.score_needs == {"embedding", "logits", "logits.level"}
    expected = fitted("neco").score(test) * test.logits.double().amax(1)
    torch.testing.assert_close(times.score(test), expected)


@pytest.mark.parametrize("name", ["cop", "corp"])
def test_reconstruction_fused_with_the_energy(name):
    train, test = rows(), rows(9, seed=3)
    fused = detectors.get(name).fit(train, fused=True)
    energy = torch.logsumexp(torch.cat([test.logits, torch.zeros(9, 1)], 1).double(), 1)
    torch.testing.assert_close(fused.score(test), (fitted(name).score(test) - 1) * energy)
    assert {"logits", "logits.level"} <= fused.score_needs
    assert fitted(name).score_needs == {"embedding"}


def test_reconstruction_fused_with_react():
    """All of u is reconstructed where the space has all its directions."""
    train, test = rows(), rows(9, seed=3)
    whole = detectors.get("pca-fused").fit(train, share=1.0, c=0.3)
    logits = test.embedding.clamp_max(0.3) @ test.head.weight.T + test.head.bias
    energy = torch.logsumexp(torch.cat([logits, torch.zeros(9, 1)], 1).double(), 1)
    torch.testing.assert_close(whole.score(test), -energy, rtol=1e-5, atol=0)
    less = detectors.get("pca-fused").fit(train, share=0.5, c=0.3)
    assert less.basis.shape[1] < 5
    assert (less.score(test) > whole.score(test)).all()
    react = detectors.get("react").fit(train, percentile=70.0)
    assert detectors.get("pca-fused").fit(train, percentile=70.0).c == react.c


def test_random_features_approximate_a_gaussian_kernel():
    train = rows()
    u = torch.nn.functional.normalize(train.embedding[:8].double())
    drawn = random_features(5, 20_000, 2.0, torch.Generator().manual_seed(0))
    features = fourier_features(train.embedding[:8], *drawn)
    kernel = torch.exp(-2 * torch.cdist(u, u).square())
    torch.testing.assert_close(features @ features.T, kernel, rtol=0, atol=0.05)
    again = detectors.get("corp").fit(train, features=8, seed=1)
    assert not torch.equal(again.phase, detectors.get("corp").fit(train, features=8).phase)


def test_corp_fits_on_drawn_rows():
    train = rows()
    train.embedding[7] = torch.nan
    parts = [train.select(slice(0, 20)), train.select(slice(20, 60))]
    some = drawn_blocks(parts, {"embedding"}, "x", 30, 0)
    for _ in range(2):  # as often as wanted
        drawn = torch.cat([each.embedding for each in some])
        assert len(drawn) == 30
        assert torch.isfinite(drawn).all()
        assert len(drawn.unique(dim=0)) == 30
    found = detectors.get("corp").fit(parts, rows=30)
    expected = detectors.get("corp").fit(list(some))
    torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=0)
    assert not torch.equal(found.mean, detectors.get("corp").fit(parts).mean)
    assert drawn_blocks(parts, {"embedding"}, "x", 59, 0) is parts


def test_nnguide_stores_a_random_share(monkeypatch):
    monkeypatch.setattr("oodcli.detectors.nnguide.LEAST", 10)
    kind = detectors.get("nnguide")
    train = rows()
    found = kind.fit([train.select(slice(0, 7)), train.select(slice(7, 60))], share=0.5)
    (bank,), (other,) = found.bank.blocks(), kind.fit(train, share=0.5, seed=1).bank.blocks()
    assert bank.shape == (30, 5)
    assert not torch.equal(bank, other)
    assert torch.equal(bank, next(iter(kind.fit(train, share=0.5).bank.blocks())))
    assert kind.fit(train, share=0.01).bank.shape == (10, 5)


def test_relation_raises_to_a_power():
    train, test = rows(), rows(9, seed=3)
    found = detectors.get("relation").fit(train, power=2.0, least=0.0).score(test)
    unit = torch.nn.functional.normalize
    near = unit(test.embedding.double()) @ unit(train.embedding.double()).T
    alike = test.logits.double().softmax(1) @ train.logits.double().softmax(1).T
    expected = -(near.clamp_min(0) * alike).square().mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nci", {"alpha": -1.0}, r"nci\.alpha=-1 must be in 0 … 1e\+09"),
        ("mds++", {"normalize": 90.0}, r"mds\+\+\.normalize=90 must be in 0 … 1"),
        ("rmds", {"normalize": -0.5}, r"rmds\.normalize=-0\.5 must be in 0 … 1"),
        ("nnguide", {"share": 1.5}, r"nnguide\.share=1\.5 must be in 0 … 1, a fraction"),
        ("nnguide", {"share": 0.0}, "must be positive"),
        ("nnguide", {"k": 61}, r"nnguide\.k=61, but only 60 rows are stored"),
        ("relation", {"power": 0.0}, "must be positive"),
        ("relation", {"least": 2.0}, r"relation\.least=2 must be in 0 … 1"),
        ("nac", {"share": 5.0}, r"nac\.share=5 must be in 0 … 1, a fraction"),
        ("nac", {"bins": 0}, "must be positive"),
        ("cop", {"share": 90.0}, r"cop\.share=90 must be in 0 … 1, a fraction"),
        ("corp", {"gamma": 0.0}, "must be positive"),
        ("corp", {"rows": 0}, "must be positive"),
        ("pca-fused", {"share": 90.0}, r"pca-fused\.share=90 must be in 0 … 1, a fraction"),
        ("pca-fused", {"c": 0.0}, r"pca-fused\.c=0 must be positive"),
        ("pca-fused", {"percentile": 101.0}, r"pca-fused\.percentile=101 must be in 0 … 100"),
        ("neco", {"dim": 6}, r"neco\.dim=6 must be in 1 … 5"),
        ("residual", {"dim": 5}, r"residual\.dim=5 must be at least 1 and below 5"),
    ],
)
def test_settings_out_of_range(name, settings, message):
    with pytest.raises(DetectorError, match=message):
        detectors.get(name).fit(rows(), **settings)


# ---------------------------------------------------------------------------- edges


def edge(rows, case):
    """The rows with one thing that is unlike any other."""
    head, u = rows.head, rows.embedding
    mean = u.mean(0, keepdim=True)
    if case == "huge logits":
        signs = torch.tensor([1.0, -1.0]).repeat(len(u))[: len(u), None]
        return replace(rows, logits=rows.logits.sign() * 1e4 * signs)
    if case == "duplicate weights":
        head = LinearHead(head.weight[[0, 0, 2, 2]], head.bias[[0, 0, 2, 2]])
        return block(u, head, rows.label)
    if case == "equal weights":
        return block(u, LinearHead(torch.ones(4, 5), torch.zeros(4)), rows.label)
    changed = {
        "zero": torch.zeros_like(u),
        "mean": mean.expand_as(u),
        "one-hot": torch.eye(5)[torch.arange(len(u)) % 5],
        "all equal": torch.ones_like(u),
        "signed": u - mean,
        "tiny": u * 1e-30,
        "far": u * 1e6,
    }[case]
    return block(changed, head, rows.label)


CASES = ("zero", "mean", "one-hot", "all equal", "signed", "tiny", "far", "huge logits")
CASES = (*CASES, "duplicate weights", "equal weights")


@every
@pytest.mark.parametrize("case", CASES)
def test_edge_rows_have_finite_scores(name, case):
    """Also where all rows fitted on are such rows, unless that is refused."""
    strange = edge(rows(), case)
    scores = [fitted(name).score(strange)]
    try:
        scores.append(detectors.get(name).fit(strange).score(strange))
        scores.append(detectors.get(name).fit(strange).score(rows()))
    except DetectorError:
        pass
    for each in scores:
        assert torch.isfinite(each).all()


def test_the_mean_itself_is_the_most_ordinary_row_for_fdbd():
    middle = block(rows().embedding.mean(0, keepdim=True), rows().head)
    assert fitted("fdbd").score(middle).item() < fitted("fdbd").score(rows()).min().item()


@every
@pytest.mark.parametrize(("classes", "width"), [(2, 5), (7, 3)])
def test_two_classes_and_more_classes_than_channels(name, classes, width):
    train, test = rows(70, classes, width), rows(9, classes, width, seed=3)
    assert torch.isfinite(detectors.get(name).fit(train).score(test)).all()


@every
def test_a_class_without_rows_has_no_vote(name):
    """Not even where it is the predicted one."""
    train, test = rows(), rows(9, seed=3)
    logits = test.logits.clone()
    logits[:, 0] = 1e3
    some = train.select((train.label > 0) & (train.logits.argmax(1) > 0))
    assert torch.isfinite(detectors.get(name).fit(some).score(replace(test, logits=logits))).all()


# ---------------------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("name", [name for name in ALL if name != "corp"])
def test_the_order_of_channels_and_classes_does_not_matter(name):
    """But for random features, which are drawn channel by channel."""
    channels, classes = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 0, 3, 1])

    def turned(rows):
        head = LinearHead(rows.head.weight[classes][:, channels], rows.head.bias[classes])
        label = classes.argsort()[rows.label]
        return block(rows.embedding[:, channels], head, label, rows.logits[:, classes])

    train, test = rows(), rows(9, seed=3)
    found = detectors.get(name).fit(turned(train)).score(turned(test))
    torch.testing.assert_close(found, fitted(name).score(test), rtol=1e-8, atol=1e-10)


DIRECTION = ("mds++", "rmds++", "ctm", "proto-fusion", "cop", "corp", "knn")


@pytest.mark.parametrize("name", DIRECTION)
def test_the_length_of_the_embedding_does_not_matter(name):
    test = rows(9, seed=3)
    longer = block(test.embedding * 8, test.head, logits=test.logits)
    torch.testing.assert_close(fitted(name).score(longer), fitted(name).score(test))


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("nac", "residual", "neco", "ora")])
def test_rows_between_the_classes_score_higher(name):
    """Far from each mean, with flat logits."""
    train, test = rows(noise=0.1), rows(12, seed=3, noise=0.1)
    other = block(test.embedding.flip(1) / 3, test.head)
    detector = detectors.get(name).fit(train)
    assert detector.score(other).median() > detector.score(test).median()
