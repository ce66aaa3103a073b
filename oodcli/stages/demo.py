"""Data of ``oodcli demo``: a small network trained on scikit-learn's digits, and other images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from oodcli import notes
from oodcli.files.atomic import atomic
from oodcli.networks.architectures import build

log = logging.getLogger(__name__)

ARCH = "resnet8-cifar+grey"
MEAN, STD = 0.3, 0.35
TRAINED_ON = 1200
EPOCHS = 12

CARD = f"""\
# Found by oodcli because it lies beside digits.safetensors.
arch = "{ARCH}"
class_names = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
input_size = [8, 8]
mean = [{MEAN}]
std = [{STD}]
"""


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """scikit-learn's 1,797 handwritten digits: (N, 8, 8, 1) uint8, and labels, shuffled alike."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels = (images[order] * (255 / 16)).round().astype(np.uint8)
    return pixels.reshape(-1, 8, 8, 1), labels[order].astype(np.int64)


def train(
    images: NDArray[np.uint8], labels: NDArray[np.int64], progress: Callable[[int], None]
) -> dict[str, Tensor]:
    """A state dict after 12 epochs; seconds on two cores. images: (N, 8, 8, 1) uint8."""
    generator = torch.Generator().manual_seed(0)
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    network = build(ARCH, 10).train()
    torch.random.set_rng_state(state)
    x = ((torch.from_numpy(images).permute(0, 3, 1, 2) / 255) - MEAN) / STD
    y = torch.from_numpy(labels)
    batches = len(x) // 60
    adam = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 0.01, total_steps=EPOCHS * batches)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=generator)
        for index in torch.split(order[: batches * 60], 60):
            loss = F.cross_entropy(
                network(_shifted(x[index], generator)), y[index], label_smoothing=0.1
            )
            adam.zero_grad()
            torch.autograd.backward(loss)
            adam.step()
            schedule.step()
            progress(len(index))
    return network.state_dict()


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each batch shifted by at most one pixel: the only augmentation."""
    down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return torch.roll(images, (down, right), (2, 3))


def write_data(folder: Path, progress: Callable[[int], None]) -> tuple[int, int]:
    """Write a checkpoint with its model card, held-out digits and photographs; returns the numbers
    of the last two. progress: called with the number of digits trained on."""
    images, labels = digits()
    state = train(images[:TRAINED_ON], labels[:TRAINED_ON], progress)
    notes.done(log, "training")
    with atomic(folder / "digits.safetensors", force=True) as partial:
        save_file(state, partial)
    (folder / "digits.toml").write_text(CARD, encoding="utf-8")
    np.savez_compressed(
        folder / "digits-test.npz",
        images=images[TRAINED_ON:],
        labels=labels[TRAINED_ON:],
        classes=np.array([str(index) for index in range(10)]),
    )
    return len(labels) - TRAINED_ON, photograph_crops(folder / "photographs")


def photograph_crops(folder: Path) -> int:
    """Write square crops of scikit-learn's two sample photographs as PNG, in a sub-folder each;
    returns their number."""
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    count = 0
    side = 64
    for name, image in zip(samples.filenames, samples.images, strict=True):
        target = folder / Path(name).stem
        target.mkdir(parents=True, exist_ok=True)
        for top in range(0, image.shape[0] - side + 1, side):
            for left in range(0, image.shape[1] - side + 1, side):
                crop = Image.fromarray(image[top : top + side, left : left + side])
                crop.save(target / f"{top:03d}-{left:03d}.png")
                count += 1
    return count
