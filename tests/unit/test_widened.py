"""Virtual rows that are made as different as real ones."""

from __future__ import annotations

import logging

import h5py
import numpy as np
import pytest
import torch

from oodcli.detectors.openmax import OpenMax
from oodcli.detectors.rmds import RMDS, RMDSPlusPlus
from oodcli.detectors.temp_scaling import TemperatureScaling
from oodcli.detectors.vim import ViM
from oodcli.detectors.widened import largest_factors, widened
from oodcli.errors import DetectorError
from oodcli.features import Features, LinearHead, Rows
from oodcli.files.cache import CacheWriter, open_cache
from oodcli.files.hdf5 import Provenance
from oodcli.networks.preprocessing import Preprocessing
from oodcli.stages.fit import FitInputs, fit_to_folder

NEEDS = frozenset({"embedding", "logits", "head"})


def rows(count=200, classes=4, width=6, spread=0.05, seed=0):
    """Rows close to their class means, classified rightly by a linear head."""
    rng = np.random.default_rng(seed)
    means = 2 * rng.normal(size=(classes, width))
    label = np.arange(count) % classes
    u = torch.from_numpy(means[label] + spread * rng.normal(size=(count, width))).float()
    weight = torch.from_numpy(means - means.mean(0)).float()
    head = LinearHead(weight, -weight.square().sum(1) / 2)
    logits = u @ head.weight.T + head.bias
    return Features(
        count=count, label=torch.from_numpy(label), logits=logits, embedding=u, head=head
    )


def accuracy(train):
    right = [block.logits.argmax(1) == block.label for block in train]
    return float(torch.cat(right).double().mean())


def in_two(block):
    return [block.select(slice(0, 77)), block.select(slice(77, None))]


def test_the_largest_factor_by_hand():
    # Class 0: lead 4 over class 1; d = (−1, +1), so they are equal at 4 − 2f = 0.
    mean = torch.tensor([[5.0, 1.0, -9.0], [0.0, 3.0, -9.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    logits = torch.tensor([[4.0, 2.0, -9.0], [7.0, 1.0, -9.0], [2.0, 2.9, -9.0]])
    found = largest_factors(logits, mean, torch.tensor([0, 0, 1]))
    # The second moves away from the others; the third: lead 3, d = (2, −0.1).
    torch.testing.assert_close(found[[0, 2]], torch.tensor([2.0, 3 / 2.1], dtype=torch.float64))
    assert found[1] == torch.inf


@pytest.mark.parametrize("share", [0.9, 0.95, 0.99])
def test_the_network_is_right_on_the_share(share):
    block = rows()
    assert accuracy([block]) == 1
    assert accuracy(widened(in_two(block), NEEDS, "x", share)) == pytest.approx(share, abs=0.006)


def test_class_means_stay_and_deviations_grow_alike():
    block = rows()
    wide = widened(in_two(block), NEEDS, "x", 0.95)
    new = torch.cat([each.embedding for each in wide]).double()
    old = block.embedding.double()
    means = torch.stack([old[block.label == c].mean(0) for c in range(4)])[block.label]
    torch.testing.assert_close(new - means, wide.factor * (old - means), rtol=1e-4, atol=1e-5)
    assert wide.factor > 1
    head = block.head
    logits = torch.cat([each.logits for each in wide])
    expected = (new @ head.weight.double().T + head.bias.double()).float()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_rows_that_are_different_enough_stay(caplog):
    block = rows(spread=3.0)
    assert accuracy([block]) < 0.95
    with caplog.at_level(logging.INFO):
        assert widened(block, NEEDS, "x", 0.95) is block
        assert widened(rows(), NEEDS, "x", None) is not None
    assert not caplog.text
    alike = rows(spread=0.0)
    assert widened(alike, NEEDS, "x", 0.95) is alike
    one = block.select(slice(0, 1))
    assert widened(one, NEEDS, "x", 0.95) is one


def test_a_share_that_makes_no_sense():
    with pytest.raises(DetectorError, match=r"rmds\.widen=95 must be in 0 … 1, a fraction"):
        RMDS.fit(rows(), widen=95)


def replaced(block, factor):
    """The same by hand."""
    u = block.embedding.double()
    means = torch.stack([u[block.label == c].mean(0) for c in range(4)])[block.label]
    new = (means + factor * (u - means)).float()
    head = block.head
    logits = new @ head.weight.T + head.bias
    return Features(
        count=len(block), label=block.label, logits=logits, embedding=new, head=block.head
    )


@pytest.mark.parametrize("kind", [RMDS, ViM, OpenMax, TemperatureScaling])
def test_detectors_are_fitted_on_widened_rows(kind, caplog):
    block, test = rows(), rows(seed=1, spread=0.5)
    with caplog.at_level(logging.INFO):
        found = kind.fit(block, widen=0.95)
    factor = widened(block, NEEDS, "x", 0.95).factor
    assert f"{kind.name}: deviations from the class means times {factor:.3g}" in caplog.text
    expected = kind.fit(replaced(block, factor)).score(test)
    torch.testing.assert_close(found.score(test), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(kind.fit(block).score(test), expected, rtol=1e-2)


def test_which_detectors_widen():
    kinds = RMDS, ViM, OpenMax, TemperatureScaling
    assert all(kind.widens for kind in kinds)
    assert not RMDSPlusPlus.widens


@pytest.mark.parametrize("given", [None, 0.0, 0.9])
@pytest.mark.parametrize(
    ("virtual", "matched", "default"), [(True, None, 0.95), (True, 0.9, None), (False, None, None)]
)
def test_only_virtual_rows_are_widened_by_default(
    virtual, matched, default, given, tmp_path, monkeypatch
):
    block, seen = rows(count=40), []
    made = Provenance(
        checkpoint_sha256="0" * 64,
        arch="none",
        preprocessing=Preprocessing((8, 8), (0.5,) * 3, (0.25,) * 3),
        class_names=("a", "b", "c", "d"),
        source="x",
        command="x",
        oodcli_version="",
        torch_version="",
        seed=0,
        virtual=virtual,
        matched_accuracy=matched,
    )
    with h5py.File(tmp_path / "x.h5", "w") as file:
        every = Rows(("x",) * 40, block.label, (None,) * 40, block)
        CacheWriter(file, made, 40).append(every)
    fit = RMDS.fit.__func__

    def watched(cls, train, **settings):
        seen.append(settings.get("widen"))
        return fit(cls, train, **settings)

    monkeypatch.setattr(RMDS, "fit", classmethod(watched))
    settings = {} if given is None else {"rmds": {"widen": given}}
    with open_cache(tmp_path / "x.h5") as cache:
        fit_to_folder(FitInputs(cache), [RMDS], settings, tmp_path)
    assert set(seen) == {default if given is None else given}
