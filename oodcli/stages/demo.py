"""``oodcli demo``: every stage on a small network, trained on scikit-learn's digits, and other
images."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from oodcli import notes
from oodcli.errors import FileError
from oodcli.files.atomic import atomic, make_folder
from oodcli.networks.architectures import build
from oodcli.stages.evaluate import evaluate
from oodcli.stages.inspect import inspect
from oodcli.stages.model import Checkpoint, Model
from oodcli.stages.prepare import PrepareRequest, prepare
from oodcli.stages.score_job import ScoreRequest, score
from oodcli.stages.show import ShowRequest, show
from oodcli.stages.verdict import Deciding
from oodcli.stages.watching import Watch, Watching, unwatched, watched

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


ACCURACY = 0.99
"""What the network would have been published with."""

DETECTORS = ("c2ir-peak", "c2ir-z", "knn", "energy", "msp")


@dataclass(frozen=True)
class DemoStep:
    """A command of the demo. question: that it answers. words: those after ``oodcli``. result: what
    the function of that name returned."""

    question: str
    words: tuple[str, ...]
    result: Any


@dataclass(frozen=True)
class Demonstrated:
    """Summary of ``demo``. folder: with all files. steps: the commands, in order."""

    folder: Path
    steps: tuple[DemoStep, ...]

    @property
    def mean_auroc(self) -> Mapping[str, float]:
        """Detector → mean AUROC over the sets of images that are not digits."""
        found: Mapping[str, float] = self.steps[-1].result.mean_auroc
        return found


class _Command(NamedTuple):
    """run: is given a progress callback, and the command that the files record."""

    question: str
    words: tuple[str, ...]
    run: Callable[[Watch, str], Any]


def demo(
    output: Path,
    *,
    force: bool = False,
    watch: Watch | None = None,
    watching: Watching | None = None,
    finished: Callable[[DemoStep], None] | None = None,
) -> Demonstrated:
    """Train a network and run the whole pipeline on it. Logs each command before it runs. watch:
    called with the number of commands done and their total. watching: opens a progress callback
    per stage. finished: called with each command that is done. Raises FileError for a folder that
    exists."""
    if output.exists() and not force:
        raise FileError(f"{output} exists: choose another -o, or overwrite it with --force")
    watching = watching or unwatched
    commands = list(_commands(output, force, watching))
    advance = watched(watch, len(commands))
    with make_folder(output):
        notes.say(log, f"Training a small network on {TRAINED_ON} of scikit-learn's digits.", "")
        with watching("train") as told:
            held_out, crops = write_data(output, watched(told, TRAINED_ON, each=EPOCHS))
        notes.say(
            log,
            f"Wrote {output}: the checkpoint digits.safetensors and its model card, "
            f"{held_out} held-out digits, {crops} crops of photographs.",
            "",
        )
    steps = []
    for question, words, run in commands:
        command = shlex.join(["oodcli", *words])
        notes.say(log, f"\n# {question}\n$ {command}", "")
        with watching(words[0]) as told:
            steps.append(DemoStep(question, words, run(told, command)))
        if finished is not None:
            finished(steps[-1])
        advance(1)
    return Demonstrated(output, tuple(steps))


def _commands(output: Path, force: bool, watching: Watching) -> Iterator[_Command]:
    model = Model(Checkpoint(output / "digits.safetensors"))
    checkpoint, forced = str(model.path), ["--force"] * force
    sets = {
        "photographs": str(output / "photographs"),
        "noise": "noise:uniform?n=500",
        "blobs": "noise:blob?n=500",
    }
    files = {name: output / f"{name}.csv" for name in ("digits", *sets)}

    def step(question: str, run: Callable[[Watch, str], Any], *words: str) -> _Command:
        return _Command(question, (*words, *forced), run)

    def scoring(question: str, images: str, name: str) -> _Command:
        request = ScoreRequest(
            *(model, images, files[name], DETECTORS), deciding=Deciding(fpr=0.05), force=force
        )
        chosen = [word for each in DETECTORS for word in ("-d", each)]
        return step(
            question,
            lambda watch, command: score(replace(request, command=command), watch),
            *("score", checkpoint, images, *chosen, "--fpr", "0.05", "-o", str(files[name])),
        )

    yield step("What is this checkpoint?", lambda *_: inspect(model), "inspect", checkpoint)
    request = PrepareRequest(model, accuracy=ACCURACY, mirror=False, force=force)
    yield step(
        "Prepare it: virtual images, detectors and their calibration. No real image is used.",
        lambda _, command: prepare(replace(request, command=command), watching=watching),
        *("prepare", checkpoint, "--accuracy", str(ACCURACY), "--no-mirror"),
    )
    held_out = str(output / "digits-test.npz")
    yield scoring("Score digits that the network has not seen.", held_out, "digits")
    for name, images in sets.items():
        yield scoring(f"Score images that are not digits: {name}.", images, name)
    page = ShowRequest(files["photographs"], force=force)
    yield step(
        "Look at the photographs.",
        lambda watch, command: show(replace(page, command=command), watch),
        *("show", str(page.scores)),
    )
    ood = {name: files[name] for name in sets}
    report = output / "report"
    yield step(
        "How well do the scores separate them?",
        lambda watch, command: evaluate(
            files["digits"], ood, output=report, force=force, watch=watch, command=command
        ),
        *("evaluate", "--id", str(files["digits"])),
        *(word for name, path in ood.items() for word in ("--ood", f"{name}={path}")),
        *("-o", str(report)),
    )


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
