"""``benchmarks.real_images``: what detectors are fitted on."""

from __future__ import annotations

import networks
import pytest
import torch

from benchmarks import real_images
from oodcli import detectors
from oodcli.metrics import auroc, tnr95


def test_all_training_images_are_one_more_way():
    known, train, other = (
        networks.recorded(count, seed=seed, labelled=False)
        for count, seed in ((40, 1), (60, 2), (30, 3))
    )
    recorded = frozenset({"embedding", "logits"})
    sets = {"other": [other]}
    parts = ([], [known], [known], [known], False, recorded, torch.arange(40), sets)
    without = dict(real_images.ways(real_images.Site(*parts), 0, 0))
    ways = dict(real_images.ways(real_images.Site(*parts, train=[train]), 0, 0))
    assert ways.keys() - without.keys() == {
        f"{name} on training images" for name in ("knn", "she", "mds++", "rmds++")
    }
    found = ways["knn on training images"]()
    detector = detectors.get("knn").fit([train])
    inside = detector.score(known).numpy()[20:]
    outside = detector.score(other).numpy()
    assert found.auroc == pytest.approx(100 * auroc(inside, outside))
    assert found.tnr95 == pytest.approx(100 * tnr95(inside, outside))
