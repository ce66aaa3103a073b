"""Trains a CIFAR-10 network for the tables: one that oodcli knows, or one of timm.

    python -m benchmarks.train_cifar TEST.npz TRAIN.npz … -o resnet34.safetensors
        [--arch resnet34-kuangliu] [--epochs 100] [--sides 16:6 24:3] [--batch-size 128] [--lr 0.1]
        [--cutout 8] [--seed 0] [--device cuda] [--from EARLIER.safetensors] [--steps 200]
    python -m benchmarks.train_cifar TEST.npz TRAIN.npz … -o FOLDER --arch timm:NAME
        [--model-args JSON] [--optimiser muon] …

SGD with Nesterov's momentum, or Muon, and one cycle of the learning rate; random crops, mirror
images, and squares cut out; no label smoothing. Passes are in bfloat16 where the processor
multiplies in it, channels last. With --sides 16:6 24:3
the first six epochs see the images 16 pixels wide, which takes a third of the time, the next three
24 pixels, and the others as they are. With --from another cycle begins with the weights that an
earlier one wrote; give it another --seed. Prints images a second, and after each epoch the accuracy
on 2,000 images of TEST.npz, of all classes, in the end that on all. What is done is kept in
OUTPUT.partial, and the same command goes on from there. In the end OUTPUT has the weights, with a
model card beside it; of one of timm's networks it is a folder as on a model hub. --steps stops
after so many and writes nothing: to see how fast it is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oodcli.networks.architectures import CIFAR_MEAN, CIFAR_STD, build

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
DECAY = 0.05
"""Of the matrices with Muon."""

WARM_UP = 0.2
"""Share of the steps in which the learning rate rises."""

BORDER = 4
"""Pixels of zeros around an image before it is cropped."""

EVERY = 100
"""Steps between two lines on how fast it is, which also keep what is done."""

SAMPLE = 2_000
"""Images of the test set on which an epoch is judged, about."""


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal (Jordan 2024), as long as AdamW's (arXiv 2502.16982,
    eq. 4). torch.optim.Muon is the same in bfloat16, slow on most processors. parameters: each
    (O, I, …), seen as a matrix (O, I · …)."""

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.95, "decay": DECAY})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                gradient = parameter.grad.flatten(1)
                if not state:
                    state["mean"] = torch.zeros_like(gradient)
                mean = state["mean"].lerp_(gradient, 1 - group["momentum"])
                step = orthogonal(gradient.lerp(mean, group["momentum"]))
                length = 0.2 * max(step.shape) ** 0.5 * group["lr"]
                parameter.mul_(1 - group["lr"] * group["decay"])
                parameter.sub_(step.reshape(parameter.shape), alpha=length)


def orthogonal(matrix: Tensor) -> Tensor:
    """Of U S Vᵀ about U Vᵀ, by five Newton-Schulz steps with Jordan's coefficients."""
    tall = len(matrix) > matrix.shape[1]
    found: Tensor = matrix.T if tall else matrix
    found = found / found.norm().clamp(min=1e-7)
    for _ in range(5):
        square = found @ found.T
        found = 3.4445 * found + (2.0315 * square @ square - 4.7750 * square) @ found
    return found.T if tall else found


def optimisers(network: nn.Module, kind: str, lr: float, classes: int) -> list[Any]:
    """sgd: one for all. muon: one for the matrices between input and head, AdamW for the rest."""
    every = list(network.parameters())
    if kind == "sgd":
        return [torch.optim.SGD(every, lr, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)]
    inner = [each for each in every if each.ndim > 1 and min(each.shape[:2]) > 1]
    inner = [each for each in inner if each.shape[0] != classes and each.shape[1] != 3]
    rest = [each for each in every if all(each is not other for other in inner)]
    return [Muon(inner, lr), torch.optim.AdamW(rest, lr, weight_decay=0)]


def made(arch: str, arguments: dict[str, Any], classes: int) -> nn.Module:
    """Raises SystemExit where timm is missing, or has no such network."""
    if not arch.startswith("timm:"):
        return build(arch, classes)
    try:
        import timm
    except ImportError as error:
        raise SystemExit("--arch timm:NAME needs timm: pip install timm") from error
    try:
        network: nn.Module = timm.create_model(arch[5:], num_classes=classes, **arguments)
    except (RuntimeError, TypeError) as error:
        raise SystemExit(f"timm makes no {arch[5:]} of {arguments}: {error}") from error
    return network


def fast_in_bfloat16(device: str) -> bool:
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class Training:
    """Everything that changes: network, optimiser, learning rate, steps done."""

    def __init__(self, settings: dict[str, Any], classes: int, device: str) -> None:
        torch.manual_seed(settings["seed"])
        self.settings, self.device, self.done = settings, device, 0
        network = made(settings["arch"], settings["model_args"], classes).to(device)
        if settings["from"]:
            network.load_state_dict(load_file(settings["from"], device=device))
        self.network = network.to(memory_format=torch.channels_last)
        self.optimisers = optimisers(network, settings["optimiser"], settings["lr"], classes)
        self.bfloat16 = fast_in_bfloat16(device)
        self.an_epoch = -(-settings["rows"] // settings["batch_size"])
        self.steps = settings["epochs"] * self.an_epoch
        self.schedules = [
            torch.optim.lr_scheduler.OneCycleLR(
                each, max_lr=settings["lr"], total_steps=self.steps, pct_start=WARM_UP
            )
            for each in self.optimisers
        ]

    @property
    def side(self) -> int:
        """Pixels on a side that the images have now."""
        before = self.done // self.an_epoch
        for side, epochs in self.settings["sides"]:
            if before < epochs:
                return int(side)
            before -= epochs
        return int(self.settings["side"])

    def rows(self, step: int) -> Tensor:
        """The indices of a step's images: every epoch in an order of its own."""
        epoch, place = divmod(step, self.an_epoch)
        generator = torch.Generator().manual_seed(self.settings["seed"] * 10_000 + epoch)
        order = torch.randperm(self.settings["rows"], generator=generator)
        size = self.settings["batch_size"]
        return order[place * size : (place + 1) * size].to(self.device)

    def logits(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W), normalised. Returns (N, K) float32."""
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=self.bfloat16):
            found: Tensor = self.network(images.contiguous(memory_format=torch.channels_last))
        return found.float()

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross entropy of a batch, after which all is one step further."""
        self.network.train()
        loss = F.cross_entropy(self.logits(resized(images, self.side)), labels)
        self.network.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for each in (*self.optimisers, *self.schedules):
            each.step()
        self.done += 1
        return loss.detach()

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor, side: int) -> float:
        """images: (N, H, W, 3) uint8, seen with the given side."""
        self.network.eval()
        right = 0
        for start in range(0, len(labels), 500):
            batch = resized(normalised(images[start : start + 500]), side)
            right += int((self.logits(batch).argmax(1) == labels[start : start + 500]).sum())
        return right / len(labels)

    def save(self, path: Path) -> None:
        state = {
            "settings": self.settings,
            "done": self.done,
            "network": self.network.state_dict(),
            "optimisers": [each.state_dict() for each in self.optimisers],
            "schedules": [each.state_dict() for each in self.schedules],
        }
        new = path.with_name(path.name + ".new")
        torch.save(state, new)
        os.replace(new, path)

    def load(self, path: Path) -> None:
        """Raises SystemExit when it was kept by another command."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["settings"] != self.settings:
            raise SystemExit(f"{path} was kept by another command: {state['settings']}")
        self.done = state["done"]
        self.network.load_state_dict(state["network"])
        for each, kept in zip(self.optimisers, state["optimisers"], strict=True):
            each.load_state_dict(kept)
        for each, kept in zip(self.schedules, state["schedules"], strict=True):
            each.load_state_dict(kept)


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


def resized(images: Tensor, side: int) -> Tensor:
    """(N, 3, H, W) → (N, 3, side, side)."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)


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


def smaller(words: str) -> list[int]:
    """Of "16:6": side and epochs."""
    side, epochs = map(int, words.split(":"))
    return [side, epochs]


def card(arch: str, classes: Sequence[str]) -> str:
    """The model card."""
    names = ", ".join(f'"{name}"' for name in classes)
    mean, std = (", ".join(map(str, each)) for each in (CIFAR_MEAN, CIFAR_STD))
    return (
        f'arch = "{arch}"\nclass_names = [{names}]\ninput_size = [32, 32]\n'
        f"mean = [{mean}]\nstd = [{std}]\n"
    )


def timm_config(arch: str, arguments: dict[str, Any], classes: Sequence[str]) -> str:
    """The config.json of a folder of timm's."""
    inputs = {"input_size": [3, 32, 32], "mean": CIFAR_MEAN, "std": CIFAR_STD, "crop_pct": 1.0}
    config = {
        "architecture": arch[5:],
        "num_classes": len(classes),
        "model_args": arguments,
        "pretrained_cfg": {**inputs, "interpolation": "bilinear"},
        "label_names": list(classes),
    }
    return json.dumps(config, indent=2) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_cifar")
    parser.add_argument("test", type=Path, metavar="TEST.npz")
    parser.add_argument("train", type=Path, nargs="+", metavar="TRAIN.npz")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--arch", default="resnet34-kuangliu")
    parser.add_argument("--model-args", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--optimiser", choices=("sgd", "muon"), default="sgd")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument(
        "--sides", type=smaller, nargs="+", default=[], metavar="SIDE:EPOCHS", help="at first"
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--cutout", type=int, default=8, help="side of the square, 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--from", default="", metavar="EARLIER", help="weights to begin with")
    parser.add_argument("--steps", type=int, default=0)
    options = parser.parse_args(words)
    images, labels, classes = read(options.train)
    keys = ["arch", "model_args", "optimiser", "epochs", "sides", "batch_size", "lr", "cutout"]
    keys += ["seed", "from"]
    side = images.shape[1]
    settings = {"rows": len(labels), "side": side, **{key: getattr(options, key) for key in keys}}
    training = Training(settings, len(classes), options.device)
    partial = options.output.with_name(options.output.name + ".partial")
    if partial.exists():
        training.load(partial)
        _say(f"going on after {training.done} of {training.steps} steps")
    images, labels = images.to(options.device), labels.to(options.device)
    test_images, test_labels = (each.to(options.device) for each in read([options.test])[:2])
    begun = training.done
    start, since = time.perf_counter(), begun
    while training.done < training.steps:
        now, step = training.side, training.done
        rows = training.rows(step)
        generator = torch.Generator().manual_seed((options.seed + 1) * 1_000_000 + step)
        loss = training.step(augmented(images[rows], options.cutout, generator), labels[rows])
        last = training.done - begun == options.steps
        if training.done % training.an_epoch == 0:
            some = slice(None, None, max(1, len(test_labels) // SAMPLE))  # the file may be sorted
            few = test_labels[some]
            right = training.accuracy(test_images[some], few, now)
            epoch = training.done // training.an_epoch
            _say(f"epoch {epoch} of {options.epochs}: {100 * right:.2f} % of {len(few):,} right")
        if training.done % EVERY == 0 or last:
            rate = (training.done - since) * options.batch_size / (time.perf_counter() - start)
            _say(
                f"step {training.done} of {training.steps} at {now} px: loss {float(loss):.3f}, "
                f"{rate:.1f} images/s"
            )
            start, since = time.perf_counter(), training.done
            if not options.steps:
                training.save(partial)
        if last:
            return 0
    state = {key: value.cpu().contiguous() for key, value in training.network.state_dict().items()}
    if options.arch.startswith("timm:"):
        options.output.mkdir(exist_ok=True)
        text = timm_config(options.arch, options.model_args, classes)
        (options.output / "config.json").write_text(text, encoding="utf-8")
        save_file(state, options.output / "model.safetensors")
    else:
        save_file(state, options.output)
        text = card(options.arch, classes)
        options.output.with_suffix(".toml").write_text(text, encoding="utf-8")
    partial.unlink(missing_ok=True)
    right = training.accuracy(test_images, test_labels, side)
    print(f"wrote {options.output}: {100 * right:.2f} % right")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
