from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import numpy as np
import pytest
import torch
from commands import oodcli

from oodcli.stages.demo import CARD, TRAINED_ON, digits, train


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The shared folder of real images and checkpoints; tests that need it are skipped without."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared data")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with the demo's network digits.pt, its card, and held-out digits test.npz."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = digits()
    state = train(images[:TRAINED_ON], labels[:TRAINED_ON], lambda count: None)
    torch.save(state, folder / "digits.pt")
    (folder / "digits.toml").write_text(CARD, encoding="utf-8")
    np.savez(
        folder / "test.npz",
        images=images[TRAINED_ON:],
        labels=labels[TRAINED_ON:],
        classes=np.array([str(index) for index in range(10)]),
    )
    return folder


@pytest.fixture(scope="session")
def fitted(trained) -> Path:
    """The same folder after invert, extract and fit: v.h5, v.features.h5, detectors/."""
    checkpoint = trained / "digits.pt"
    steps = (
        ("invert", checkpoint, "--per-class", 10, "--no-mirror", "-o", trained / "v.h5"),
        ("extract", checkpoint, trained / "v.h5", "-o", trained / "v.features.h5"),
        ("fit", trained / "v.features.h5", "-d", "c2ir", "-d", "c2ir-z", "-o", trained / "fitted"),
    )
    for words in steps:
        result = oodcli(*words)
        assert result.status == 0, result.err
    return trained
