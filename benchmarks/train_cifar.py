"""Trains a CIFAR-10 network for the papers' tables: the ResNet-34 that oodcli knows.

    python -m benchmarks.train_cifar TEST.npz TRAIN.npz … -o resnet34.safetensors
        [--arch resnet34-kuangliu] [--epochs 100] [--batch-size 128] [--lr 0.1] [--cutout 8]
        [--seed 0] [--device cuda] [--steps 200]

SGD with Nesterov's momentum and one cycle of the learning rate; random crops, mirror images, and
squares cut out; no label smoothing. Passes are in bfloat16, channels last. Prints images a second
and how long the whole takes, and after each epoch the accuracy on TEST.npz. What is done is kept in
OUTPUT.partial after each epoch, and the same command goes on from there. In the end OUTPUT has the
weights, with a model card beside it. --steps stops after so many and writes nothing: to see how
fast it is.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from oodcli.architectures import CIFAR_MEAN, CIFAR_STD, build

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
WARM_UP = 0.2
"""Share of the steps in which the learning rate rises."""

BORDER = 4
"""Pixels of zeros around an image before it is cropped."""

EVERY = 50
"""Steps between two lines on how fast it is."""


class Training:
    """Everything that changes: network, optimiser, learning rate, epochs done."""

    def __init__(self, settings: dict[str, Any], classes: int, device: str) -> None:
        torch.manual_seed(settings["seed"])
        self.settings, self.device, self.epoch = settings, device, 0
        network = build(settings["arch"], classes).to(device)
        self.network = network.to(memory_format=torch.channels_last)
        self.optimiser = torch.optim.SGD(
            self.network.parameters(),
            lr=settings["lr"],
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            nesterov=True,
        )
        self.steps = -(-settings["rows"] // settings["batch_size"])
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser,
            max_lr=settings["lr"],
            total_steps=settings["epochs"] * self.steps,
            pct_start=WARM_UP,
        )

    def logits(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W), normalised. Returns (N, K) float32."""
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            found: Tensor = self.network(images.contiguous(memory_format=torch.channels_last))
        return found.float()

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross entropy of a batch, after which all is one step further."""
        self.network.train()
        loss = F.cross_entropy(self.logits(images), labels)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.schedule.step()
        return loss.detach()

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """images: (N, H, W, 3) uint8."""
        self.network.eval()
        right = 0
        for start in range(0, len(labels), 500):
            batch = normalised(images[start : start + 500])
            right += int((self.logits(batch).argmax(1) == labels[start : start + 500]).sum())
        return right / len(labels)

    def save(self, path: Path) -> None:
        state = {
            "settings": self.settings,
            "epoch": self.epoch,
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        new = path.with_name(path.name + ".new")
        torch.save(state, new)
        os.replace(new, path)

    def load(self, path: Path) -> None:
        """Raises SystemExit when it was kept by another command."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["settings"] != self.settings:
            raise SystemExit(f"{path} was kept by another command: {state['settings']}")
        self.epoch = state["epoch"]
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])


def read(paths: Sequence[Path]) -> tuple[Tensor, Tensor, list[str]]:
    """Images (N, H, W, 3) uint8, labels (N,) and the names of the classes."""
    images, labels, classes = [], [], []
    for path in paths:
        with np.load(path) as found:
            images.append(torch.from_numpy(found["images"]))
            labels.append(torch.from_numpy(found["labels"]))
            classes = [str(name) for name in found["classes"]]
    return torch.cat(images), torch.cat(labels), classes


def normalised(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 → (N, 3, H, W) float32."""
    mean, std = (torch.tensor(each, device=images.device) for each in (CIFAR_MEAN, CIFAR_STD))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def augmented(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """(N, H, W, 3) uint8 → (N, 3, H, W) float32, normalised: a random crop of each with a border of
    zeros, mirrored or not, and a square of the given side set to the mean, in part outside."""
    count, height, width, _ = images.shape
    device = images.device

    def random(below: int) -> Tensor:
        return torch.randint(below, (count, 1), generator=generator).to(device)

    padded = F.pad(images, (0, 0, BORDER, BORDER, BORDER, BORDER))
    rows = torch.arange(height, device=device) + random(2 * BORDER + 1)  # (N, H)
    columns = torch.arange(width, device=device) + random(2 * BORDER + 1)  # (N, W)
    columns = torch.where(random(2) == 1, columns.flip(1), columns)
    which = torch.arange(count, device=device)[:, None, None]
    found = normalised(padded[which, rows[:, :, None], columns[:, None, :]])
    high = (torch.arange(height, device=device) - random(height)).abs() * 2 < side  # (N, H)
    wide = (torch.arange(width, device=device) - random(width)).abs() * 2 < side  # (N, W)
    return found.masked_fill((high[:, :, None] & wide[:, None, :])[:, None], 0)


def card(arch: str, classes: Sequence[str]) -> str:
    """The model card."""
    names = ", ".join(f'"{name}"' for name in classes)
    mean, std = (", ".join(map(str, each)) for each in (CIFAR_MEAN, CIFAR_STD))
    return (
        f'arch = "{arch}"\nclass_names = [{names}]\ninput_size = [32, 32]\n'
        f"mean = [{mean}]\nstd = [{std}]\n"
    )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_cifar")
    parser.add_argument("test", type=Path, metavar="TEST.npz")
    parser.add_argument("train", type=Path, nargs="+", metavar="TRAIN.npz")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--arch", default="resnet34-kuangliu")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--cutout", type=int, default=8, help="side of the square, 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=0)
    options = parser.parse_args(words)
    images, labels, classes = read(options.train)
    keys = ("arch", "epochs", "batch_size", "lr", "cutout", "seed")
    settings = {"rows": len(labels), **{key: getattr(options, key) for key in keys}}
    training = Training(settings, len(classes), options.device)
    partial = options.output.with_name(options.output.name + ".partial")
    if partial.exists():
        training.load(partial)
        _say(f"going on after {training.epoch} epochs")
    images, labels = images.to(options.device), labels.to(options.device)
    test_images, test_labels = (each.to(options.device) for each in read([options.test])[:2])
    start, done = time.perf_counter(), 0
    while training.epoch < options.epochs:
        generator = torch.Generator().manual_seed(options.seed * 10_000 + training.epoch)
        order = torch.randperm(len(labels), generator=generator).to(options.device)
        for rows in torch.split(order, options.batch_size):
            batch = augmented(images[rows], options.cutout, generator)
            loss = training.step(batch, labels[rows])
            done += 1
            if done % EVERY == 0 or done == options.steps:
                pace = done / (time.perf_counter() - start)
                whole = options.epochs * training.steps / pace / 3600
                rate = pace * options.batch_size
                speed = f"{rate:.1f} images/s, {whole:.2f} h in all"
                _say(f"step {done}: loss {float(loss):.3f}, {speed}")
            if done == options.steps:
                return 0
        training.epoch += 1
        right = training.accuracy(test_images, test_labels)
        _say(f"epoch {training.epoch} of {options.epochs}: {100 * right:.2f} % right")
        if not options.steps:
            training.save(partial)
    state = {key: value.cpu().contiguous() for key, value in training.network.state_dict().items()}
    save_file(state, options.output)
    options.output.with_suffix(".toml").write_text(card(options.arch, classes), encoding="utf-8")
    partial.unlink()
    print(
        f"wrote {options.output}: {100 * training.accuracy(test_images, test_labels):.2f} % right"
    )
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
