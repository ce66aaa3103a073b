"""oodcli's commands for one network of a configuration, each run once.

The commands run in the data folder and in this process, by the function that the console script
calls: there are hundreds, and the start of each would take two seconds. A command that ran before
with the same output is not run again; outputs and records are in the work folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np

from benchmarks.papers.config import Config, ImageSet, Network

Cell = list[float]
"""A value with the ends of its interval, in percent, or a value alone."""

Rows = dict[str, dict[str, dict[str, Cell]]]
"""Method → OOD set, or ``mean`` → metric → cell."""

WORK = "work"
"""Stands for the work folder in commands as they are shown."""


UNREADABLE = 3
"""Exit status of a command that could not read some images."""


@dataclass
class Runs:
    """records: detectors whose features ``extract`` records. commands: all that a table ran, in
    order, as they are shown. made: output → its command. accuracy, counts: the network's accuracy
    and the number of images of each set, as ``evaluate`` prints them."""

    config: Config
    network: Network
    data: Path
    work: Path
    records: tuple[str, ...] = ()
    commands: list[str] = field(default_factory=list)
    accuracy: float = float("nan")
    counts: dict[str, int] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return f"{WORK}/{self.network.folder}"

    def run(self, output: str, *words: str) -> str:
        """Runs ``oodcli WORDS`` and returns what it printed. output: a path that no other command
        writes."""
        command = shlex.join(["oodcli", *words])
        self.commands.append(command)
        if self.made.setdefault(output, command) != command:
            raise ValueError(f"{output} is made by two commands: {self.made[output]} and {command}")
        kept = self._place(f"{output}.done.json")
        if not kept.exists() or json.loads(kept.read_text("utf-8"))["command"] != command:
            print(command, file=sys.stderr, flush=True)
            kept.parent.mkdir(parents=True, exist_ok=True)
            start = time.process_time()
            printed = _oodcli([self._located(word) for word in words], self.data)
            seconds = round(time.process_time() - start, 2)
            made = {"command": command, "printed": printed, "seconds": seconds}
            kept.write_text(json.dumps(made), "utf-8")
        return str(json.loads(kept.read_text("utf-8"))["printed"])

    def seconds(self, output: str) -> float:
        """Processor seconds of the command that made an output."""
        return float(json.loads(self._place(f"{output}.done.json").read_text("utf-8"))["seconds"])

    def write(self, output: str, *words: str) -> str:
        """Runs ``oodcli WORDS -o PATH`` and returns the path, in the network's folder."""
        path = f"{self.folder}/{output}"
        self.run(path, *words, "--force", "-o", path)
        return path

    @property
    def precision(self) -> tuple[str, ...]:
        """The option, unless it is the default."""
        usual = self.config.precision == "float32"
        return () if usual else ("--precision", self.config.precision)

    @property
    def model(self) -> tuple[str, ...]:
        """Options of the network, unless its checkpoint tells all."""
        if not self.network.arch:
            return ()
        trust = ("--trust-pickle",) if ".py:" in self.network.arch else ()
        return ("--arch", self.network.arch, *trust)

    def cache(self, images: str, name: str, *, but: Sequence[str] = ()) -> str:
        """Features of images, with all records but those of some detectors."""
        needed = ",".join(each for each in self.records if each not in but)
        words = ("--for", needed, *self.model, *self.precision)
        return self.write(
            f"{name}.h5", "extract", self.network.checkpoint, images, *words, "--quiet"
        )

    def test(self) -> str:
        return self.cache(self.network.test.images, "test")

    def train(self) -> str:
        """Features of training images. Raises ValueError where the configuration has none."""
        if not self.network.train:
            raise ValueError(f"{self.network.name} has no train")
        return self.cache(self.network.train, "train", but=["odin"])

    def invert(self, seed: int) -> str:
        """Virtual images."""
        many = ("--per-class", str(self.config.per_class), "--seed", str(seed), "--quiet")
        return self.write(f"v{seed}.h5", "invert", self.network.checkpoint, *self.model, *many)

    def virtual(self, seed: int) -> str:
        """Features of virtual images."""
        return self.cache(self.invert(seed), f"v{seed}.features", but=["odin"])

    def noise(self, kind: str, seed: int = 1) -> str:
        """Features of noise. Seed 1 is scored; detectors are fitted on other seeds."""
        images = f"noise:{kind}?n={self.config.noise}&seed={seed}"
        if seed == 1:
            return self.cache(images, kind)
        return self.cache(images, f"{kind}-{seed}", but=["odin"])

    def sets(self, noise: Sequence[str] = ()) -> dict[str, str]:
        """Name → features, of the OOD sets and of kinds of noise."""
        found = {name: self.cache(each.images, name) for name, each in self.network.sets.items()}
        return found | {kind: self.noise(kind) for kind in noise}

    def halves(self) -> Iterator[tuple[str, str, str]]:
        """Name, features to learn from and features to score of every OOD set with two parts (see
        ImageSet)."""
        for name, each in self.network.sets.items():
            if each.learn:
                learn = self.cache(each.learn, f"{name}-learn", but=["odin"])
                yield name, learn, self.cache(each.images, name)
            elif each.images.endswith(".npz"):
                even, odd = (
                    self.cache(path, Path(path).stem, but=["odin"])
                    for path in self._split(name, each)
                )
                yield name, even, odd

    def _split(self, name: str, given: ImageSet) -> list[str]:
        paths = [f"{self.folder}/{name}-{half}.npz" for half in ("even", "odd")]
        for start, path in enumerate(paths):
            target = self._place(path)
            if not target.exists():
                with np.load(self.data / given.images) as found:
                    np.savez(target, images=found["images"][start::2])
        return paths

    def fit(self, output: str, cache: str, *words: str) -> str:
        return self.write(output, "fit", cache, *words, "--quiet")

    def fit_virtual(self, seed: int) -> str:
        """The folder of c2ir and c2ir-z, fitted on virtual images."""
        return self.fit(f"virtual-{seed}", self.virtual(seed), "-d", "c2ir", "-d", "c2ir-z")

    def compare(
        self,
        output: str,
        words: Sequence[str],
        sets: Mapping[str, str | tuple[str, str]],
        metrics: Sequence[str],
        names: Mapping[str, str] | None = None,
        test: str | tuple[str, str] = "",
    ) -> Rows:
        """Metrics of ``oodcli score … WORDS``. output: a name for this choice of detectors. sets,
        test: features each, or a checkpoint and images. names: column → its name in the table."""
        scores = {}
        for name, each in {"test": test or self.test(), **sets}.items():
            given = (each,) if isinstance(each, str) else each
            scores[name] = self.write(f"{output}/{name}.csv", "score", *given, *words, "--quiet")
        inside = scores.pop("test")
        return self.evaluated(f"{output}/evaluate", inside, scores, metrics, names)

    def evaluated(
        self,
        output: str,
        inside: str,
        scores: Mapping[str, str],
        metrics: Sequence[str],
        names: Mapping[str, str] | None = None,
    ) -> Rows:
        """Metrics of scores files. scores: name of an OOD set → its file."""
        pairs = (word for name, path in scores.items() for word in ("--ood", f"{name}={path}"))
        resamples = ("--resamples", str(self.config.resamples))
        summary = json.loads(
            self.run(
                f"{self.folder}/{output}",
                *("evaluate", "--id", inside, *pairs, *resamples, "--json", "--quiet"),
            )
        )
        self.accuracy = summary["id_accuracy"]
        for each in summary["counts"]:
            self.counts[each["set"]] = max(each["rows"], self.counts.get(each["set"], 0))
        return _rows(summary, metrics, names or {})

    def _place(self, path: str) -> Path:
        return self.work / path.removeprefix(f"{WORK}/")

    def _located(self, word: str) -> str:
        """Replaces the word for the work folder by its path."""
        name, equals, path = word.rpartition("=")
        known = path.startswith(f"{WORK}/")
        return f"{name}{equals}{self._place(path)}" if known else word


def _oodcli(words: Sequence[str], folder: Path) -> str:
    """Returns what the command printed. Raises SystemExit when it fails; images that could not be
    read are no failure."""
    from oodcli.cli import main

    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.object(sys, "argv", ["oodcli", *words]),
    ):
        try:
            main()
        except SystemExit as stop:
            if stop.code not in (None, 0, UNREADABLE):
                raise SystemExit(f"{shlex.join(['oodcli', *words])}\n{err.getvalue()}") from None
    return out.getvalue()


def _rows(summary: Mapping[str, object], metrics: Sequence[str], names: Mapping[str, str]) -> Rows:
    found: Rows = {}
    entries = summary["metrics"]
    assert isinstance(entries, list)
    for entry in entries:
        if entry["metric"] in metrics:
            column = entry["detector"].rstrip("*")
            on = found.setdefault(names.get(column, column), {}).setdefault(entry["set"], {})
            numbers = (entry["value"], entry.get("low"), entry.get("high"))
            on[entry["metric"]] = [round(100 * each, 2) for each in numbers if each is not None]
    return found
