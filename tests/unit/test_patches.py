"""Inversion without BatchNorm: the spread of patch similarities."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations

import networks
import pytest
import torch
from commands import oodcli
from safetensors.torch import save_file
from torch import nn

from oodcli.inversion.invert import Plan, invert
from oodcli.inversion.objective import OBJECTIVES, PATCHES, WIDTH, patch_entropy
from oodcli.inversion.step import Step, spread_taps
from oodcli.networks.assemble import assemble

LABELS = torch.tensor([0, 1, 2, 1])


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Tokens(nn.Module):
    """Two blocks on a class token and 16 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 2, 2)
        self.blocks = nn.Sequential(Mixing(), Mixing())
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        tokens = self.stem(x).flatten(2).mT
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        return self.head(self.blocks(tokens).mean(1))


def naive_entropy(tokens):
    """tokens: (T, C) float64. The integral by the trapezium rule on a fine grid."""
    similarities = [
        float(one @ other / (one.norm() * other.norm())) for one, other in combinations(tokens, 2)
    ]
    total, step = 0.0, 0.01
    for place in torch.arange(-2, 2, step, dtype=torch.float64).tolist():
        kernels = [math.exp(-(((place - each) / WIDTH) ** 2) / 2) for each in similarities]
        density = sum(kernels) / len(kernels) / (WIDTH * math.sqrt(2 * math.pi))
        total -= density * math.log(density) * step if density else 0
    return total


@pytest.mark.parametrize("layout", ["map", "channels last", "tokens", "class token", "ReLU"])
def test_the_entropy_is_that_of_the_density_of_similarities(layout):
    tokens = networks.normal(2, 16, 5)
    tokens = tokens.relu() + 0.01 if layout == "ReLU" else tokens
    expected = [naive_entropy(each.double()) for each in tokens]
    given, dim = {
        "map": (tokens.mT.reshape(2, 5, 4, 4), 1),
        "channels last": (tokens.reshape(2, 4, 4, 5), -1),
        "tokens": (tokens, -1),
        "class token": (torch.cat([torch.ones(2, 1, 5), tokens], 1), -1),
        "ReLU": (tokens.mT, 1),
    }[layout]
    assert patch_entropy(given, dim).tolist() == pytest.approx(expected, abs=0.01)


def test_entropies_of_extremes():
    """Patches that are all alike have the entropy of one kernel, those with nothing in common, too;
    half and half has more."""
    kernel = math.log(WIDTH * math.sqrt(2 * math.pi * math.e))
    alike, apart = torch.ones(4, 4), torch.eye(4)
    both = torch.cat([alike[:2], apart[:2]])
    found = patch_entropy(torch.stack([alike, apart, both]).reshape(3, 2, 2, 4), -1)
    assert found[:2].tolist() == pytest.approx([kernel, kernel], abs=0.01)
    assert found[2] > kernel + 0.5
    assert patch_entropy(torch.ones(2, 5, 1, 1)).tolist() == [0, 0]


def test_large_maps_are_sampled(monkeypatch):
    """The memory does not grow with the map, and the patches come from all over it."""
    largest = 0
    norm = torch.nn.functional.normalize

    def watched(patches, **given):
        nonlocal largest
        largest = max(largest, patches.shape[1])
        return norm(patches, **given)

    monkeypatch.setattr("oodcli.inversion.objective.F.normalize", watched)
    half = networks.normal(1, 6, 28, 56)
    mixed = torch.cat([half, torch.ones(1, 6, 28, 56)], 2)
    found, alike = patch_entropy(mixed), patch_entropy(torch.ones_like(mixed))
    assert largest == PATCHES
    assert found > alike + 1


@pytest.mark.parametrize("kind", [Tokens, networks.Residual])
def test_a_step_raises_the_spread(kind):
    """The gradient is that of the written-down objective, and leads to a higher entropy."""
    torch.manual_seed(0)
    network = networks.classifier(kind()) if kind is networks.Residual else assembled(kind())
    recipe = OBJECTIVES["patches"]
    images = networks.images(4).requires_grad_()

    def spread():
        found = []
        taps = spread_taps(network)
        hooks = [
            network.network.get_submodule(tap.module).register_forward_hook(
                lambda _, __, out, tap=tap: found.append(patch_entropy(out, tap.channel_dim))
            )
            for tap in taps
        ]
        network.network(images)
        for hook in hooks:
            hook.remove()
        return torch.stack(found).mean()

    entropy = spread()
    (expected,) = torch.autograd.grad(-entropy, images, retain_graph=True)
    plain = Step(network, replace(recipe, spread_weight=0.0), "float32")
    without = plain.gradient(images, images, LABELS)
    found = Step(network, recipe, "float32").gradient(images, images, LABELS) - without
    scale = expected.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(found, recipe.spread_weight * expected, rtol=0.01, atol=0.01 * scale)
    with torch.no_grad():
        images -= 0.02 * found / found.norm() * images.norm()
        assert spread() > entropy


def assembled(network):
    return assemble(network, arch="tokens", preprocessing=networks.PREPROCESSING)


def test_a_stage_that_returns_its_last_block_counts_once():
    names = [tap.module for tap in spread_taps(networks.classifier(networks.Residual()))]
    assert names == ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]


def test_a_network_without_batchnorm_reaches_its_classes():
    torch.manual_seed(0)
    network = assembled(Tokens())
    recipe = OBJECTIVES["patches"]
    plan = Plan((0, 1, 2), 4, recipe, steps=100, batch_size=12, sensitivity=False)
    (batch,) = invert(network, plan)
    assert (network.network(batch.images.float()).argmax(1) == batch.label).all()
    assert batch.sensitivity == {}


TIMM = {
    "convnext_atto": {"patch_size": 2, "dims": [8, 12, 16, 16], "depths": [1, 1, 1, 0]},
    "vit_tiny_patch16_224": {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "class_token": True,
        "reg_tokens": 2,
    },
}


@pytest.mark.parametrize("name", TIMM)
def test_the_whole_pipeline(name, tmp_path):
    """A hub folder of timm's; an interrupted job is covered by test_resuming."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=3, **TIMM[name])
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": name, "num_classes": 3, "model_args": TIMM[name]}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    virtual, cache, scores = (tmp_path / each for each in ("v.h5", "v.features.h5", "s.csv"))
    for words in (
        ["invert", tmp_path, "--objective", "patches", "--per-class", 8, "-o", virtual],
        ["extract", tmp_path, virtual, "-o", cache],
        ["fit", cache, "-d", "knn", "-d", "nci", "-o", tmp_path / "fitted"],
        [
            *("score", tmp_path, "noise:uniform?n=4", "-d", tmp_path / "fitted/knn.safetensors"),
            *("-d", tmp_path / "fitted/nci.safetensors", "-o", scores),
        ],
    ):
        result = oodcli(*words)
        assert result.status == 0, result.err
        if words[0] == "invert":
            assert "BatchNorm" not in result.err
    assert len(scores.read_text().splitlines()) == 5
