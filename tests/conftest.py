from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: one thread a worker of pytest-xdist, and none that spins while it waits.
# The process that starts the workers does without torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from commands import oodcli
from hypothesis import settings

settings.register_profile("busy", deadline=None)  # on a busy machine any example may be slow
settings.load_profile("busy")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever lies in tests/slow is slow."""
    folder = Path(__file__).with_name("slow")
    for item in items:
        if folder in item.path.parents:
            item.add_marker("slow")


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
    import numpy as np
    import torch

    from oodcli.stages.demo import CARD, TRAINED_ON, digits, train

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


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A folder with a tiny network net.pt, its card, a cache c.h5, and an old file old.csv."""
    import torch

    from oodcli.networks.architectures import build

    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    torch.save(build("resnet8-cifar-w4", 3).state_dict(), folder / "net.pt")
    (folder / "net.toml").write_text(
        'arch = "resnet8-cifar-w4"\nnum_classes = 3\ninput_size = [8, 8]\n'
        "mean = [0.5, 0.4, 0.3]\nstd = [0.2, 0.2, 0.2]\n"
    )
    result = oodcli("extract", folder / "net.pt", "noise:uniform?n=9", "-o", folder / "c.h5")
    assert result.status == 0, result.err
    (folder / "old.csv").write_text("of before")
    return folder
