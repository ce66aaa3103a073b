"""Heads that were trained to tell what is out of distribution: recognised, recorded, scored."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import h5py
import networks
import pytest
import torch
from commands import oodcli
from networks import PREFIXES, deconf_state, deconf_tensors, normal, randomised
from torch import nn

from oodcli import detectors
from oodcli.errors import CheckpointError, DetectorError
from oodcli.features import Features, Rows
from oodcli.files.cache import CacheWriter, open_cache
from oodcli.files.hdf5 import writing
from oodcli.networks import heads
from oodcli.networks.architectures import build
from oodcli.networks.assemble import assemble
from oodcli.networks.card import Overrides, write_card
from oodcli.networks.load import load_classifier
from oodcli.recording.recorder import Recorder, recordable
from oodcli.stages.record import provenance

NAME = "resnet20-cifar"
CLASSES = 10
SIZES = (4, 3, 3)


@pytest.fixture(scope="module")
def images():
    return normal(3, 3, 32, 32, seed=5)


@pytest.fixture(scope="module")
def backbone():
    """A network whose last layer gives its input back: what a DeConf head is put on."""
    network = randomised(build(NAME, CLASSES))
    network.linear = nn.Identity()
    return network


def naive_deconf(u, form):
    """h and h/g, one image and class at a time."""
    t = deconf_tensors(form)
    h, logits = [], []
    for x in u.double():
        row = []
        for i, w in enumerate(t["h.h.weight"].double()):
            if form == "inner":
                row.append(float(x @ w + t["h.h.bias"][i]))
            elif form == "euclid":
                row.append(-sum((float(a) - float(b)) ** 2 for a, b in zip(x, w, strict=True)) / 64)
            else:
                row.append(float(x @ w / ((x.norm() + 1e-4) * (w.norm() + 1e-4))))
        z = float(x @ t["g.0.weight"][0].double()) + 0.3
        z = (z - 0.4) / math.sqrt(2.0 + 1e-5) * 1.5 - 0.2
        h.append(row)
        logits.append([value * (1 + math.exp(-z)) for value in row])
    return torch.tensor(h), torch.tensor(logits)


def saved(tmp_path, content, name="net.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def load(path, arch=None, **settings):
    return load_classifier(path, Overrides(arch=arch, **settings))


def see(classifier, images):
    return Recorder(classifier, recordable(classifier))(images)


def fails(path, *words, arch=None, **settings):
    with pytest.raises(CheckpointError) as error:
        load(path, arch, **settings)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


# ---------------------------------------------------------------------------- DeConf


@pytest.mark.parametrize("form", ["cosine", "euclid", "inner"])
def test_deconf_against_loops(form, backbone, images, tmp_path):
    path = saved(tmp_path, deconf_state(backbone, form))
    found = load(path, f"{NAME}+deconf-{form}")
    assert (found.arch, found.num_classes) == (f"{NAME}+deconf-{form}", CLASSES)
    assert not any("DeConf" in note for note in found.assumptions)
    seen = see(found, images)
    with torch.no_grad():
        u = backbone(images)
    h, logits = naive_deconf(u, form)
    torch.testing.assert_close(seen.embedding, u)
    torch.testing.assert_close(seen.deconf_h, h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.logits, logits, rtol=1e-4, atol=1e-5)
    scores = detectors.get("godin")().score(seen)
    torch.testing.assert_close(scores.float(), -h.max(1).values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", ["cosine", "inner"])
def test_deconf_is_recognised(form, prefix, backbone, images, tmp_path):
    state = deconf_state(backbone, form, prefix)
    found = load(saved(tmp_path, {"state_dict": state, "epoch": 3}))
    assert (found.arch, found.num_classes) == (f"{NAME}+deconf-{form}", CLASSES)
    (note,) = [note for note in found.assumptions if "DeConf" in note]
    assert ("without a bias" in note) == (form == "cosine")
    assert (f"--arch {NAME}+deconf-euclid" in note) == (form == "cosine")
    with torch.no_grad():
        expected = naive_deconf(backbone(images), form)[0]
    torch.testing.assert_close(see(found, images).deconf_h, expected, rtol=1e-4, atol=1e-5)


def test_deconf_beside_a_last_layer_that_is_not_used(backbone, images, tmp_path):
    state = deconf_state(backbone, "cosine", "backbone.")
    plain = load(saved(tmp_path, state))
    for name in ("fc", "linear"):
        unused = {f"backbone.{name}.weight": torch.ones(7, 64), f"backbone.{name}.bias": normal(7)}
        for arch in (None, NAME):
            found = load(saved(tmp_path, state | unused, "unused.pt"), arch)
            assert found.arch == f"{NAME}+deconf-cosine"
            assert torch.equal(found.network(images), plain.network(images))


def test_deconf_of_a_torchvision_model(tmp_path):
    network = randomised(build("torchvision:resnet18", 5))
    body = {f"backbone.{k}": v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    head = heads.DeconfHead("cosine", 512, 5)
    found = load(saved(tmp_path, body | head.state_dict()))
    assert found.arch == "torchvision:resnet18+deconf-cosine"
    assert found.preprocessing.input_size == (224, 224)
    assert found.head_name == "fc"


def test_deconf_on_a_users_network(tmp_path):
    """The layer that the factory puts last gives way; without a suffix, all is as the code says."""
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def backbone(num_classes=4):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(8, num_classes))\n"
        "class Whole(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.h = nn.ModuleDict({'h': nn.Linear(8, 4)})\n"
        "        self.g = nn.Sequential(nn.Linear(8, 1))\n"
        "        self.body = nn.Sequential(*backbone()[:4])\n"
        "    def forward(self, x):\n"
        "        return self.h['h'](self.body(x))\n"
    )
    state = {"0.weight": normal(8, 3, 3, 3), "0.bias": normal(8)}
    head = heads.DeconfHead("euclid", 8, 6).state_dict()
    path = saved(tmp_path, {f"underlying_model.{k}": v for k, v in state.items()} | head)
    found = load(path, f"{tmp_path / 'nets.py'}:backbone+deconf-euclid")
    assert (found.num_classes, found.retrained.suffix) == (6, "deconf-euclid")
    whole = {"h.h.weight": normal(4, 8), "h.h.bias": normal(4)}
    whole |= {"g.0.weight": normal(1, 8), "g.0.bias": normal(1)}
    path = saved(tmp_path, whole | {f"body.{k}": v for k, v in state.items()})
    found = load(path, f"{tmp_path / 'nets.py'}:Whole")
    assert found.retrained is None
    assert found.head_name == "h.h"


def test_the_layers_of_a_head_are_no_features(backbone, tmp_path):
    found = load(saved(tmp_path, deconf_state(backbone, "cosine")))
    plain = assemble(build(NAME, CLASSES), arch=NAME, preprocessing=found.preprocessing)
    assert found.taps == plain.taps
    assert found.head is None
    assert recordable(found) == recordable(plain) - {"head"} | {"deconf.h"}


def test_a_card_names_the_head(backbone, images, tmp_path):
    found = load(saved(tmp_path, deconf_state(backbone, "cosine")))
    write_card(found, tmp_path / "net.toml")
    again = load(tmp_path / "net.pt")
    assert (again.arch, again.num_classes) == (found.arch, found.num_classes)
    assert not any("DeConf" in note for note in again.assumptions)
    assert torch.equal(again.network(images), found.network(images))


def test_distances_keep_their_digits():
    """By products, the squares of 1000 would leave few digits of 0.1."""
    head = heads.Similarity("euclid", 4, 2)
    u = 1000 + torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    with torch.no_grad():
        head.h.weight.copy_(torch.tensor([[1000.0] * 4, [0.0] * 4]))
        found = head(u)
    expected = -(u.double() - 1000).square().mean().item()
    assert found[0, 0].item() == pytest.approx(expected, rel=1e-5)


def test_cosines_of_short_vectors():
    """The implementations add 1e-4 to a length: here it halves each of the two."""
    head = heads.Similarity("cosine", 2, 1)
    with torch.no_grad():
        head.h.weight.copy_(torch.tensor([[0.0, 1e-4]]))
        found = head(torch.tensor([[0.0, 1e-4], [0.0, 0.0]]))
    assert found[:, 0].tolist() == pytest.approx([0.25, 0])


@pytest.mark.slow
def test_faults_of_deconf(backbone, tmp_path):
    state = deconf_state(backbone, "cosine")
    path = saved(tmp_path, state)
    fails(path, "h.h.bias is missing", arch=f"{NAME}+deconf-inner")
    fails(path, "+deconf-cosine, +deconf-euclid", arch=f"{NAME}+deconf-manhattan")
    fails(path, "+deconf-cosine, +deconf-euclid", arch=f"{NAME}+deconf")
    fails(path, "10 classes, but 7", num_classes=7)
    fails(path, "does not fit resnet32-cifar", arch="resnet32-cifar+deconf-cosine")
    fails(path, "no linear layer", arch="torchvision:squeezenet1_0+deconf-cosine")
    inner = saved(tmp_path, deconf_state(backbone, "inner"))
    fails(inner, "h.h.bias is not expected", arch=f"{NAME}+deconf-euclid")
    bare = {key: value for key, value in state.items() if not key.startswith("g.1.")}
    fails(saved(tmp_path, bare), "DeConf head does not fit", "g.1.weight is missing")
    strange = {"underlying_model.layer.weight": normal(3, 3)} | deconf_tensors("cosine")
    fails(saved(tmp_path, strange), "not recognised")
    ordinary = saved(tmp_path, build(NAME, CLASSES).state_dict())
    fails(ordinary, "has no DeConf head", "leave +deconf-cosine out", arch=f"{NAME}+deconf-cosine")


# ---------------------------------------------------------------------------- MOS


@pytest.fixture(scope="module")
def grouped():
    return randomised(build(NAME, CLASSES + len(SIZES)))


def naive_mos(outputs):
    """log p of the classes and of the others, one image and group at a time."""
    classes, others = [], []
    for row in outputs.tolist():
        classes.append([])
        others.append([])
        start = 0
        for size in SIZES:
            group = row[start : start + size + 1]
            total = sum(math.exp(value) for value in group)
            p = [math.exp(value) / total for value in group]
            others[-1].append(math.log(p[0]))
            classes[-1] += [math.log(value) for value in p[1:]]
            start += size + 1
    return torch.tensor(classes), torch.tensor(others)


def check_mos(found, grouped, images):
    assert (found.arch, found.num_classes) == (f"{NAME}+mos:4,3,3", CLASSES)
    with torch.no_grad():
        classes, others = naive_mos(grouped(images))
    seen = see(found, images)
    torch.testing.assert_close(seen.logits, classes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.mos_others, others, rtol=1e-4, atol=1e-5)
    scores = detectors.get("mos")().score(seen)
    torch.testing.assert_close(scores.float(), others.exp().min(1).values, rtol=1e-4, atol=1e-6)


def test_mos_by_suffix(grouped, images, tmp_path):
    path = saved(tmp_path, grouped.state_dict())
    ordinary = load(path)
    assert ordinary.num_classes == CLASSES + len(SIZES)
    assert ordinary.retrained is None
    found = load(path, f"{NAME}+mos:4,3,3", num_classes=CLASSES)
    check_mos(found, grouped, images)
    assert recordable(found) == recordable(ordinary) - {"head"} | {"mos.others"}
    assert found.taps == ordinary.taps


@pytest.mark.parametrize("place", ["beside", "buffer", "module"])
@pytest.mark.parametrize("arch", [None, NAME])
def test_mos_by_group_slices(place, arch, grouped, images, tmp_path):
    slices = torch.tensor([[0, 5], [5, 9], [9, 13]])
    state = grouped.state_dict()
    content = {
        "beside": {"model": state, "group_slices": slices},
        "buffer": state | {"group_slices": slices},
        "module": {f"module.{k}": v for k, v in (state | {"group_slices": slices}).items()},
    }[place]
    found = load(saved(tmp_path, content), arch)
    check_mos(found, grouped, images)
    (note,) = [note for note in found.assumptions if "MOS" in note]
    assert f"--arch {NAME}+mos:" in note
    write_card(found, tmp_path / "net.toml")
    check_mos(load(tmp_path / "net.pt"), grouped, images)


def test_what_is_said_wins_over_group_slices(grouped, tmp_path):
    state = grouped.state_dict() | {"group_slices": torch.tensor([[0, 5], [5, 9], [9, 13]])}
    assert load(saved(tmp_path, state), f"{NAME}+mos:5,6").num_classes == 11


def test_imagenets_names_are_not_given_to_groups(tmp_path):
    path = saved(tmp_path, randomised(build("torchvision:resnet18", 1002)).state_dict())
    found = load(path, "torchvision:resnet18+mos:400,600")
    assert (found.num_classes, found.class_names[0]) == (1000, "0")


def test_others_keep_their_digits():
    """Next to certainty p would be 1, and far from it 0, in float32."""
    head = heads.GroupHead(nn.Linear(1, 4), (1, 1))
    others = head.reading(torch.tensor([[20.0, 0.0, 21.0, 0.0], [-120.0, 0.0, 0.0, 0.0]]))
    assert others[0].tolist() == pytest.approx([-math.exp(-20), -math.exp(-21)], rel=1e-6, abs=0)
    score = detectors.get("mos")().score(Features(2, mos_others=others))
    assert 1 - score[0].item() == pytest.approx(math.exp(-20), rel=1e-4)
    assert score[1].item() == pytest.approx(math.exp(-120), rel=1e-5)


def test_faults_of_mos(grouped, tmp_path):
    path = saved(tmp_path, grouped.state_dict())
    fails(path, "has 13 outputs", "have 12", arch=f"{NAME}+mos:4,3,2")
    fails(path, "10 classes, but 13", arch=f"{NAME}+mos:4,3,3", num_classes=13)
    for suffix in ("mos", "mos:", "mos:4,,3", "mos:4,0,3", "mos:4,x", "mos-4,3", "mos:-4,3"):
        fails(path, f"+{suffix}: a retrained head is written", arch=f"{NAME}+{suffix}")
    for slices in ([[0, 5], [6, 13]], [[1, 5], [5, 13]], [[0, 1], [1, 13]], [0, 13], [[0, 5, 13]]):
        state = grouped.state_dict() | {"group_slices": torch.tensor(slices)}
        fails(saved(tmp_path, state), "group_slices", "--arch NAME+mos:4,3,3")
    state = grouped.state_dict() | {"group_slices": torch.tensor([[0, 5], [5, 12]])}
    fails(saved(tmp_path, state), "has 13 outputs", "have 12")


# ---------------------------------------------------------------------------- detectors, cache


def test_scores_by_hand():
    test = Features(
        2,
        deconf_h=torch.tensor([[0.1, 0.7, -1.0], [-3.0, -2.0, -4.0]]),
        mos_others=torch.tensor([[0.9, 0.2], [0.5, 0.6]]).log(),
    )
    assert detectors.get("godin")().score(test).tolist() == pytest.approx([-0.7, 2.0])
    assert detectors.get("mos")().score(test).tolist() == pytest.approx([0.2, 0.5])


def test_an_ordinary_network_is_told_what_it_lacks():
    ordinary = networks.classifier(networks.Residual())
    for word, name in (("deconf.h", "DeConf"), ("mos.others", "MOS")):
        assert word not in recordable(ordinary)
        with pytest.raises(DetectorError, match=rf"cannot give {word}: .*{name}"):
            Recorder(ordinary, frozenset({word}))
        kind = detectors.get("godin" if word == "deconf.h" else "mos")
        with pytest.raises(DetectorError, match=rf"{word}, which was not recorded \(only .*{name}"):
            kind().score(Features(1, logits=torch.zeros(1, 2)))


def test_a_cache_keeps_both(backbone, images, tmp_path):
    found = load(saved(tmp_path, deconf_state(backbone, "cosine")))
    seen = replace(see(found, images), mos_others=-normal(3, 2).exp())
    made = provenance(
        found, source="x", command="oodcli", seed=0, precision="float32", virtual=False
    )
    with writing(tmp_path / "c.h5") as new:
        rows = Rows(("a", "b", "c"), torch.tensor([-1, 0, 1]), (None,) * 3, seen)
        CacheWriter(new.file, made, 3).append(rows)
    with h5py.File(tmp_path / "c.h5") as file:
        assert file["deconf/h"].shape == (3, CLASSES)
        assert file["mos/others"].shape == (3, 2)
    with open_cache(tmp_path / "c.h5") as cache:
        assert {"deconf.h", "mos.others", "embedding"} <= cache.recorded
        assert "head" not in cache.recorded
        (block,) = cache.blocks({"deconf.h", "mos.others"})
    assert torch.equal(block.features.deconf_h, seen.deconf_h)
    assert torch.equal(block.features.mos_others, seen.mos_others)
    assert block.features.logits is None
    moved = seen.to(torch.device("meta"))
    assert moved.deconf_h.is_meta
    assert moved.mos_others.is_meta


# ---------------------------------------------------------------------------- command line


def rows_of(result):
    return list(csv.DictReader(io.StringIO(result.out)))


@pytest.mark.parametrize("kind", ["godin", pytest.param("mos", marks=pytest.mark.slow)])
def test_from_checkpoint_to_scores(kind, backbone, grouped, tmp_path):
    if kind == "godin":
        path = saved(tmp_path, deconf_state(backbone, "cosine"))
    else:
        slices = torch.tensor([[0, 5], [5, 9], [9, 13]])
        path = saved(tmp_path, {"state_dict": grouped.state_dict(), "group_slices": slices})
    noise = "noise:uniform?n=6"
    shown = json.loads(oodcli("inspect", path, "--json").out)
    assert shown["head"] is None
    assert shown["arch"].endswith(shown["retrained_head"])
    verdicts = {each["name"]: each for each in shown["detectors"]}
    lacking = {"godin": ["mos.others"], "mos": ["deconf.h"]}
    assert verdicts[kind]["allowed"]
    assert verdicts["mos" if kind == "godin" else "godin"]["lacks"] == lacking[kind]
    assert verdicts["gradnorm"]["lacks"] == ["head"]
    assert shown["retrained_head"] in oodcli("inspect", path).out
    scored = rows_of(oodcli("score", path, noise, "-d", kind, "-d", "energy"))
    assert len({row[kind] for row in scored}) == 6
    assert kind in rows_of(oodcli("score", path, noise, "-d", "all"))[0]
    cache = tmp_path / "c.h5"
    assert oodcli("extract", path, noise, "-o", cache).status == 0
    from_cache = rows_of(oodcli("score", cache, "-d", kind, "-d", "energy"))
    assert [float(row[kind]) for row in from_cache] == pytest.approx(
        [float(row[kind]) for row in scored], rel=1e-4
    )
    refused = oodcli("score", path, noise, "-d", "norm")
    assert (refused.status, refused.out) == (1, "")
    assert "cannot give head: its last layer is not linear" in refused.err
    virtual = tmp_path / "v.h5"
    made = oodcli("invert", path, "--per-class", 1, "--steps", 2, "-o", virtual)
    assert made.status == 0, made.err
    with h5py.File(virtual) as file:
        assert len(file["images"]) == CLASSES


@pytest.mark.parametrize(("name", "word"), [("godin", "DeConf head"), ("mos", "groups of classes")])
def test_an_ordinary_checkpoint_is_refused_in_a_sentence(name, word, tmp_path):
    path = saved(tmp_path, randomised(build("resnet8-cifar-w8", 4)).state_dict())
    result = oodcli("score", path, "noise:uniform?n=2", "-d", name)
    assert (result.status, result.out) == (1, "")
    (complaint,) = [line for line in result.err.splitlines() if line.startswith("oodcli: ")]
    assert word in complaint
    assert "--record" not in complaint
    verdicts = json.loads(oodcli("inspect", path, "--json").out)["detectors"]
    (verdict,) = [each for each in verdicts if each["name"] == name]
    assert verdict["lacks"] == ["deconf.h" if name == "godin" else "mos.others"]
