"""How cost grows: with images, with resolution, with the network; and what it comes to in the end.

    python -m benchmarks.bench_growth CHECKPOINT [--images 500 1000 2000 4000]
        [--per-class 20 40 60] [--rounds 3]

Against the number of images: seconds of the commands score, extract, invert and fit, without the
start of Python, on CHECKPOINT (fit: on generated features), and the bytes of the files they leave.
Against the pixels of an image (ResNet-18, random weights) and against the multiply-adds of a
network (CIFAR ResNets, random weights): seconds for an image to be recorded for the detectors
without gradients, and for an image-step of inversion, uncompiled, float32. 'results' has for each
the straight line of least squares through the medians: what is there at nothing, what is added by
one more, and R². 'extrapolated' is what that comes to on this machine: a thousand million images
scored, ImageNet-1k inverted with a ResNet-50 at 224 × 224.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from benchmarks.bench_fit import generate
from benchmarks.bench_memory import single_pass
from benchmarks.measure import in_turns
from oodcli.cli import app
from oodcli.inversion.invert import Plan, prepare
from oodcli.inversion.step import Step
from oodcli.networks import architectures
from oodcli.networks.card import Overrides
from oodcli.networks.classifier import Classifier
from oodcli.networks.load import load_classifier
from oodcli.recording.recorder import Recorder, recordable
from oodcli.records import CHEAP
from oodcli.stages.model import Checkpoint, Model

SIDES = (32, 64, 112, 224)
NETWORKS = ("resnet8-cifar", "resnet20-cifar", "resnet32-cifar", "resnet20-cifar-w32")
FITTED, FITTED_WIDTH = (2500, 5000, 10_000, 20_000), 256
SCORED = 1e9
IMAGENET_CLASSES = 1000
PER_CLASS = (10, 100, 2500)


@dataclass(frozen=True)
class Line:
    """points: (x, y), in the units that are named."""

    y: str
    x: str
    points: tuple[tuple[float, float], ...]

    def fitted(self) -> tuple[float, float, float]:
        """y at x = 0, y for one more x, R²."""
        x, y = np.array(self.points, dtype=np.float64).T
        slope, at_zero = np.polyfit(x, y, 1)
        rest, spread = ((y - at_zero - slope * x) ** 2).sum(), ((y - y.mean()) ** 2).sum()
        return float(at_zero), float(slope), float(1 - rest / spread) if spread else 1.0


def command(*words: object) -> None:
    """A command as a user would give it, in this process."""
    if app([*map(str, words), "--force", "--quiet"], standalone_mode=False):
        raise SystemExit(f"oodcli {' '.join(map(str, words))} failed")


def by_images(
    checkpoint: Path, folder: Path, sizes: list[int], per_class: list[int], rounds: int
) -> dict[str, Line]:
    """The commands, and the files they leave."""
    chosen = [word for name in single_pass(checkpoint) for word in ("-d", name)]
    classes = load_classifier(checkpoint).num_classes
    work: dict[tuple[str, int], Callable[[], None]] = {}
    files: dict[tuple[str, int], Path] = {}
    for n in sizes:
        noise, cache = f"noise:uniform?n={n}", folder / f"{n}.h5"
        score = ("score", checkpoint, noise, *chosen, "-o", folder / "scores.csv")
        work["score", n] = partial(command, *score)
        work["extract", n] = partial(command, "extract", checkpoint, noise, "-o", cache)
        cached = ("score", cache, "-d", "all", "-o", folder / "scores.csv")
        work["score a cache", n] = partial(command, *cached)
        files["bytes of a cache", n] = cache
    for each in per_class:
        n = each * classes
        virtual, cache = folder / f"virtual-{n}.h5", folder / f"virtual-{n}.features.h5"
        invert = ("invert", checkpoint, "--per-class", each, "--no-compile", "-o", virtual)
        work["invert", n] = partial(command, *invert)
        work["extract virtual images", n] = partial(
            command, "extract", checkpoint, virtual, "-o", cache
        )
        files["bytes of virtual images", n] = virtual
        files["bytes of a cache of virtual images", n] = cache
    for n in FITTED:
        cache = folder / f"features-{n}.h5"
        generate(cache, n, FITTED_WIDTH, seed=1)
        fit = ("fit", cache, "-d", "mds", "-d", "klm", "-o", folder / "artefacts")
        work[f"fit mds and klm, {FITTED_WIDTH} features", n] = partial(command, *fit)
    next(iter(work.values()))()  # whatever is made once
    times = in_turns({f"{name}|{n}": run for (name, n), run in work.items()}, rounds, warm_up=0)
    lines = {}
    for name in dict.fromkeys(name for name, _ in work):
        points = [(n, statistics.median(times[f"{name}|{n}"])) for each, n in work if each == name]
        lines[name] = Line("seconds", "image", tuple(points))
    for name in dict.fromkeys(name for name, _ in files):
        points = [(n, path.stat().st_size) for (each, n), path in files.items() if each == name]
        lines[name] = Line("bytes", "image", tuple(points))
    return lines


def untrained(network: nn.Module, path: Path, **overrides: Any) -> Classifier:
    """The network as a command would load it, on the device that it would choose."""
    torch.save(network.state_dict(), path)
    device = Model(Checkpoint(path)).device()
    return load_classifier(path, Overrides(**overrides), device=device)


def per_image(
    classifiers: Mapping[str, Classifier], batch_size: int, rounds: int, precision: str = "float32"
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds for an image to be recorded, and for an image-step of inversion, of each."""
    work: dict[str, Callable[[], object]] = {}
    for name, classifier in classifiers.items():
        preprocessing = classifier.preprocessing
        images = torch.randn(
            (batch_size, preprocessing.channels, *preprocessing.input_size),
            generator=torch.Generator().manual_seed(0),
        ).to(classifier.device)
        labels = (torch.arange(batch_size) % classifier.num_classes).to(classifier.device)
        leaf = images.clone().requires_grad_()
        step = Step(classifier, Plan((0,), 1).objective, precision)
        work[f"record {name}"] = partial(
            Recorder(classifier, CHEAP & recordable(classifier)), images
        )
        work[f"step {name}"] = partial(step.gradient, leaf, leaf, labels)
    medians = {
        name: statistics.median(spent) / batch_size
        for name, spent in in_turns(work, rounds).items()
    }
    return (
        {name: medians[f"record {name}"] for name in classifiers},
        {name: medians[f"step {name}"] for name in classifiers},
    )


def by_resolution(folder: Path, rounds: int) -> dict[str, Line]:
    network, path = models.resnet18(), folder / "resnet18.pt"
    classifiers = {str(side): untrained(network, path, input_size=(side, side)) for side in SIDES}
    recorded, stepped = per_image(classifiers, 4, rounds)
    return {
        "an image recorded, ResNet-18": Line(
            "seconds", "pixel", tuple((side**2, recorded[str(side)]) for side in SIDES)
        ),
        "an image-step, ResNet-18": Line(
            "seconds", "pixel", tuple((side**2, stepped[str(side)]) for side in SIDES)
        ),
    }


def multiply_adds(classifier: Classifier) -> float:
    """Of one image."""
    preprocessing = classifier.preprocessing
    shape = (1, preprocessing.channels, *preprocessing.input_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        classifier.network(torch.zeros(shape, device=classifier.device))
    return float(counter.get_total_flops()) / 2


def by_network(folder: Path, rounds: int) -> tuple[dict[str, Line], dict[str, dict[str, float]]]:
    classifiers = {
        name: untrained(architectures.build(name, 10), folder / f"{name}.pt", arch=name)
        for name in NETWORKS
    }
    recorded, stepped = per_image(classifiers, 100, rounds)
    size = {name: multiply_adds(each) for name, each in classifiers.items()}
    lines = {
        "an image recorded, CIFAR ResNets": Line(
            "seconds", "multiply-add", tuple((size[name], recorded[name]) for name in NETWORKS)
        ),
        "an image-step, CIFAR ResNets": Line(
            "seconds", "multiply-add", tuple((size[name], stepped[name]) for name in NETWORKS)
        ),
    }
    networks = {
        name: {
            "parameters": sum(p.numel() for p in classifier.network.parameters()),
            "multiply_adds": size[name],
            "recorded_per_second": 1 / recorded[name],
            "image_steps_per_second": 1 / stepped[name],
        }
        for name, classifier in classifiers.items()
    }
    return lines, networks


def extrapolated(folder: Path, scored: Line) -> dict[str, dict[str, float]]:
    """What the lines come to, in days of this machine."""
    at_zero, slope, _ = scored.fitted()
    found = {f"score {SCORED:.0e} images, CHECKPOINT": {"days": (at_zero + SCORED * slope) / 86400}}
    resnet = untrained(models.resnet50(), folder / "resnet50.pt", input_size=(224, 224))
    precision = Model(Checkpoint(folder / "resnet50.pt")).precision("auto")  # as invert has it
    recorded, stepped = per_image({"": resnet}, 4, 2, precision)
    days = SCORED * recorded[""] / 86400
    found[f"record {SCORED:.0e} images, ResNet-50 at 224"] = {"days": days}
    # A batch of four as the trial; the time of an image hardly depends on it.
    plan, _, seconds = prepare(resnet, Plan((0, 1, 2, 3), 1, precision=precision), compiled=False)
    for per_class in PER_CLASS:
        count = IMAGENET_CLASSES * per_class
        found[f"invert ImageNet-1k, {per_class:,} a class, ResNet-50 at 224"] = {
            "days": count * seconds / 4 / 86400,
            "steps": plan.total_steps,
            "seconds_per_image": seconds / 4,
            "seconds_per_full_step": stepped[""],
        }
    return found


def rounded(rows: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {key: float(f"{value:.4g}") for key, value in row.items()}
        for name, row in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[500, 1000, 2000, 4000])
    parser.add_argument("--per-class", type=int, nargs="+", default=[20, 40, 60])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        lines = by_images(
            options.checkpoint, folder, options.images, options.per_class, options.rounds
        )
        lines |= by_resolution(folder, options.rounds)
        more, networks = by_network(folder, options.rounds)
        lines |= more
        found = extrapolated(folder, lines["score"])
    results = {}
    for name, line in lines.items():
        at_zero, slope, r_squared = line.fitted()
        row = {"at_zero": at_zero, "per_one_more": slope, "r_squared": r_squared}
        results[f"{name}: {line.y} per {line.x}"] = row
    report = {
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "results": rounded(results),
        "networks": rounded(networks),
        "extrapolated": rounded(found),
        "points": {name: [list(point) for point in line.points] for name, line in lines.items()},
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
