"""The first singular triplet of the last map."""

from __future__ import annotations

from dataclasses import replace

import networks
import numpy as np
import pytest
import torch

from oodcli import detectors
from oodcli.detectors import rankfeat
from oodcli.detectors.rankfeat import rank_one
from oodcli.errors import DetectorError
from oodcli.recording.recorder import Recorder, recordable


def by_definition(maps):
    """σ₁ l₁ mean(r₁) of each map, in float64."""
    found = []
    for each in maps.double().flatten(2).numpy():
        left, values, right = np.linalg.svd(each, full_matrices=False)
        found.append(values[0] * left[:, 0] * right[0].mean())
    return torch.tensor(np.array(found))


def with_values(values, channels, positions):
    """One map with these singular values, their vectors at random."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator).double()).Q
        for size in (channels, positions)
    )
    return ((left * torch.tensor(values).double()) @ right.T).view(1, channels, -1, 2).float()


@pytest.mark.parametrize("shape", [(64, 8, 8), (3, 4, 4), (512, 2, 2), (5, 7), (4, 1, 2)])
@pytest.mark.parametrize("relu", [False, True], ids=["signed", "relu"])
def test_it_is_that_of_the_singular_values(shape, relu):
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(33, *shape, generator=generator) * 10
    maps = maps.relu() if relu else maps
    torch.testing.assert_close(rank_one(maps).double(), by_definition(maps), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("second", [0.0, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize(("channels", "positions"), [(12, 6), (6, 12)])
def test_a_second_value_that_is_nearly_as_large(second, channels, positions):
    maps = with_values([1.0, second, second / 2], channels, positions)
    near = 1e-6 / (1 - second)  # float32 can tell the two no better
    torch.testing.assert_close(rank_one(maps).double(), by_definition(maps), rtol=0, atol=near)


def test_eigenvectors_are_computed_only_where_the_values_are_close(monkeypatch):
    sizes = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda rows: sizes.append(len(rows)) or eigh(rows))
    maps = [with_values([1.0, second], 12, 6) for second in (0.5, 0.9999, 0.7)]
    rank_one(torch.cat(maps))
    assert sizes == [1]


def test_maps_of_zeros_and_maps_that_are_not_finite():
    maps = torch.ones(4, 3, 2, 2)
    maps[1] = 0
    maps[2, 0, 0, 0] = torch.nan
    maps[3, 0, 0, 0] = torch.inf
    for each in (maps, maps.flatten(2).mT.contiguous()):
        found = rank_one(each)
        torch.testing.assert_close(found[0], torch.ones(each.shape[1]))
        assert (found[1] == 0).all()
        assert found[2:].isnan().any(1).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("inplace", [False, True])
def test_it_is_recorded_of_the_last_map_alone(precision, inplace):
    classifier = networks.classifier(networks.Residual(inplace=inplace))
    recorder = Recorder(classifier, frozenset({"layers.rank1"}), precision=precision)
    last = []
    handle = recorder.classifier.network.layer2.register_forward_hook(
        lambda module, args, output: last.append(output.detach().clone())
    )
    seen = recorder(networks.images(5))
    handle.remove()
    found = {name: layer.rank1 for name, layer in seen.layers.items() if layer.rank1 is not None}
    assert list(found) == [recorder.classifier.last_map.name]
    expected = by_definition(last[0].float())
    torch.testing.assert_close(found.popitem()[1].double(), expected, rtol=1e-4, atol=1e-4)


def test_batches_do_not_change_it():
    maps = torch.randn(20, 8, 3, 3, generator=torch.Generator().manual_seed(2))
    whole = rank_one(maps)
    parts = [rank_one(part) for size in (1, 7) for part in maps.split(size)]
    torch.testing.assert_close(torch.cat(parts), whole.repeat(2, 1), rtol=1e-5, atol=1e-6)


def test_without_the_first_triplet_a_map_of_rank_one_is_gone():
    rows = networks.recorded(4)
    name = next(name for name, layer in rows.layers.items() if layer.rank1 is not None)
    whole = replace(rows.layers[name], rank1=rows.embedding)
    scores = detectors.get("rankfeat")().score(replace(rows, layers={**rows.layers, name: whole}))
    torch.testing.assert_close(scores, -torch.logsumexp(rows.head.bias.double(), 0).expand(4))


def test_where_the_embedding_is_not_the_mean_of_a_map():
    classifier = networks.classifier(networks.Shared())
    assert "layers.rank1" not in recordable(classifier)
    with pytest.raises(DetectorError, match=r"cannot give layers\.rank1: its embedding is not"):
        Recorder(classifier, frozenset({"layers.rank1"}))
    rows = networks.recorded(2)
    both = {name: replace(layer, rank1=layer.mean) for name, layer in rows.layers.items()}
    with pytest.raises(DetectorError, match=r"layers have rank1, expected the last map alone"):
        detectors.get("rankfeat")().score(replace(rows, layers=both))


@pytest.mark.parametrize(("setting", "value", "second"), [("STEPS", 0, 0.8), ("PURE", 0.1, 0.99)])
def test_with_less_it_would_be_another(setting, value, second, monkeypatch):
    maps = with_values([1.0, second], 12, 6)
    before = (rank_one(maps) - by_definition(maps)).abs().max()
    monkeypatch.setattr(rankfeat, setting, value)
    after = (rank_one(maps) - by_definition(maps)).abs().max()
    assert before < 1e-6
    assert after > 2e-6
