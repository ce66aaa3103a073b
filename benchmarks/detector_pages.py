"""The figures of docs/detectors, and the tables on its pages that are made from them.

    python -m benchmarks.detector_pages measure DATA [--rows 2000] [--fit-rows 5000] [--work FOLDER]
    python -m benchmarks.detector_pages write [--check]

The first step runs oodcli on the networks and images of the folder DATA and writes
docs/detectors/figures.json; with a WORK folder that is kept, it resumes. The second step needs
neither: it puts tables of that file, and of the detectors' own classes, between the marks on the
pages, and makes a page for a detector that has none. With --check it changes nothing, but fails
where a page is missing, or is not what it would write.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
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
from oodcli import detectors
from oodcli.cli.detectors import fitted_on
from oodcli.detectors.hyperparameters import hyperparameters

PAGES = Path(__file__).parents[1] / "docs" / "detectors"

NETWORKS = {"ResNet-20": "resnet20-12fca82f.th", "ResNet-32": "resnet32-d509ac18.th"}
PUBLISHED = {"resnet20-12fca82f.th": "0.9173", "resnet32-d509ac18.th": "0.9263"}
"""Their test accuracies."""

INSIDE = "cifar10-test"
TRAINED_ON = "cifar10-train-10k"
SETS = ("textures", "scenes", "notmnist", "fashion-mnist", "imagenet-samples")
NOISE = "noise"
NOISE_IMAGES = "noise:uniform?n=1000&seed=1"
"""Another seed than that of 1c-sum's own noise."""

KINDS = {name: detectors.get(name) for name in detectors.names()}

VIRTUAL = [name for name, kind in KINDS.items() if "layers.sensitivity" in kind.fit_needs()]
"""Fitted on virtual images alone."""

WITH_POOL = [name for name, kind in KINDS.items() if kind.needs_pool]
"""Fitted on virtual images, on noise, and on other virtual images, matched to the accuracy."""

WITH_OOD = [name for name, kind in KINDS.items() if kind.uses_ood]
"""Fitted on OOD rows, too: of every set but the one that is scored."""

EITHER = [
    name
    for name, kind in KINDS.items()
    if kind.fitted
    and not (kind.needs_ood or kind.reference_images)
    and name not in (*VIRTUAL, *WITH_POOL)
]
"""Fitted on virtual images, and on real ones."""

OWN_NETWORK = ("joint-energy", "godin", "mos")
"""They need a network trained for them, which these are not."""

NOT_MEASURED = "not measured"

Row = Mapping[str, Sequence[float]]


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


def measure(data: Path, folder: Path, rows: int, fit_rows: int, per_class: int) -> dict[str, Any]:
    """What figures.json holds."""
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
        shown, found_ = _measure_network(work, checkpoint, per_class)
        commands = commands or shown
        networks[network] = found_
    return {
        "date": date.today().isoformat(),
        "machine": "two cores of an AMD EPYC",
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: version(name) for name in ("oodcli", "torch", "numpy", "scikit-learn")},
        },
        "images": {**counts, NOISE: 1000},
        "virtual_images_per_class": per_class,
        "commands": commands,
        "networks": networks,
    }


def _measure_network(
    work: Work, checkpoint: str, per_class: int
) -> tuple[list[str], dict[str, Any]]:
    stem = checkpoint.partition("-")[0]
    (work.folder / stem).mkdir(exist_ok=True)
    commands: list[str] = []

    def run(output: str, *words: str) -> str:
        whole = [*words, "-o", output]
        commands.append(shlex.join(["oodcli", *whole]))
        work.run(output, *whole, "--force")
        return output

    def evaluate(output: str, inside: str, **outside: str) -> dict[str, dict[str, list[float]]]:
        pairs = (word for name, path in outside.items() for word in ("--ood", f"{name}={path}"))
        words = ["evaluate", "--id", inside, *pairs, "--resamples", "0", "--json"]
        commands.append(shlex.join(["oodcli", *words]))
        summary = json.loads(work.run(output, *words))
        accuracy.append(summary["id_accuracy"])
        return _figures(summary)

    def options(names: Iterable[str]) -> Iterator[str]:
        for name in names:
            yield from ("-d", name)

    accuracy: list[float] = []
    known = [name for name in detectors.names() if name not in OWN_NETWORK]
    free = [name for name in known if not detectors.get(name).fitted]
    everything = ",".join(known)
    virtual = run(f"{stem}/v.h5", "invert", checkpoint, "--per-class", str(per_class))
    cache = run(f"{stem}/v.features.h5", "extract", checkpoint, virtual, "--for", everything)
    run(f"{stem}/virtual", "fit", cache, *options([*EITHER, *VIRTUAL]))
    fitted = ",".join([*EITHER, "supervised"])
    real = f"{stem}/{TRAINED_ON}.features.h5"
    run(real, "extract", checkpoint, f"{TRAINED_ON}.npz", "--for", fitted)
    run(f"{stem}/real", "fit", real, *options(EITHER))
    noise = run(f"{stem}/uniform.h5", "extract", checkpoint, "noise:uniform?n=2000&seed=0")
    run(f"{stem}/one-class", "fit", noise, "-d", "1c-sum")
    other = run(f"{stem}/w.h5", "invert", checkpoint, "--per-class", str(per_class), "--seed", "1")
    published = ("--match-accuracy", PUBLISHED[checkpoint])
    pool = run(f"{stem}/pool.h5", "extract", checkpoint, other, *published)
    three = (cache, "--noise", noise, "--calibrate", pool)
    run(f"{stem}/with-pool", "fit", *three, *options(WITH_POOL))
    artefacts = [
        *(f"{stem}/virtual/{name}.safetensors" for name in (*EITHER, *VIRTUAL)),
        *(f"{stem}/real/{name}.safetensors" for name in EITHER),
        f"{stem}/one-class/1c-sum.safetensors",
        *(f"{stem}/with-pool/{name}.safetensors" for name in WITH_POOL),
    ]
    scores = {}
    for name in (INSIDE, *SETS, NOISE):
        images = NOISE_IMAGES if name == NOISE else f"{name}.npz"
        rows = run(f"{stem}/{name}.features.h5", "extract", checkpoint, images, "--for", everything)
        scores[name] = run(f"{stem}/{name}.csv", "score", rows, *options([*free, *artefacts]))
    found = evaluate(f"{stem}/all", scores.pop(INSIDE), **scores)
    for name in SETS:
        ood = f"{stem}/not-{name}.features.h5"
        run(ood, "extract", checkpoint, f"not-{name}.npz", "--for", ",".join(WITH_OOD))
        learnt = run(f"{stem}/not-{name}", "fit", real, "--ood", ood, *options(WITH_OOD))
        each = [f"{learnt}/{kind}.safetensors" for kind in WITH_OOD]
        inside, outside = (
            run(
                f"{stem}/{of}-by-not-{name}.csv",
                *("score", f"{stem}/{of}.features.h5", *options(each)),
            )
            for of in (INSIDE, name)
        )
        one = evaluate(f"{stem}/not-{name}-{name}", inside, **{name: outside})
        for detector, row in one.items():
            found.setdefault(f"{detector}[ood]", {}).update(row)
    return commands, {
        "checkpoint": checkpoint,
        "accuracy": round(100 * accuracy[0], 2),
        "auroc and tnr95": found,
    }


def _figures(summary: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Detector → OOD set → AUROC and TNR95 in percent."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in summary["metrics"]:
        if row["metric"] in ("auroc", "tnr95") and row["set"] != "mean":
            name = row["detector"].rstrip("*")
            pair = found.setdefault(name, {}).setdefault(row["set"], [0.0, 0.0])
            pair[row["metric"] == "tnr95"] = round(100 * row["value"], 2)
    return found


def read_figures(path: Path = PAGES / "figures.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def pages() -> dict[str, Path]:
    """Detector → its page, by the marks on the pages."""
    found: dict[str, Path] = {}
    for page in sorted(PAGES.glob("*.md")):
        for kind, words in _marks(page.read_text(encoding="utf-8")):
            if kind == "facts":
                found |= dict.fromkeys(words, page)
    return found


def written(text: str, figures: Mapping[str, Any]) -> str:
    """A page with what is between its marks made anew. Raises ValueError for an unknown mark."""

    def anew(match: re.Match[str]) -> str:
        kind, *names = match["words"].split()
        make = {"facts": _facts, "figures": _table_of_figures, "index": _index, "how": _how}
        if kind not in make:
            raise ValueError(f"unknown mark '{kind}'")
        made = "\n".join(make[kind](names, figures))
        return f"<!-- {match['words']} -->\n\n{made}\n\n<!-- end -->"

    return MARK.sub(anew, text)


MARK = re.compile(r"<!-- (?P<words>[^>]+?) -->\n.*?<!-- end -->", re.DOTALL)


def _marks(text: str) -> Iterator[tuple[str, list[str]]]:
    for match in MARK.finditer(text):
        kind, *names = match["words"].split()
        yield kind, names


def _facts(names: Sequence[str], figures: Mapping[str, Any]) -> list[str]:
    rows = []
    for name in names:
        kind = detectors.get(name)
        needs = ", ".join(f"`{word}`" for word in sorted(kind.needs | kind.fit_needs()))
        rows.append([f"`{name}`", kind.about, kind.source, needs, fitted_on(kind)])
    return _table(["", "what it is", "source", "what must be recorded", "fitted on"], rows)


def rows_of(name: str, figures: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Row]]:
    """Network, the column of the scores, what the detector was fitted on, and the figures by set,
    for each way in which it was measured."""
    ways = {"": "", "[virtual]": "virtual images", "[real]": "real images", "[ood]": "real and OOD"}
    for network, measured in figures["networks"].items():
        for way, words in ways.items():
            row = measured["auroc and tnr95"].get(f"{name}{way}")
            if row is not None:
                fitted = "virtual images" if name in (*VIRTUAL, *WITH_POOL) else words
                yield network, f"{name}{way}", fitted, row


def mean_of(row: Row) -> tuple[float, float]:
    """Over the five sets, without the noise."""
    first, second = (sum(row[name][i] for name in SETS) / len(SETS) for i in (0, 1))
    return first, second


def _table_of_figures(names: Sequence[str], figures: Mapping[str, Any]) -> list[str]:
    rows = []
    for name in names:
        for network, _, fitted, row in rows_of(name, figures):
            pairs = [row.get(set_) for set_ in SETS]
            pairs += [mean_of(row), row.get(NOISE)]
            label = f"`{name}`" + (f", {fitted}" if fitted else "")
            rows.append([label, network, *(_pair(pair) for pair in pairs)])
        if not any(rows_of(name, figures)):
            rows.append([f"`{name}`", NOT_MEASURED, *[""] * (len(SETS) + 2)])
    return _table(["AUROC / TNR95, %", "network", *SETS, "mean of five", "uniform noise"], rows)


def _pair(pair: Sequence[float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.1f} / {pair[1]:.1f}"


def _index(names: Sequence[str], figures: Mapping[str, Any]) -> list[str]:
    where = pages()
    rows = []
    for name in detectors.names():
        kind = detectors.get(name)
        page = where.get(name, PAGES / f"{name}.md")
        cells = dict.fromkeys(figures["networks"], "")
        for network, _, fitted, row in rows_of(name, figures):
            words = {"virtual images": "virtual ", "real images": "real ", "real and OOD": "OOD "}
            prefix = words.get(fitted, "") if name not in (*VIRTUAL, *WITH_POOL) else ""
            cells[network] += f"{'; ' * bool(cells[network])}{prefix}{_pair(mean_of(row))}"
        needs = " ".join(sorted(kind.needs | kind.fit_needs()))
        link = f"[`{name}`]({page.name})"
        measured = [cell or NOT_MEASURED for cell in cells.values()]
        rows.append([link, needs, fitted_on(kind), kind.about, *measured])
    return _table(["name", "needs", "fitted on", "what it is", *figures["networks"]], rows)


def _how(names: Sequence[str], figures: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    right = " and ".join(
        f"{measured['accuracy']:.1f} % ({network}, `{measured['checkpoint']}`)"
        for network, measured in figures["networks"].items()
    )
    return [
        f"Taken on {figures['date']} on {figures['machine']}: {versions}.",
        "The networks classify the in-distribution images correctly in",
        f"{right}.",
        "",
        "```text",
        *(_shortened(each) for each in figures["commands"] if _is_of_the_first_set(each)),
        "```",
        "",
        f"These are the commands of one network, without those of the sets after {SETS[0]}; "
        "[figures.json](figures.json) has them in full.",
    ]


def _is_of_the_first_set(command: str) -> bool:
    output = command.split(" -o ")[-1].split(" --ood ")[0]
    return not any(name in output for name in SETS[1:])


def _shortened(command: str) -> str:
    """Lists of more than three detectors as their first and their number."""
    command = re.sub(
        r"(-d \S+)((?: -d \S+){3,})", lambda m: f"{m[1]} … ({m[2].count('-d ') + 1} -d)", command
    )
    return re.sub(
        r"(--for [^\s,]+)((?:,[^\s,]+){3,})", lambda m: f"{m[1]},… ({m[2].count(',') + 1})", command
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detector_pages")
    steps = parser.add_subparsers(dest="step", required=True)
    first = steps.add_parser("measure")
    first.add_argument("data", type=Path, metavar="DATA")
    first.add_argument("--rows", type=int, default=2000)
    first.add_argument("--fit-rows", type=int, default=5000)
    first.add_argument("--per-class", type=int, default=50)
    first.add_argument("--work", type=Path)
    second = steps.add_parser("write")
    second.add_argument("--check", action="store_true")
    options = parser.parse_args(words)
    if options.step == "write":
        return _write(options.check)
    with tempfile.TemporaryDirectory() as made:
        folder = options.work or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(options.data, folder, options.rows, options.fit_rows, options.per_class)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (PAGES / "figures.json").write_text(text + "\n", encoding="utf-8")
    return 0


def new_page(name: str) -> str:
    """The page of a detector that has none, from its class, before ``written``."""
    kind = detectors.get(name)
    settings = []
    for key, (_, default) in hyperparameters(kind).items():
        plain = default is None or isinstance(default, bool)
        settings.append(f"| `{name}.{key}` | {str(default).lower() if plain else default} | |")
    table = ["| | default | meaning |", "| --- | --- | --- |", *settings] if settings else ["None."]
    example = f"oodcli score ckpt.pt photos/ -d {name} -o photos.csv"
    if kind.fitted:
        example = (
            f"oodcli fit v.features.h5 -d {name} -o detectors\n"
            f"oodcli score ckpt.pt photos/ -d detectors/{name}.safetensors -o photos.csv"
        )
    parts = (
        f"# {name}: {kind.about}",
        inspect.getdoc(kind) or "",
        f"<!-- facts {name} -->\n<!-- end -->",
        "## Hyper-parameters",
        "\n".join(table),
        "## Measured",
        f"<!-- figures {name} -->\n<!-- end -->",
        "## Example",
        f"```sh\n{example}\n```",
    )
    return "\n\n".join(parts) + "\n"


def _write(check: bool) -> int:
    figures = read_figures()
    stale = 0
    for name in [each for each in detectors.names() if each not in pages()]:
        page = PAGES / f"{name}.md"
        if check:
            stale += 1
            print(f"{page.name}: is missing")
        else:
            page.write_text(new_page(name), encoding="utf-8")
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        anew = written(text, figures)
        if anew != text:
            stale += 1
            print(f"{page.name}: {'is not up to date' if check else 'written'}")
            if not check:
                page.write_text(anew, encoding="utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
