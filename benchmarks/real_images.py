"""What a handful of real images is worth: detection and false alarms by their number.

    python -m benchmarks.real_images DATA [--draws 5] [--numbers 10,30,100,300,1000]
        [--work FOLDER] [--figure FILE.png] [-o FILE.json]
    python -m benchmarks.real_images CHECKPOINT --id IMAGES --ood NAME=IMAGES … --accuracy SHARE
        [--options="--arch …"] [--invert="--total 150 --objective short --no-sensitivity"]
        [--no-batchnorm [--train IMAGES]] …

Runs on the CIFAR-10 networks of the folder DATA, or on a network and images of your own. One random
half of the test images are the real images that a user may have, without labels; the other half is
in-distribution (ID) when detectors are compared. With --no-batchnorm, detectors are compared that
networks without BatchNorm allow, each fitted on virtual images, on real ones and on both, and on
all images of --train. With a WORK folder that is kept, it resumes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.detector_pages import INSIDE, NETWORKS, PUBLISHED, SETS, Work
from benchmarks.measure import machine
from oodcli import detectors
from oodcli.detectors.base import Detector
from oodcli.detectors.calibration import Calibration, calibrate
from oodcli.errors import DetectorError
from oodcli.features import Features
from oodcli.files.cache import open_cache
from oodcli.metrics import auroc, tnr95
from oodcli.stages.fit import HELD_OUT_FROM

FREE = ("energy", "gen", "ang++", "peak-energy")
NAMES = (*FREE, "1c-sum", "c2ir-z", "c2ir-peak", "knn", "nci")
WITHOUT_FREE = ("msp", "energy", "gen", "davis", "peak-energy", "lts")
WITHOUT_FITTED = ("knn", "she", "nci", "fdbd", "ora", "mds++", "rmds++", "vim")
"""Without BatchNorm; those that the network allows."""
RATE = 0.05
"""Nominal rate of false alarms."""

Blocks = Sequence[Features]


@dataclass(frozen=True)
class Found:
    """Percent, mean over the OOD sets. false_alarms: of ID images at a nominal ``RATE``; None where
    the calibration does not reach it."""

    auroc: float
    tnr95: float
    false_alarms: float | None


@dataclass(frozen=True)
class Site:
    """What was recorded of a network: noise, virtual images, an accuracy-matched pool of others, ID
    images to take real ones from and to compare on, OOD sets, and training images, if any."""

    noise: Blocks
    virtual: Blocks
    pool: Blocks
    inside: Blocks
    batchnorm: bool
    recorded: frozenset[str]
    rows: Tensor
    """A random order of the rows of ``inside``."""
    outside: Mapping[str, Blocks]
    train: Blocks = ()

    @property
    def half(self) -> int:
        return len(self.rows) // 2

    def allows(self, name: str) -> bool:
        return detectors.get(name).needs <= self.recorded

    def real(self, number: int, draw: int) -> tuple[Blocks, Blocks, Blocks]:
        """Real images: all, those to fit on and those held out, every fifth."""
        generator = torch.Generator().manual_seed(draw)
        chosen = self.rows[: self.half][torch.randperm(self.half, generator=generator)[:number]]
        held_out = torch.arange(number) % 5 == 0
        parts = (chosen, chosen[~held_out], chosen[held_out])
        first, second, third = (picked(self.inside, part.sort().values) for part in parts)
        return first, second, third

    def compare(self, detector: Detector, calibration: Calibration | None) -> Found:
        inside = scores(detector, picked(self.inside, self.rows[self.half :].sort().values))
        pairs = []
        for blocks in self.outside.values():
            both = inside.numpy(), scores(detector, blocks).numpy()
            pairs.append((auroc(*both), tnr95(*both)))
        area, found = (100 * fmean(column) for column in zip(*pairs, strict=True))
        alarms = None
        if calibration is not None and calibration.resolution <= RATE:
            alarms = 100 * float((inside > calibration.threshold(RATE)).double().mean())
        return Found(area, found, alarms)


def picked(blocks: Blocks, rows: Tensor) -> Blocks:
    """Rows of all blocks in turn. rows: (N,), ascending."""
    found, first = [], 0
    for block in blocks:
        here = rows[(rows >= first) & (rows < first + len(block))] - first
        if len(here):
            found.append(block.select(here))
        first += len(block)
    return found


def scores(detector: Detector, blocks: Blocks) -> Tensor:
    return torch.cat([detector.score(block) for block in blocks])


def fitted(name: str, train: Blocks, **more: Any) -> Detector:
    return detectors.get(name).fit(train, **more)


def ways(site: Site, number: int, draw: int) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Each way to use the real images: its name, and what measures it. A detector fitted on real
    images is calibrated as ``fit`` does it."""
    real, rest, held_out = site.real(number, draw)

    def on(detector: Detector, *, pool: bool) -> Found:
        pools = [scores(detector, site.pool)] if pool else []
        found = [scores(detector, real)] if number else []
        return site.compare(detector, calibrate(found, pools, 0.9) if found or pools else None)

    def on_real(name: str, beside: Blocks = (), **more: Any) -> Found:
        calibration = None
        if number >= HELD_OUT_FROM:
            first = fitted(name, [*beside, *rest], **more)
            calibration = calibrate([scores(first, held_out)], [], None)
        return site.compare(fitted(name, [*beside, *real], **more), calibration)

    def parted() -> Found:
        detector = fitted("c2ir-peak", rest, noise=site.noise, pool=held_out)
        return site.compare(detector, calibrate([scores(detector, held_out)], [], None))

    if not site.batchnorm:
        for name in filter(site.allows, WITHOUT_FREE):
            yield name, partial(on, detectors.get(name)(), pool=not number)
        for name in filter(site.allows, WITHOUT_FITTED):
            detector = fitted(name, site.virtual)
            yield f"{name} on virtual images", partial(on, detector, pool=not number)
            if site.train and not number:
                yield f"{name} on training images", partial(on, fitted(name, site.train), pool=True)
            if number >= HELD_OUT_FROM:
                more: dict[str, Any] = {"k": min(50, number // 20)} if name == "knn" else {}
                yield f"{name} on real images", partial(on_real, name, **more)
                yield f"{name} on both", partial(on_real, name, site.virtual, **more)
        return
    free = {name: detectors.get(name)() for name in FREE}
    noise = {"1c-sum": fitted("1c-sum", site.noise)}
    deviations = {"c2ir-z on virtual images": fitted("c2ir-z", site.virtual)}
    for name, detector in {**free, **noise, **deviations}.items():
        yield name, partial(on, detector, pool=not number)
    if number:
        yield "1c-sum, pool", partial(on, noise["1c-sum"], pool=True)
    yield (
        "c2ir-peak on virtual images, pool",
        lambda: on(fitted("c2ir-peak", site.virtual, noise=site.noise, pool=site.pool), pool=True),
    )
    if number:
        yield (
            "c2ir-peak on virtual images, scaled on real ones",
            lambda: on(fitted("c2ir-peak", site.virtual, noise=site.noise, pool=real), pool=False),
        )
    if number >= HELD_OUT_FROM:
        yield "c2ir-peak on real images", parted
        yield "c2ir-z on real images", lambda: on_real("c2ir-z")
        yield "nci on real images", lambda: on_real("nci")
        yield "knn on real images", lambda: on_real("knn", k=max(1, min(50, number // 20)))


@dataclass(frozen=True)
class Network:
    """name: of its folder. images: set → IMAGES, the first ID. options: of the model. inverting: of
    ``invert``. train: IMAGES."""

    name: str
    checkpoint: str
    accuracy: str
    images: Mapping[str, str]
    options: Sequence[str] = ()
    inverting: Sequence[str] = ("--per-class", "50")
    batchnorm: bool = True
    train: str = ""


def of_cifar(checkpoint: str, data: Path) -> Network:
    images = {name: str(data / f"{name}.npz") for name in (INSIDE, *SETS)}
    return Network(checkpoint.partition("-")[0], checkpoint, PUBLISHED[checkpoint], images)


def record(work: Work, network: Network) -> None:
    """Caches of a network, in the folder of its name."""
    (work.folder / network.name).mkdir(exist_ok=True)
    records = ("--for", ",".join(NAMES)) if network.batchnorm else ()

    def run(name: str, command: str, *words: str) -> str:
        output = f"{network.name}/{name}.h5"
        first = (command, network.checkpoint, *words, *network.options)
        work.run(output, *first, "-o", output, "--force")
        return output

    for name, images in network.images.items():
        run(name, "extract", images, *records)
    if network.train:
        run("train", "extract", network.train, *records)
    if network.batchnorm:
        run("noise", "extract", "noise:uniform?n=2000", *records)
    for name, seed in (("virtual", "0"), ("pool", "1")):
        made = run(f"{name}-images", "invert", *network.inverting, "--seed", seed)
        matched = ("--match-accuracy", network.accuracy) if name == "pool" else ()
        run(name, "extract", made, *matched, *records)


def opened(folder: Path, network: Network, stack: ExitStack) -> Site:
    names = NAMES if network.batchnorm else (*WITHOUT_FREE, *WITHOUT_FITTED)
    kinds = [detectors.get(name) for name in names]
    needs = frozenset[str]().union(*(kind.needs | kind.fit_needs() for kind in kinds))
    recorded = stack.enter_context(open_cache(folder / "virtual.h5")).recorded

    def read(name: str) -> Blocks:
        cache = stack.enter_context(open_cache(folder / f"{name}.h5"))
        return list(cache.rows(needs & cache.recorded))

    first, *others = network.images
    inside = unlabelled(read(first))
    train = unlabelled(read("train")) if network.train else ()
    count = sum(map(len, inside))
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    outside = {name: read(name) for name in others}
    noise = read("noise") if network.batchnorm else []
    virtual, pool = read("virtual"), read("pool")
    return Site(noise, virtual, pool, inside, network.batchnorm, recorded, rows, outside, train)


def unlabelled(blocks: Blocks) -> Blocks:
    return [replace(block, label=torch.full((len(block),), -1)) for block in blocks]


def measure(site: Site, numbers: Sequence[int], draws: int) -> dict[str, dict[str, Any]]:
    """Way → number of real images → mean and standard deviation over the draws."""
    found: dict[tuple[str, int], list[Found]] = defaultdict(list)
    for number in (0, *numbers):
        for draw in range(draws if number else 1):
            for name, way in ways(site, number, draw):
                with suppress(DetectorError):  # a draw may lack rows of a class
                    found[name, number].append(way())
    table: dict[str, dict[str, Any]] = defaultdict(dict)
    for (name, number), each in found.items():
        columns = {
            "auroc": [one.auroc for one in each],
            "tnr95": [one.tnr95 for one in each],
            "false_alarms": [one.false_alarms for one in each if one.false_alarms is not None],
        }
        table[name][str(number)] = {
            word: [round(fmean(v), 2), round(stdev(v), 2) if len(v) > 1 else 0.0]
            for word, v in columns.items()
            if v
        }
    return table


def draw(found: Mapping[str, Any], path: Path) -> None:
    """TNR95 and false alarms against the number of real images, mean over the networks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left_out = ("nci", "peak", "gen", "ang++", "1c-sum, pool")
    shown = [name for name in next(iter(found.values())) if not name.startswith(left_out)]
    for index, name in enumerate(shown):
        for axes, word in ((left, "tnr95"), (right, "false_alarms")):
            points: dict[int, list[float]] = defaultdict(list)
            for network in found.values():
                for number, row in network[name].items():
                    if word in row:
                        points[int(number)].append(row[word][0])
            numbers = sorted(points)
            axes.plot(
                [max(3, number) for number in numbers],
                [fmean(points[number]) for number in numbers],
                color=f"C{index}",
                marker="o",
                markersize=3,
                label=name,
            )
    for axes, title in ((left, "OOD images found at 95 % TPR, %"), (right, "False alarms, %")):
        axes.set_xscale("log")
        ticks = [3, 10, 30, 100, 300, 1000]
        axes.set_xticks(ticks, ["0", *map(str, ticks[1:])])
        axes.minorticks_off()
        axes.set_xlabel("real images")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    right.axhline(100 * RATE, color="black", linewidth=0.8, linestyle="--")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
    )
    figure.savefig(path, dpi=150)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--id")
    parser.add_argument("--ood", action="append", default=[])
    parser.add_argument("--accuracy")
    parser.add_argument("--options", type=shlex.split, default=[])
    parser.add_argument("--invert", type=shlex.split, default=Network.inverting)
    parser.add_argument("--no-batchnorm", action="store_true")
    parser.add_argument("--train", metavar="IMAGES")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--numbers", default="10,30,100,300,1000")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.id and not (options.ood and options.accuracy):
        parser.error("--id needs --ood and --accuracy")
    if options.train and not (options.id and options.no_batchnorm):
        parser.error("--train needs --id and --no-batchnorm")
    numbers = [int(word) for word in options.numbers.split(",")]
    found = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        data = options.data.resolve()
        work = Work(options.work or Path(folder), data)
        work.folder.mkdir(exist_ok=True, parents=True)
        networks = {name: of_cifar(checkpoint, data) for name, checkpoint in NETWORKS.items()}
        if options.id:
            images = {"id": options.id, **dict(each.split("=", 1) for each in options.ood)}
            images = {name: str(Path(each).resolve()) for name, each in images.items()}
            networks = {
                data.stem: Network(
                    data.stem,
                    str(data),
                    options.accuracy,
                    images,
                    options.options,
                    options.invert,
                    not options.no_batchnorm,
                    str(Path(options.train).resolve()) if options.train else "",
                )
            }
        for called, network in networks.items():
            record(work, network)
            site = opened(work.folder / network.name, network, stack)
            found[called] = measure(site, numbers, options.draws)
            for name, row in found[called].items():
                for number, each in row.items():
                    told = "  ".join(f"{word} {m:.2f} ± {s:.2f}" for word, (m, s) in each.items())
                    print(f"{called:10} {number:>5} {name:50} {told}", flush=True)
    if options.figure:
        draw(found, options.figure)
    if options.output:
        text = json.dumps({"machine": machine(), "networks": found}, indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
