"""The feature-space detectors: their settings against naive versions, and their edges."""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import replace

import networks
import numpy as np
import pytest
import torch
from naive import NAIVE, Fit, mds_sum, nearest_mahalanobis

from oodcli import detectors
from oodcli.detectors import bank, gram, knn, one_dimensional, vim
from oodcli.detectors.tied_gaussians import mahalanobis as squared_distance
from oodcli.errors import DetectorError, FileError
from oodcli.features import Features, Layer, LinearHead
from oodcli.files.artefact import Artefact, read_artefact, write_artefact
from oodcli.recording.recorder import Recorder
from oodcli.stages.chosen import Chosen, placed

LABELS = torch.arange(60) % 3


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(count=60, seed=0, width=7, shift=0.0):
    """Three clusters in the embedding and in two stages; a head of four classes."""
    labels = LABELS.repeat(math.ceil(count / 60))[:count]
    head = LinearHead(normal(4, width, seed=1), normal(4, seed=2))
    embedding = normal(count, width, seed=seed) + 2 * normal(3, width, seed=3)[labels] + shift
    layers = {
        "bn": Layer("batchnorm", normal(count, 2, seed=seed + 9)),
        "one": Layer("stage", embedding[:, :3] * 2 + shift),
        "two": Layer("stage", embedding[:, 2:6].square()),
    }
    return Features(
        count,
        label=labels,
        logits=embedding @ head.weight.T + head.bias,
        embedding=embedding,
        layers=layers,
        head=head,
    )


TRAIN, TEST = rows(), rows(21, seed=5, shift=0.5)
BLOCKS = [TRAIN.select(slice(start, start + 13)) for start in range(0, 60, 13)]


def fit(name, train=TRAIN, **hyperparameters):
    return detectors.get(name).fit(train, **hyperparameters)


def double(numbers):
    return torch.tensor(np.asarray(numbers), dtype=torch.float64)


# ---------------------------------------------------------------------------- mds, mds-sum


def naive_mds(train, labels, test):
    return double(nearest_mahalanobis(train.double().numpy(), labels, test.double().numpy()))


def test_mds_against_naive():
    found = fit("mds", BLOCKS).score(TEST)
    torch.testing.assert_close(found, naive_mds(TRAIN.embedding, LABELS.numpy(), TEST.embedding))
    at_two = fit("mds", layer="two")
    assert at_two.score_needs == {"layers.mean"}
    mean = TRAIN.layers["two"].mean
    expected = naive_mds(mean, LABELS.numpy(), TEST.layers["two"].mean)
    torch.testing.assert_close(at_two.score(replace(TEST, embedding=None)), expected)


def test_mds_by_hand():
    # Means (0, 0) and (4, 0), one covariance for both.
    points = [(-1, -1), (-1, 0), (1, 0), (1, 1), (3, -1), (3, 0), (5, 0), (5, 1)]
    train = Features(
        8,
        label=torch.tensor([0] * 4 + [1] * 4),
        logits=torch.zeros(8, 2),
        embedding=torch.tensor(points).float(),
    )
    covariance = np.array([[1.0, 0.5], [0.5, 0.5]])
    x = np.array([2.0, 3.0])
    expected = min(
        x @ np.linalg.inv(covariance) @ x, (x - [4, 0]) @ np.linalg.inv(covariance) @ (x - [4, 0])
    )
    test = Features(1, embedding=torch.tensor([[2.0, 3.0]]))
    assert fit("mds", train).score(test).item() == pytest.approx(expected)


def test_mds_takes_the_predicted_class_where_no_label_is_known():
    unknown = replace(TRAIN, label=torch.full((60,), -1))
    expected = fit("mds", replace(TRAIN, label=TRAIN.logits.argmax(1))).score(TEST)
    torch.testing.assert_close(fit("mds", unknown).score(TEST), expected)


def test_a_dead_channel_that_wakes_up(caplog):
    dead = TRAIN.embedding.clone()
    dead[:, 2] = 0
    train = replace(TRAIN, embedding=dead)
    with caplog.at_level(logging.INFO, "oodcli"):
        detector = fit("mds", train)
    # Where the processor adds in another order, rounding leaves a tiny eigenvalue.
    assert re.search(r"1 of 7 directions, condition (inf|[0-9.]+e\+1[0-9])", caplog.text)
    asleep = TEST.embedding.clone()
    asleep[:, 2] = 0
    awake = asleep.clone()
    awake[:, 2] = 0.1
    quiet = detector.score(replace(TEST, embedding=asleep))
    loud = detector.score(replace(TEST, embedding=awake))
    # The ridge is 1e-6 of the mean variance, which is about 1.
    assert ((loud - quiet) > 1e3).all()
    # As without the channel, up to the ridge.
    others = [0, 1, 3, 4, 5, 6]
    without = naive_mds(dead[:, others], LABELS.numpy(), asleep[:, others])
    torch.testing.assert_close(quiet, without, rtol=1e-4, atol=0)


def test_a_covariance_that_is_regular_gets_no_ridge(caplog):
    with caplog.at_level(logging.INFO, "oodcli"):
        fit("mds")
        fit("mds-sum")
    assert not caplog.text


def test_mds_refuses_a_layer_that_is_not_there():
    with pytest.raises(DetectorError, match=r"no layer 'three' was recorded: .* embedding, bn, on"):
        fit("mds", layer="three")
    detector = fit("mds", layer="one")
    with pytest.raises(DetectorError, match=r"mds needs layers\.mean"):
        detector.score(replace(TEST, layers={}))


def test_mds_sum():
    found = fit("mds-sum", BLOCKS)
    assert found.layers == ("one", "two")
    both = sum(
        naive_mds(TRAIN.layers[name].mean, LABELS.numpy(), TEST.layers[name].mean)
        for name in ("one", "two")
    )
    torch.testing.assert_close(found.score(TEST), both)
    # A stage's name alone, as a regular expression.
    only = fit("mds-sum", layers="tw.")
    torch.testing.assert_close(only.score(TEST), fit("mds", layer="two").score(TEST))
    names, terms = found.contributions(TEST)
    assert list(names) == ["one", "two"]
    torch.testing.assert_close(terms.sum(1), found.score(TEST))


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ("blocks", "no layer for 'blocks'"),
        ("x", "recorded are bn, one, two"),
        ("(", "not a regular"),
    ],
)
def test_layers_that_are_not_there(layers, sentence):
    with pytest.raises(DetectorError, match=sentence):
        fit("mds-sum", layers=layers)


def test_learnt_layer_weights(caplog):
    ood = rows(40, seed=8, shift=3.0)
    with caplog.at_level(logging.INFO, "oodcli"):
        detector = fit("mds-sum", BLOCKS, ood=[ood], C=2.0)
    assert "weights learnt from 40 OOD rows: one " in caplog.text
    expected = mds_sum(TEST, Fit(TRAIN, ood=ood), strength=2.0)
    torch.testing.assert_close(detector.score(TEST), double(expected), rtol=1e-4, atol=0)
    assert not torch.allclose(detector.weight, torch.ones(2).double())
    # Rows that are nearer to the classes than the rows fitted on teach nothing.
    means = TRAIN.map_rows(
        lambda name, r: (
            r if name == "label" else torch.stack([r[c == LABELS].mean(0) for c in LABELS])
        ),
        60,
    )
    with pytest.raises(DetectorError, match="nearer to the classes"):
        fit("mds-sum", ood=means)


# ---------------------------------------------------------------------------- knn


@pytest.mark.parametrize("k", [1, 5, 60])
def test_knn_against_naive(k, monkeypatch):
    expected = double(NAIVE["knn"](TEST, Fit(TRAIN), k=k))
    detector = fit("knn", BLOCKS, k=k)
    torch.testing.assert_close(detector.score(TEST), expected, rtol=1e-5, atol=0)
    # Whatever the size of the blocks of the bank.
    whole = detector.score(TEST)
    monkeypatch.setattr(knn, "PAIRS", 3 * len(TEST))
    torch.testing.assert_close(detector.score(TEST), whole, rtol=1e-12, atol=0)


def test_knn_of_a_row_that_was_fitted_on():
    # Its nearest is itself: 0 up to the rounding of the bank, never NaN.
    assert fit("knn", k=1).score(TRAIN).amax() < 1e-3


def test_the_number_of_neighbours(caplog):
    assert fit("knn", rows(400)).k == 50  # 100 a class
    with caplog.at_level(logging.INFO, "oodcli"):
        assert fit("knn").k == 7
    assert "k = 7, half of the 15 rows a class that were fitted on, not 50" in caplog.text
    with pytest.raises(DetectorError, match=r"k=61, but there are only 60 rows"):
        fit("knn", k=61)
    with pytest.raises(DetectorError, match=r"k=0 must be positive"):
        fit("knn", k=0)


def test_a_large_bank_stays_in_its_file(tmp_path, monkeypatch):
    expected = fit("knn").score(TEST)
    monkeypatch.setattr(bank, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr("oodcli.files.artefact.BLOCK_BYTES", 4 * 7 * 8)
    read = []

    class Watched(list):
        def __iter__(self):
            read.append(len(self))
            return super().__iter__()

    detector = fit("knn", Watched(BLOCKS))
    passes = len(read)
    torch.testing.assert_close(detector.score(TEST), expected, rtol=1e-12, atol=0)
    assert len(read) == passes + 1  # nothing is kept
    path = tmp_path / "knn.safetensors"
    write_artefact(Artefact(detector, "abc", {}), path)
    again = read_artefact(path).detector
    assert [len(part) for part in again.bank.blocks()] == [8] * 7 + [4]
    torch.testing.assert_close(again.score(TEST), expected, rtol=1e-12, atol=0)
    # What is read back can be written again.
    write_artefact(Artefact(again, "abc", {}), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        assert (file.tell() + header["bank"]["data_offsets"][0]) % 4 == 0
    fewer = replace(detector, bank=bank.Bank((61, 7), detector.bank.blocks))
    with pytest.raises(FileError, match="rows fitted on have changed"):
        write_artefact(Artefact(fewer, "abc", {}), path)


def test_heavy_detectors_go_to_the_gpu():
    chosen = [Chosen(fit("knn")), Chosen(detectors.get("msp")()), Chosen(fit("react"))]
    assert placed(chosen, "cpu") == chosen
    there = placed(chosen, "meta")
    assert [each.device and each.device.type for each in there] == ["meta", None, None]
    assert all(block.is_meta for block in there[0].detector.bank.blocks())
    assert there[1:] == chosen[1:]


# ---------------------------------------------------------------------------- vim


@pytest.mark.parametrize("dim", [None, 1, 6])
def test_vim_against_naive(dim):
    expected = NAIVE["vim"](TEST, Fit(TRAIN), dim=dim)
    torch.testing.assert_close(fit("vim", BLOCKS, dim=dim).score(TEST), double(expected))


@pytest.mark.parametrize("dim", [0, -1, 7, 8])
def test_vim_refuses_a_space_without_residual(dim):
    with pytest.raises(DetectorError, match=rf"vim\.dim={dim} must be at least 1 and below 7"):
        fit("vim", dim=dim)


def test_vim_refuses_rows_without_residual():
    # Two directions only: nothing is left after the first three.
    flat = TRAIN.embedding.clone()
    flat[:, 2:] = 0
    head = replace(TRAIN.head, bias=torch.zeros(4))
    with pytest.raises(DetectorError, match="no row fitted on leaves the space of its first 3"):
        fit("vim", replace(TRAIN, embedding=flat, head=head))


def test_the_principal_space_of_wide_embeddings():
    assert vim.default_dim(64) == 32
    assert vim.default_dim(1500) == 750
    assert vim.default_dim(2048) == 1000


# ---------------------------------------------------------------------------- gram


def naive_gram_sums(activation):
    """Sastry & Oore's code, one image and order at a time, with the C×C matrices."""
    found = []
    for image in activation.double():
        flat = image.flatten(1)
        sums = []
        for order in range(1, 11):
            power = flat**order
            matrix = power @ power.T
            total = matrix.sum(1)
            sums.append(total.sign() * total.abs() ** (1 / order))
        found.append(torch.cat(sums))
    return torch.stack(found)


def test_gram_sums():
    activation = normal(3, 4, 5, 5) * 7
    found = gram.gram_sums(activation)
    torch.testing.assert_close(found.double(), naive_gram_sums(activation), rtol=1e-5, atol=1e-6)
    assert found.shape == (3, 40)
    # By hand: F = (1, 2), (3, 4); order 2: F² = (1, 4), (9, 16); G = [[17, 73], [73, 337]].
    by_hand = gram.gram_sums(torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]]))
    assert by_hand[0, :4].tolist() == pytest.approx([16, 36, math.sqrt(90), math.sqrt(410)])
    # 1e15 to the twentieth is beyond float64.
    huge = gram.gram_sums(activation * 1e15)
    torch.testing.assert_close(huge, found * 1e30, rtol=1e-5, atol=0)
    assert (gram.gram_sums(torch.zeros(2, 3, 4, 4)) == 0).all()
    flat = normal(2, 6)
    assert torch.equal(gram.gram_sums(flat), gram.gram_sums(flat[:, :, None, None]))


def test_gram_sums_are_recorded_at_the_stages():
    network = networks.classifier(networks.Residual())
    images = networks.images(4)
    seen = Recorder(network, frozenset({"logits", "layers.gram"}))(images)
    kept = {}
    for name in ("layer1", "layer2"):
        module = network.network.get_submodule(name)
        module.register_forward_hook(lambda _, __, out, name=name: kept.update({name: out}))
    with torch.inference_mode():
        network.network(images)
    stages = {name: layer.gram for name, layer in seen.layers.items() if layer.gram is not None}
    assert stages.keys() == kept.keys()
    for name, activation in kept.items():
        torch.testing.assert_close(
            stages[name].double(), naive_gram_sums(activation), rtol=1e-4, atol=1e-4
        )
    plain = networks.classifier(networks.Plain())
    with pytest.raises(DetectorError, match=r"cannot give layers\.gram"):
        Recorder(plain, frozenset({"layers.gram"}))


def gram_rows(count, seed):
    base = rows(count, seed)
    layers = {
        "one": Layer("stage", gram=normal(count, 5, seed=seed).double().exp().float()),
        "two": Layer("stage", gram=normal(count, 3, seed=seed + 1) * 10),
    }
    return replace(base, layers=layers)


def test_gram_against_naive():
    train, test = gram_rows(40, 0), gram_rows(15, 4)
    expected = double(NAIVE["gram"](test, Fit(train)))
    blocks = [train.select(slice(start, start + 9)) for start in range(0, 40, 9)]
    torch.testing.assert_close(fit("gram", blocks).score(test), expected, rtol=1e-5, atol=0)
    assert (expected > 0).any()
    # Rows within the bounds of their class do not deviate: those fitted on.
    assert (fit("gram", blocks).score(train) == 0).all()


def test_gram_needs_two_rows_of_a_class():
    with pytest.raises(DetectorError, match="no class has two rows"):
        fit("gram", gram_rows(1, 0))


# ---------------------------------------------------------------------------- 1d


@pytest.mark.parametrize(("budget", "narrow"), [(1 << 30, 64), (1, 64), (1 << 30, 1)])
def test_1d_against_naive(budget, narrow, monkeypatch):
    monkeypatch.setattr(one_dimensional, "BYTES", budget)  # one class a pass
    monkeypatch.setattr(one_dimensional, "NARROW", narrow)
    expected = NAIVE["1d"](TEST, Fit(TRAIN))
    torch.testing.assert_close(fit("1d", BLOCKS).score(TEST), double(expected))


def test_the_first_eigenvector_of_a_wide_matrix():
    rows = normal(200, 80).double()
    square = rows.T @ rows
    found = one_dimensional.first_eigenvector(square)
    expected = torch.linalg.eigh(square).eigenvectors[:, -1]
    torch.testing.assert_close(found * (found @ expected).sign(), expected, rtol=0, atol=1e-12)
    assert torch.equal(found, one_dimensional.first_eigenvector(square))
    nothing = one_dimensional.first_eigenvector(torch.zeros(80, 80).double())
    assert float(nothing.norm()) == pytest.approx(1)


def test_1d_by_hand():
    direction = double([[1.0, 0.0], [0.0, 1.0]])
    angles = one_dimensional.smallest_angle(
        torch.tensor([[2.0, 0.0], [-3.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, math.sqrt(3)]]),
        direction,
    )
    expected = double([0, 0, math.pi / 4, math.pi / 2, math.pi / 6])
    torch.testing.assert_close(angles, expected, rtol=1e-6, atol=1e-7)


def test_mahalanobis_of_a_row_on_a_mean():
    mean = normal(3, 4).double() * 100
    assert squared_distance(mean, mean, torch.eye(4).double()).abs().amax() < 1e-9
