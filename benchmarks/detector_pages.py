"""The figures of the detectors' pages, in docs/detectors/figures.json.

    python -m benchmarks.detector_pages measure DATA [--only NAME …] [--rows 2000]
        [--fit-rows 5000] [--per-class 50] [--work FOLDER] [--figures FILE]

Runs oodcli on the networks and images of the folder DATA. With --only, these detectors alone are
measured and the others' figures are kept. With a WORK folder that is kept, it resumes.
docs/hooks.py makes the tables of the pages from the file when the site is built.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.bench_startup import MAIN
from benchmarks.measure import machine
from oodcli import detectors

FIGURES = Path(__file__).parents[1] / "docs" / "detectors" / "figures.json"

NETWORKS = {"ResNet-20": "resnet20-12fca82f.th", "ResNet-32": "resnet32-d509ac18.th"}
PUBLISHED = {"resnet20-12fca82f.th": "0.9173", "resnet32-d509ac18.th": "0.9263"}
"""Their test accuracies."""

INSIDE = "cifar10-test"
TRAINED_ON = "cifar10-train-10k"
SETS = ("textures", "scenes", "notmnist", "fashion-mnist", "imagenet-samples")
NOISE = "noise"
NOISE_IMAGES = "noise:uniform?n=1000&seed=1"
"""Another seed than that of 1c-sum's own noise."""

ROWS = "auroc and tnr95"
"""The key of a network's figures."""

OWN_NETWORK = ("joint-energy", "godin", "mos", "mc-dropout")
"""They need a network trained for them, which these are not."""


@dataclass(frozen=True)
class Ways:
    """Names of detectors, by what they are fitted on and measured with.

    free: nothing. either: virtual images, those of a pool, and real ones. virtual: virtual images
    alone. noise: the
    images of ``reference_images``. pool: virtual images, noise, and other virtual images, matched
    to the accuracy. ood: real images and OOD rows, of every set but the one that is scored.
    """

    free: Sequence[str]
    either: Sequence[str]
    virtual: Sequence[str]
    noise: Sequence[str]
    pool: Sequence[str]
    ood: Sequence[str]

    @classmethod
    def of(cls, names: Iterable[str]) -> Ways:
        """All names but those of detectors that need a network of their own."""
        kinds = {name: detectors.get(name) for name in names if name not in OWN_NETWORK}
        pool = [name for name, kind in kinds.items() if kind.needs_pool]
        virtual = [n for n, kind in kinds.items() if "layers.sensitivity" in kind.fit_needs()]
        noise = [name for name, kind in kinds.items() if kind.reference_images]
        either = [
            name
            for name, kind in kinds.items()
            if kind.fitted and not kind.needs_ood and name not in (*pool, *virtual, *noise)
        ]
        free = [name for name, kind in kinds.items() if not kind.fitted]
        ood = [name for name, kind in kinds.items() if kind.uses_ood]
        return cls(free, either, virtual, noise, pool, ood)


@dataclass(frozen=True)
class Work:
    """A folder in which commands run; what was run before, to the same output, is not run again."""

    folder: Path
    data: Path

    def run(self, output: str, *words: str) -> str:
        """What ``oodcli WORDS`` printed. output: a name for it, unlike all others. Raises
        SystemExit when it fails."""
        kept = self.folder / f"{output}.done.json"
        command = shlex.join(["oodcli", *words])
        if kept.exists():
            before = json.loads(kept.read_text(encoding="utf-8"))
            if before["command"] == command:
                return str(before["printed"])
        print(command, file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, "-c", MAIN, *map(self._located, words)],
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{command}\n{done.stderr}")
        text = json.dumps({"command": command, "printed": done.stdout})
        kept.write_text(text, encoding="utf-8")
        return done.stdout

    def _located(self, word: str) -> str:
        known = word in NETWORKS.values()
        return str(self.data / "checkpoints" / word) if known else word

    def sample(self, name: str, rows: int, *, of: Sequence[str] = ()) -> None:
        """NAME.npz: ``rows`` rows evenly spaced over a set, or over each of some sets."""
        import numpy as np

        target = self.folder / f"{name}.npz"
        if target.exists():
            return
        images, more = [], {}
        for each in of or [name]:
            with np.load(self.data / f"{each}.npz") as found:
                count = len(found["images"])
                few = min(rows, count)
                chosen = np.arange(few) * count // few  # rows are sorted by class
                images.append(found["images"][chosen])
                if not of and "labels" in found:
                    more = {"labels": found["labels"][chosen], "classes": found["classes"]}
        np.savez(target, images=np.concatenate(images), **more)


def measure(
    names: Sequence[str], data: Path, folder: Path, rows: int, fit_rows: int, per_class: int
) -> dict[str, Any]:
    """What figures.json holds, for these detectors."""
    import numpy as np

    work = Work(folder, data.resolve())
    for name in (INSIDE, *SETS):
        work.sample(name, rows)
    work.sample(TRAINED_ON, fit_rows)
    for name in SETS:
        work.sample(f"not-{name}", rows // 4, of=[other for other in SETS if other != name])
    counts = {}
    for name in (INSIDE, *SETS, TRAINED_ON, *(f"not-{name}" for name in SETS)):
        with np.load(folder / f"{name}.npz") as found:
            counts[name] = len(found["images"])
    networks: dict[str, Any] = {}
    commands: list[str] = []
    for network, checkpoint in NETWORKS.items():
        measured = _Network(work, checkpoint, per_class)
        networks[network] = measured.figures(Ways.of(names))
        commands = commands or measured.commands
    about = machine()
    return {
        "date": date.today().isoformat(),
        "machine": f"{about['logical_cores']} cores of {about['processor'] or about['system']}",
        "versions": {
            "python": about["python"],
            **{name: version(name) for name in ("oodcli", "torch", "numpy", "scikit-learn")},
        },
        "images": {**counts, NOISE: 1000},
        "virtual_images_per_class": per_class,
        "commands": commands,
        "networks": networks,
    }


def merged(before: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Earlier figures with those of some detectors measured again. When and how these were
    measured is under ``later``. Raises SystemExit when they are not of the same images."""
    for key in ("images", "virtual_images_per_class"):
        if before[key] != found[key]:
            raise SystemExit(
                f"{key} differ from those of the earlier figures: {found[key]}, {before[key]}; "
                "measure with the same --rows, --fit-rows and --per-class"
            )
    again = {row.partition("[")[0] for each in found["networks"].values() for row in each[ROWS]}
    networks = {}
    for network, each in before["networks"].items():
        kept = {way: row for way, row in each[ROWS].items() if way.partition("[")[0] not in again}
        networks[network] = {**each, ROWS: {**kept, **found["networks"][network][ROWS]}}
    how = {key: found[key] for key in ("date", "machine", "versions", "commands")}
    earlier = [
        {**each, "detectors": left}
        for each in before.get("later", [])
        if (left := [name for name in each["detectors"] if name not in again])
    ]
    return {
        **before,
        "networks": networks,
        "later": [*earlier, {"detectors": sorted(again), **how}],
    }


class _Network:
    """A network on which detectors are measured. commands: all that were run."""

    def __init__(self, work: Work, checkpoint: str, per_class: int) -> None:
        self.work, self.checkpoint, self.per_class = work, checkpoint, str(per_class)
        self.stem = checkpoint.partition("-")[0]
        self.commands: list[str] = []
        (work.folder / self.stem).mkdir(exist_ok=True)

    def run(self, name: str, *words: str) -> str:
        """The output of a command, in the network's folder."""
        output = f"{self.stem}/{name}"
        self._run(output, *words, "-o", output, more=("--force",))
        return output

    def _run(self, output: str, *words: str, more: Sequence[str] = ()) -> str:
        self.commands.append(shlex.join(["oodcli", *words]))
        return self.work.run(output, *words, *more)

    def extract(self, name: str, images: str, *words: str) -> str:
        return self.run(name, "extract", self.checkpoint, images, *words)

    def fit(self, name: str, names: Sequence[str], *words: str) -> list[str]:
        """The artefacts."""
        if not names:
            return []
        folder = self.run(name, "fit", *words, *_options(names))
        return [f"{folder}/{each}.safetensors" for each in names]

    def evaluate(self, name: str, inside: str, **outside: str) -> dict[str, Any]:
        """What ``evaluate --json`` prints."""
        pairs = (word for set_, path in outside.items() for word in ("--ood", f"{set_}={path}"))
        words = ["evaluate", "--id", inside, *pairs, "--resamples", "0", "--json"]
        summary: dict[str, Any] = json.loads(self._run(f"{self.stem}/{name}", *words))
        return summary

    def figures(self, ways: Ways) -> dict[str, Any]:
        """Checkpoint, accuracy, and AUROC and TNR95 by detector and set."""
        names = [*ways.free, *ways.either, *ways.virtual, *ways.noise, *ways.pool, *ways.ood]
        known = ",".join(name for name in detectors.names() if name in names)
        artefacts = self._fitted(ways, known)
        scores = {}
        if real := [*ways.either, *(name for name in ways.ood if name not in ways.either)]:
            cache = self.extract(f"{TRAINED_ON}.features.h5", f"{TRAINED_ON}.npz", *_for(real))
            artefacts += self.fit("real", ways.either, cache)
        for name in (INSIDE, *SETS, NOISE):
            images = NOISE_IMAGES if name == NOISE else f"{name}.npz"
            rows = self.extract(f"{name}.features.h5", images, "--for", known)
            if ways.free or artefacts:
                scores[name] = self.run(
                    f"{name}.csv", "score", rows, *_options([*ways.free, *artefacts])
                )
        found: dict[str, dict[str, list[float]]] = {}
        accuracy = 0.0
        if scores:
            summary = self.evaluate("all", scores.pop(INSIDE), **scores)
            found, accuracy = _figures(summary), summary["id_accuracy"]
        if ways.either:
            found |= self._matched(ways.either)
        for name in SETS if ways.ood else ():
            ood = self.extract(f"not-{name}.features.h5", f"not-{name}.npz", *_for(ways.ood))
            learnt = self.fit(f"not-{name}", ways.ood, cache, "--ood", ood)
            inside, outside = (
                self.run(
                    f"{of}-by-not-{name}.csv",
                    *("score", f"{self.stem}/{of}.features.h5", *_options(learnt)),
                )
                for of in (INSIDE, name)
            )
            summary = self.evaluate(f"not-{name}-{name}", inside, **{name: outside})
            accuracy = summary["id_accuracy"]
            for detector, row in _figures(summary).items():
                found.setdefault(f"{detector}[ood]", {}).update(row)
        accuracy = round(100 * accuracy, 2)
        return {"checkpoint": self.checkpoint, "accuracy": accuracy, ROWS: found}

    def _matched(self, names: Sequence[str]) -> dict[str, dict[str, list[float]]]:
        """Figures of detectors fitted on virtual images that are matched to the accuracy."""
        cache = self._pool("matched.features.h5", *_for(names))
        artefacts = self.fit("matched", names, cache)
        scores = {
            name: self.run(
                f"{name}-matched.csv",
                *("score", f"{self.stem}/{name}.features.h5", *_options(artefacts)),
            )
            for name in (INSIDE, *SETS, NOISE)
        }
        found = _figures(self.evaluate("matched-figures", scores.pop(INSIDE), **scores))
        return {f"{name}[matched]": row for name, row in found.items()}

    def _pool(self, name: str, *words: str) -> str:
        """Features of other virtual images, which the network classifies as well as published."""
        again = ("invert", self.checkpoint, "--per-class", self.per_class, "--seed", "1")
        images = self.run("w.h5", *again)
        return self.extract(name, images, "--match-accuracy", PUBLISHED[self.checkpoint], *words)

    def _fitted(self, ways: Ways, known: str) -> list[str]:
        """Artefacts fitted without real images."""
        artefacts: list[str] = []
        if virtual := [*ways.either, *ways.virtual, *ways.pool]:
            images = self.run("v.h5", "invert", self.checkpoint, "--per-class", self.per_class)
            cache = self.extract("v.features.h5", images, "--for", known)
            artefacts += self.fit(
                "virtual", [name for name in virtual if name not in ways.pool], cache
            )
        if ways.noise or ways.pool:
            noise = self.extract("uniform.h5", "noise:uniform?n=2000&seed=0")
            artefacts += self.fit("one-class", ways.noise, noise)
        if ways.pool:
            three = (cache, "--noise", noise, "--calibrate", self._pool("pool.h5"))
            artefacts += self.fit("with-pool", ways.pool, *three)
        return artefacts


def _options(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        yield from ("-d", name)


def _for(names: Iterable[str]) -> tuple[str, str]:
    return "--for", ",".join(names)


def _figures(summary: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Detector → OOD set → AUROC and TNR95 in percent."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in summary["metrics"]:
        if row["metric"] in ("auroc", "tnr95") and row["set"] != "mean":
            name = row["detector"].rstrip("*")
            pair = found.setdefault(name, {}).setdefault(row["set"], [0.0, 0.0])
            pair[row["metric"] == "tnr95"] = round(100 * row["value"], 2)
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detector_pages")
    step = parser.add_subparsers(required=True).add_parser("measure")
    step.add_argument("data", type=Path, metavar="DATA")
    known = [name for name in detectors.names() if name not in OWN_NETWORK]
    step.add_argument("--only", nargs="+", metavar="NAME", choices=known)
    step.add_argument("--rows", type=int, default=2000)
    step.add_argument("--fit-rows", type=int, default=5000)
    step.add_argument("--per-class", type=int, default=50)
    step.add_argument("--work", type=Path)
    step.add_argument("--figures", type=Path, default=FIGURES)
    options = parser.parse_args(words)
    names = options.only or known
    with tempfile.TemporaryDirectory() as made:
        folder = options.work or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        sizes = options.rows, options.fit_rows, options.per_class
        found = measure(names, options.data, folder, *sizes)
    if options.only:
        found = merged(json.loads(options.figures.read_text(encoding="utf-8")), found)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    options.figures.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
