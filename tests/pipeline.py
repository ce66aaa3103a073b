"""Files of every kind, made by commands in a process of their own."""

from __future__ import annotations

from pathlib import Path

import networks
import numpy as np
import torch
from PIL import Image

from oodcli.networks.architectures import build
from oodcli.networks.heads import DeconfHead

ROOT = Path(__file__).resolve().parents[1]


CARD = """\
class_names = ["a", "b", "c"]
input_size = [8, 8]
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
"""


RETRAINED = {"godin": "+deconf-cosine", "mos": "+mos:2,1"}
"""Detectors that need a head of their own."""


def step(command: str, *words: str, status: int = 0) -> tuple[int, tuple[str, ...]]:
    return status, (*command.split(), *words)


def prepared(folder: Path) -> Path:
    """The same checkpoints and images every time."""
    random = np.random.default_rng(0)
    (folder / "photos").mkdir(parents=True)
    for name, head in {"net": "", **RETRAINED}.items():
        network = build("resnet8-cifar", 5 if name == "mos" else 3)  # with two groups' others
        if name == "godin":
            network.linear = DeconfHead("cosine", network.linear.in_features, 3)
        torch.save(networks.settled(network).state_dict(), folder / f"{name}.pt")
        (folder / f"{name}.toml").write_text(f'arch = "resnet8-cifar{head}"\n{CARD}')
    np.savez(
        folder / "id.npz",
        images=random.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8),
        labels=np.arange(60) % 3,
        classes=np.array(["a", "b", "c"]),
    )
    for row in range(16):
        height, width = random.integers(8, 40, 2)
        pixels = random.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / "photos" / f"{row:02}.png")
    (folder / "photos" / "07.png").write_bytes(b"no image")
    return folder
