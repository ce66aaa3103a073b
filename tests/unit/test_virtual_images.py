"""``benchmarks.virtual_images``: what detectors are fitted on."""

from __future__ import annotations

from dataclasses import replace

import networks
import torch

from benchmarks import virtual_images
from oodcli import detectors

CLASSES = 120


def test_classes_share_a_mean_or_have_their_own():
    train = networks.recorded(24, classes=CLASSES)
    train = replace(train, label=torch.arange(24) % 8 * 10)
    rows = {name: layer.mean.double() for name, layer in train.layers.items()}
    kind = detectors.get("c2ir-z")
    shared = virtual_images.fitted(kind, [train], class_means=False)
    own = virtual_images.fitted(kind, [train], class_means=True)
    for name in shared.layers:
        torch.testing.assert_close(shared.centre[name], rows[name].mean(0, keepdim=True))
        torch.testing.assert_close(own.centre[name][20], rows[name][train.label == 20].mean(0))
    assert len(own.evidence) == CLASSES
    assert torch.equal(own.present.nonzero()[:, 0], torch.arange(8) * 10)
    kind = detectors.get("mds++")
    counts = [len(virtual_images.fitted(kind, [train], class_means=own).mean) for own in (0, 1)]
    assert counts[0] == 1 < counts[1]
