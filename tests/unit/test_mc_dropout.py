"""Passes with dropout: one mask for all images, and what the detector makes of them."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import h5py
import networks
import pytest
import torch
import torch.nn.functional as F
from commands import oodcli
from torch import nn

from oodcli import detectors
from oodcli.detectors.mc_dropout import disagreement
from oodcli.errors import DetectorError
from oodcli.features import DropoutPasses, Features
from oodcli.networks.thinned import Thinned
from oodcli.recording.recorder import Recorder, recordable

LOGITS = frozenset({"dropout.logits"})


def recorded(network, count=9, passes=3, seed=0, precision="float32", **changed):
    classifier = networks.classifier(network)
    how = {"dropout": DropoutPasses(passes, seed)}
    recorder = Recorder(replace(classifier, **changed), LOGITS, made_with=how, precision=precision)
    return recorder(networks.images(count)).dropout_logits.view(count, passes, -1)


def by_hand(network, images, number, seed=0):
    """A pass in which each layer has the mask that its name says."""
    thinned = Thinned(network, DropoutPasses(seed=seed))

    def mask(name, shape):
        return thinned.mask(number, name, 1, torch.zeros(1, *shape))

    x = F.relu(network.bn(network.conv1(images))) * mask("channels", (8, 8, 8))
    x = F.relu(network.conv2(x * mask("numbers", (8, 8, 8)))).mean((2, 3))
    return network.classifier[2](x * mask("classifier.1", (6,)))


def test_each_pass_has_its_masks():
    network = networks.settled(networks.Dropping())
    found = recorded(network)
    with torch.no_grad():
        for number in range(3):
            expected = by_hand(network, networks.images(9), number)
            torch.testing.assert_close(found[:, number], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[:, 0], found[:, 1])
    assert not torch.allclose(found, recorded(network, seed=1))


def test_a_mask_drops_a_share_and_keeps_the_mean():
    layers = nn.ModuleDict(
        {"one": nn.Dropout(0.3), "by_channel": nn.Dropout2d(0.3), "all": nn.Dropout(1.0)}
    )
    thinned = Thinned(layers, DropoutPasses())
    rows = torch.ones(1, 4000, 3, 2)
    mask = thinned.mask(0, "one", 1, rows)
    assert mask.shape == rows.shape[1:]
    assert sorted(mask.unique().tolist()) == pytest.approx([0, 1 / 0.7])
    assert mask.mean().item() == pytest.approx(1, abs=0.02)
    channels = thinned.mask(0, "by_channel", 1, rows)
    assert channels.shape == (4000, 1, 1)
    assert channels.mean().item() == pytest.approx(1, abs=0.04)
    assert (thinned.mask(0, "all", 1, rows) == 0).all()
    assert torch.equal(mask, Thinned(layers, DropoutPasses()).mask(0, "one", 1, rows))
    for other in (thinned.mask(1, "one", 1, rows), thinned.mask(0, "one", 2, rows)):
        assert not torch.equal(mask, other)


@pytest.mark.parametrize("size", [1, 7, 9])
@pytest.mark.parametrize("head_only", [False, True])
def test_neither_batches_nor_order_change_an_image(size, head_only):
    network = networks.Dropping(0, 0) if head_only else networks.Dropping()
    recorder = Recorder(networks.classifier(network), LOGITS)
    images = networks.images(9)
    whole = recorder(images).dropout_logits
    parts = torch.cat([recorder(part).dropout_logits for part in images.split(size)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    again = recorder(images.flip(0)).dropout_logits.flip(0)
    torch.testing.assert_close(again, whole, rtol=1e-5, atol=1e-6)


def test_the_rest_of_the_network_stays_as_it_is():
    """BatchNorm has its running statistics, functional dropout is off, and no hook is left."""
    classifier = networks.classifier(networks.Dropping(1e-12, 1e-12, 1e-12))
    network = classifier.network
    before = {key: value.clone() for key, value in network.state_dict().items()}
    recorder = Recorder(classifier, LOGITS | {"logits", "embedding"})
    seen = recorder(networks.images(5))
    plain = seen.logits[:, None].expand(-1, 5, -1)
    torch.testing.assert_close(seen.dropout_logits.view(5, 5, -1), plain, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not network.training
    assert not any(each._forward_hooks for each in recorder.classifier.network.modules())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_dropout_before_the_head_alone_needs_no_further_pass(precision):
    classifier = networks.classifier(networks.Dropping(0, 0))
    assert (classifier.dropouts, classifier.drops_embedding) == (("classifier.1",), True)
    recorder = Recorder(classifier, LOGITS)
    assert recorder.passes == (1, 0)
    assert recorder(networks.images(2)).embedding is None
    found = recorded(networks.Dropping(0, 0), precision=precision)
    full = recorded(networks.Dropping(0, 0), precision=precision, drops_embedding=False)
    torch.testing.assert_close(found, full, rtol=1e-5, atol=1e-5)
    everywhere = networks.classifier(networks.Dropping())
    assert not everywhere.drops_embedding
    assert Recorder(everywhere, LOGITS).passes == (6, 0)


class Convolution(nn.Module):
    """Dropout before a head that is a convolution, as in SqueezeNet."""

    def __init__(self):
        super().__init__()
        self.conv, self.drop, self.last = nn.Conv2d(3, 5, 3), nn.Dropout(), nn.Conv2d(5, 3, 1)

    def forward(self, x):
        return self.last(self.drop(F.relu(self.conv(x)))).mean((2, 3))


def test_a_head_that_is_a_convolution():
    network = networks.settled(Convolution())
    assert not networks.classifier(network).drops_embedding
    mask = Thinned(network, DropoutPasses()).mask(1, "drop", 1, torch.zeros(1, 5, 6, 6))
    with torch.no_grad():
        expected = network.last(F.relu(network.conv(networks.images(9))) * mask).mean((2, 3))
    torch.testing.assert_close(recorded(network)[:, 1], expected, rtol=1e-4, atol=1e-5)


class Functional(networks.Plain):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


@pytest.mark.parametrize("network", [networks.Dropping(0, 0, 0), networks.Plain(), Functional()])
def test_a_network_without_dropout_layers(network):
    classifier = networks.classifier(network)
    assert "dropout.logits" not in recordable(classifier)
    with pytest.raises(DetectorError, match=r"it has no dropout layer \(nn\.Dropout with p > 0\)"):
        Recorder(classifier, LOGITS)


class Turned(nn.Module):
    """Dropout whose input has the positions first."""

    def __init__(self):
        super().__init__()
        self.conv, self.drop, self.fc = nn.Conv2d(3, 5, 3), nn.Dropout(), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(self.drop(self.conv(x).flatten(2).permute(2, 0, 1)).mean(0))


def test_images_that_are_not_in_the_first_dimension():
    with pytest.raises(DetectorError, match=r"drop gets \(36, 7, 5\) for 7 images, expected the"):
        recorded(Turned(), count=7)


def test_measures_by_hand():
    halves, sure = math.log(0.5), math.log(0.9)
    z = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[0.0, sure - math.log(0.1)], [0.0, 0.0]]])
    entropy = [math.log(2), -0.3 * math.log(0.3) - 0.7 * math.log(0.7)]
    assert disagreement(z, "entropy").tolist() == pytest.approx(entropy)
    assert disagreement(z, "variance").tolist() == pytest.approx([0, 2 * 0.2**2])
    within = (-halves - 0.9 * sure - 0.1 * math.log(0.1)) / 2
    information = disagreement(z, "information").tolist()
    assert information == pytest.approx([0, entropy[1] - within], abs=1e-7)
    sure = torch.tensor([[[1e4, -1e4], [1e4, -1e4]], [[1e4, -1e4], [-1e4, 1e4]]])
    for measure, scores in (
        ("entropy", [0, math.log(2)]),
        ("variance", [0, 0.5]),
        ("information", [0, math.log(2)]),
    ):
        assert disagreement(sure, measure).tolist() == pytest.approx(scores, abs=1e-12)


def test_settings():
    kind = detectors.get("mc-dropout")
    with pytest.raises(DetectorError, match=r"mc-dropout\.passes=0 must be positive"):
        kind(passes=0)
    with pytest.raises(DetectorError, match=r"measure=variance compares passes: give .*passes=2"):
        kind(passes=1, measure="variance")
    rows = Features(2, dropout_logits=torch.zeros(2, 6), made_with={"dropout": DropoutPasses(3, 0)})
    assert kind(passes=3).score(rows).tolist() == pytest.approx([math.log(2)] * 2)
    more = torch.arange(12.0).view(2, 6).square()
    few = replace(rows, dropout_logits=more[:, :4], made_with={"dropout": DropoutPasses(2, 0)})
    rows = replace(rows, dropout_logits=more)
    assert torch.equal(kind(passes=2).score(rows), kind(passes=2).score(few))
    with pytest.raises(DetectorError, match=r"wants passes=5, seed=0, but .* passes=3, seed=0"):
        kind().score(rows)


def columns(path):
    with path.open(encoding="utf-8", newline="") as stream:
        return [float(row["mc-dropout"]) for row in csv.DictReader(stream)]


def test_on_the_command_line(tmp_path):
    """The passes are set where they are recorded, by score and by extract alike."""
    model = ("--input-size", 8, "--mean", "0,0,0", "--std", "1,1,1")
    for name, settings in (("net", ""), ("plain", "0, 0, 0")):
        code = f"from networks import Dropping\n\ndef make():\n    return Dropping({settings})\n"
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        torch.save(networks.settled(networks.Dropping()).state_dict(), tmp_path / f"{name}.pt")

    def run(command, *words, name="net"):
        arch = ("--arch", f"{tmp_path / name}.py:make", *model)
        images = (tmp_path / f"{name}.pt", "noise:uniform?n=6", *arch)
        return oodcli(command, *images, *words)

    three = ("-p", "mc-dropout.passes=3")
    whole, parts, cache = (tmp_path / name for name in ("w.csv", "p.csv", "c.h5"))
    assert run("score", "-d", "mc-dropout", *three, "-o", whole).status == 0
    assert run("score", "-d", "mc-dropout", *three, "--batch-size", 1, "-o", parts).status == 0
    assert columns(parts) == pytest.approx(columns(whole), rel=1e-4)
    assert run("extract", "--for", "mc-dropout", *three, "-o", cache).status == 0
    assert oodcli("score", cache, "-d", "mc-dropout", *three, "-o", parts, "--force").status == 0
    assert columns(parts) == pytest.approx(columns(whole), rel=1e-6)
    refused = oodcli("score", cache, "-d", "mc-dropout", "-o", parts, "--force")
    assert "mc-dropout wants passes=5, seed=0, but these rows were recorded with" in refused.err
    assert columns(parts) == pytest.approx(columns(whole), rel=1e-6)
    with h5py.File(cache, "r+") as file:
        file["dropout"].attrs["passes"] = 2
    damaged = oodcli("score", cache, "-d", "mc-dropout", *three, "-o", parts, "--force")
    assert "/dropout/logits is 12 wide, expected 8" in damaged.err
    none = run("score", "-d", "mc-dropout", name="plain")
    assert none.err.splitlines()[-1] == (
        f"oodcli: mc-dropout: {tmp_path}/plain.py:make cannot give dropout.logits: it has no "
        "dropout layer (nn.Dropout with p > 0)"
    )
    assert none.status != 0
