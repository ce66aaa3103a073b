"""All detectors that need no image, on networks and image sets of your own.

    python -m benchmarks.fit_free CONFIG DATA --work DIR [-o FOLDER] [--network NAME …]

Scores every set of CONFIG with each detector that its networks allow and that needs no fitting,
with 1c-sum, and with those of ``oodcli prepare`` where CONFIG has the network's accuracy. Writes
fit-free.csv and fit-free.md into FOLDER, usually DIR. Paths in CONFIG are relative to the folder
DATA. Commands that ran before in DIR are not run again. benchmarks/papers/openood.toml is the
configuration of OpenOOD's ImageNet benchmark, imagenet.toml that of docs/research/fit-free.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks.papers.config import Config, located, read_config
from benchmarks.papers.runs import Rows, Runs
from oodcli.files.prepared import read_prepared
from oodcli.images.files import folder as images_in
from oodcli.images.files import list_from_text

METRICS = ("auroc", "tnr95")
MEAN = "mean"
GROUPS = ("near", "far")
"""OpenOOD's groups of sets, shown instead of the mean where there are both."""
DEFAULTS = ("msp", "energy", "1c-sum")
"""Shown on the page whatever their rank."""
OWN = "1c-sum"
"""The detector that is fitted on noise."""

PUBLISHED = {
    "msp": (76.02, 85.23),
    "mls": (76.46, 89.57),
    "energy": (75.89, 89.47),
    "gen": (76.85, 89.76),
    "odin": (74.75, 89.47),
    "ash-b": (78.17, 95.74),
    "scale": (81.36, 96.53),
    "gradnorm": (72.96, 90.25),
    "rankfeat": (50.99, 53.93),
}
"""AUROC, near and far, of ResNet-50 with torchvision's first weights on OpenOOD's leaderboard
(v1.5, commit 28d3a40), most with settings found on OOD images."""


@dataclass(frozen=True)
class Line:
    """A figure in percent. set: an OOD set, ``mean`` or a group of sets. Without a detector it is
    the network's accuracy, or the images of a set, which are no percent."""

    network: str
    detector: str
    set: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit_free")
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER")
    parser.add_argument("--network", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--machine", default=platform.machine(), metavar="WORDS")
    options = parser.parse_args(words)
    output = options.output or options.work
    try:
        config = read_config(options.config, ())
        names = options.network or list(config.networks)
        if unknown := sorted(set(names) - config.networks.keys()):
            raise ValueError(f"{options.config} has no network '{unknown[0]}'")
        each = [_runs(config, name, options.data, options.work) for name in names]
    except ValueError as error:
        parser.error(str(error))
    _say_left_out(config, options.data)
    lines = [line for runs in each for line in measured(runs)]
    output.mkdir(parents=True, exist_ok=True)
    write_lines(output / "fit-free.csv", lines)
    when = f"{date.today().isoformat()}, oodcli {version('oodcli')}, torch {version('torch')}"
    text = page(lines, f"{options.machine}, {when}", str(options.config), config.every)
    (output / "fit-free.md").write_text(text, encoding="utf-8")
    print(f"wrote fit-free.csv and fit-free.md into {output}")
    return 0


def _runs(config: Config, name: str, data: Path, work: Path) -> Runs:
    """Raises ValueError for what is not in the folder ``data``."""
    network = config.networks[name]
    work = work.resolve()
    lists = work / network.folder / "lists"
    network = located(network, config, data, lists)
    return Runs(config, network, data.resolve(), work, records=(OWN,))


def _say_left_out(config: Config, data: Path) -> None:
    """Names the folders beside the images that the configuration does not know."""
    sets = [each for network in config.networks.values() for each in network.sets.values()]
    tests = [network.test for network in config.networks.values()]
    known = {Path(each.images).parts[0] for each in (*sets, *tests)} | {*config.roots}
    for root in (each for each in config.roots if each != "."):
        for folder in sorted((data / root).glob("*/")):
            if folder.name not in known:
                which = f"{root}/{folder.name}"
                print(f"left out: {which}, which is not in the configuration", file=sys.stderr)


def measured(runs: Runs) -> list[Line]:
    """The figures of a network; its sets' groups have means of their own."""
    network, every = runs.network, runs.config.every
    chosen = _detectors(runs)
    rows: Rows = {}
    for step in sorted({every.get(name, 1) for name in chosen}, reverse=True):  # all images last
        some = [word for name, word in chosen.items() if every.get(name, 1) == step]
        rows |= _compared(runs, some, step)
    rows = {name: rows[name] for name in chosen}
    counts = [Line(network.name, "", each, "images", count) for each, count in runs.counts.items()]
    if runs.accuracy is not None:
        counts += [Line(network.name, "", "ID", "accuracy", round(100 * runs.accuracy, 2))]
    return [*counts, *_lines(network.name, rows)]


def _compared(runs: Runs, chosen: Sequence[str], step: int) -> Rows:
    """On every ``step``-th image of each set."""
    network = runs.network
    output = "scores" if step == 1 else f"scores-every-{step}"

    def some(name: str, images: str) -> tuple[str, str]:
        if step == 1:
            return network.checkpoint, images
        found = image_files(runs.data / images)
        listed = runs.work / network.folder / output / f"{name}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(f"{path}\n" for path in found[::step]), "utf-8")
        return network.checkpoint, str(listed)

    words = [word for name in chosen for word in ("-d", name)]
    words += [*runs.model, *runs.precision]
    sets = {name: some(name, each.images) for name, each in network.sets.items()}
    rows = runs.compare(output, words, sets, METRICS, test=some("test", network.test.images))
    groups: dict[str, list[str]] = {}
    for name, each in network.sets.items():
        if each.group:
            groups.setdefault(each.group, []).append(name)
    for group, names in groups.items():
        files = {name: f"{runs.folder}/{output}/{name}.csv" for name in names}
        inside = f"{runs.folder}/{output}/test.csv"
        found = runs.evaluated(f"{output}/evaluate-{group}", inside, files, METRICS)
        for detector, on in found.items():
            rows[detector][group] = on[MEAN]
    return rows


def image_files(images: Path) -> list[str]:
    """The image files of a folder or of a list, in the order in which oodcli scores them. Raises
    ValueError for other images."""
    if not images.is_dir() and images.suffix != ".txt":
        raise ValueError(f"{images}: every needs a folder or a .txt list of images")
    source = images_in(images, ()) if images.is_dir() else list_from_text(images, ())
    return source.paths(0, len(source))


def _detectors(runs: Runs) -> dict[str, str]:
    """Name → itself or an artefact, as ``score -d`` takes them."""
    checkpoint, network = runs.network.checkpoint, runs.network
    words = ("inspect", checkpoint, *runs.model, "--json")
    found = json.loads(runs.run(f"{runs.folder}/inspect", *words))
    allowed = {each["name"]: each["fitted"] for each in found["detectors"] if each["allowed"]}
    chosen = {name: name for name, fitted in allowed.items() if not fitted}
    if OWN in allowed:
        folder = runs.fit("fitted", runs.noise("uniform", seed=0), "-d", OWN)
        chosen[OWN] = f"{folder}/{OWN}.safetensors"
    if network.accuracy is not None:
        accuracy = ("--accuracy", str(network.accuracy))
        folder = runs.write("prepared", "prepare", checkpoint, *runs.model, *accuracy, "--quiet")
        if prepared := read_prepared(runs.work / network.folder / "prepared"):
            files = {name: file for name, file in prepared.detectors.items() if file}
            chosen |= {name: f"{folder}/{file}" for name, file in files.items()}
    return {name: word for name, word in chosen.items() if name not in runs.config.without}


def _lines(network: str, rows: Rows) -> list[Line]:
    return [
        Line(network, detector, name, metric, *cell)
        for detector, on in rows.items()
        for name, metrics in on.items()
        for metric, cell in metrics.items()
    ]


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Line)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)


def read_lines(path: Path) -> list[Line]:
    def number(text: str) -> float | None:
        return float(text) if text else None

    with path.open(encoding="utf-8", newline="") as file:
        return [
            Line(
                row["network"],
                row["detector"],
                row["set"],
                row["metric"],
                float(row["value"]),
                number(row["low"]),
                number(row["high"]),
            )
            for row in csv.DictReader(file)
        ]


INTRODUCTION = """\
# Detectors that need no image

Mean AUROC / TNR95 in percent over the OOD sets, with 95 % intervals. `1c-sum` is fitted on noise.
{shown}[fit-free.csv](fit-free.csv) has all detectors and sets.
"""

HOW = """\

Measured on {measured}:

<!-- not run: needs the data -->

```sh
python -m benchmarks.fit_free {config} DATA --work work
```

The folder DATA has the images and checkpoints that the configuration names.
`benchmarks/papers/openood.toml` names the folders and lists of OpenOOD's ImageNet benchmark; the
table then has the means of the near and the far sets, and published figures beside.
"""


def page(
    lines: Sequence[Line], measured: str, config: str, every: Mapping[str, int], most: int = 12
) -> str:
    """Markdown. measured: machine, date and versions. every: as of Config. most: detectors shown;
    the figures of the others are in the CSV."""
    networks = list(dict.fromkeys(line.network for line in lines))
    cells = {(line.network, line.detector, line.set, line.metric): line for line in lines}
    known = list(dict.fromkeys(line.detector for line in lines if line.detector))
    sets = {line.set for line in lines if line.detector}
    groups = list(GROUPS) if sets.issuperset(GROUPS) else []
    best = _ranked(networks, known, cells)
    shown = [name for name in best if name in (*best[:most], *DEFAULTS)]
    columns = [(network, on) for network in networks for on in groups or [MEAN]]
    heads = ["detector", *(f"{network}, {on}" if groups else network for network, on in columns)]
    rows = []
    for name in shown:
        found = [[cells.get((network, name, on, m)) for m in METRICS] for network, on in columns]
        rows.append([f"`{name}`", *(_cell(*pair) for pair in found)])
        if groups:
            near, far = PUBLISHED.get(name, ("–", "–"))
            rows[-1].append(f"{near} / {far}")
    if groups:
        heads.append("OpenOOD's ResNet-50, AUROC near / far")
    few = f"Here are the {most} with the best mean rank and usual ones; " if best[most:] else ""
    return "\n".join(
        [
            INTRODUCTION.format(shown=few),
            _table(heads, rows),
            *(_about(network, lines) for network in networks),
            *(f"* `{name}`: one image of {step}" for name, step in every.items() if name in known),
            HOW.format(measured=measured, config=config),
        ]
    )


def _ranked(
    networks: Sequence[str], known: Sequence[str], cells: dict[tuple[str, str, str, str], Line]
) -> list[str]:
    """Detectors by their mean place among those of each network, by AUROC."""
    places: dict[str, list[float]] = {name: [] for name in known}
    for network in networks:
        there = [name for name in known if (network, name, MEAN, "auroc") in cells]
        values = {name: cells[network, name, MEAN, "auroc"].value for name in there}
        for place, name in enumerate(sorted(there, key=lambda name: -values[name])):
            places[name].append(place / len(there))
    return sorted(known, key=lambda name: sum(places[name]) / len(places[name]))


def _cell(auroc: Line | None, tnr95: Line | None) -> str:
    if auroc is None or tnr95 is None:
        return "–"
    return f"{_with_interval(auroc, 1)} / {_with_interval(tnr95, 0)}"


def _with_interval(line: Line, digits: int) -> str:
    if line.low is None or line.high is None:
        return f"{line.value:.{digits}f}"
    return f"{line.value:.{digits}f} ({line.low:.{digits}f}–{line.high:.{digits}f})"


def _about(network: str, lines: Iterable[Line]) -> str:
    mine = {(x.set, x.metric): x.value for x in lines if x.network == network and not x.detector}
    sets = ", ".join(
        f"{name} ({count:,.0f})"
        for (name, metric), count in mine.items()
        if metric == "images" and name != "ID"
    )
    right = f", {mine['ID', 'accuracy']:.1f} % right" if ("ID", "accuracy") in mine else ""
    return f"* {network}: {mine['ID', 'images']:,.0f} ID images{right}; {sets}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
