"""docs/research/results.md, with what became of every claim, and beside it claims.csv with the
figures behind each claim, and tables.csv with all figures, ours and the papers'. All are made from
results.json, published.json and the claims."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.papers.runs import Rows
from benchmarks.papers.table import Claim, Figures, Table, Verdict
from benchmarks.papers.tables import TABLES

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PUBLISHED = HERE / "published.json"
RESEARCH = HERE.parents[1] / "docs" / "research"
PAGE = RESEARCH / "results.md"
CLAIMS = RESEARCH / "claims.csv"
ALL_FIGURES = RESEARCH / "tables.csv"

INTRODUCTION = """\
# The papers' claims, tested

We measured the tables of five papers again on other networks and OOD sets, and tested the papers'
claims. Compare the order of methods on one network, not the figures with a paper's. This page shows
the figures of the first network; [claims.csv](claims.csv) has those of all networks, and
[tables.csv](tables.csv) all methods, ours beside the papers', with intervals. Networks of 1,000
classes have [a page of their own](fit-free.md).
"""

CONVENTIONS = """\
* Figures are percent, except ranks, powers and settings: means over the seeds of the inversion, and
  over the OOD sets unless the row says otherwise.
* "Yes" ignores the intervals of the figures. Where a claim has no number, the row names ours.
* [The detectors' pages](../detectors/index.md) have the formulas, and say where they differ from
  the papers.
"""

HOW = """\
<!-- not run: takes an hour, and the data -->

```sh
python -m benchmarks.papers benchmarks/papers/here.toml DATA --work work
python -m benchmarks.papers benchmarks/papers/resnet34.toml DATA --work work
python -m benchmarks.papers benchmarks/papers/wrn.toml DATA --work work
python -m benchmarks.papers write
```

The folder DATA has the checkpoints and images that a configuration names; `public.toml` names the
papers' own data sets. `benchmarks/papers/results.json` has all commands and versions.
"""


def page(results: Mapping[str, Any]) -> str:
    """results: the content of results.json."""
    measured = {table: results["tables"][name] for name, table in TABLES.items()}
    papers = dict.fromkeys(table.paper for table in TABLES.values())
    parts = [INTRODUCTION, _summary(measured, papers), *_setup(results), CONVENTIONS]
    for paper in papers:
        mine = {table: each for table, each in measured.items() if table.paper == paper}
        parts += [f"## {paper}\n", _claims(mine), _notes(mine)]
    return "\n".join([*parts, "## How to run it\n", _when(results), HOW])


def figures(results: Mapping[str, Any]) -> str:
    """All figures as CSV, those of a paper after ours. results: the content of results.json."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = ["table", "source", "network", "method", "set", "metric", "value", "low", "high"]
    writer.writerow(heads)
    published = read_published()
    for name in TABLES:
        for network, entry in results["tables"][name].items():
            writer.writerows([name, "oodcli", network, *cells] for cells in _flat(entry["rows"]))
        for entry in published.get(name, []):
            source = [name, f"paper, {entry['place']}", entry["network"]]
            writer.writerows([*source, *cells] for cells in _flat(entry["rows"]))
    return text.getvalue()


def _flat(rows: Rows) -> Iterator[list[object]]:
    for method, on in rows.items():
        for name, metrics in on.items():
            for metric, cell in metrics.items():
                yield [method, name, metric, *cell, *[""] * (3 - len(cell))]


def read_published() -> dict[str, list[dict[str, Any]]]:
    """Table → the papers' networks, with rows like ours."""
    found: dict[str, list[dict[str, Any]]] = json.loads(PUBLISHED.read_text("utf-8"))
    for entries in found.values():
        for entry in entries:
            for on in entry["rows"].values():
                for metrics in on.values():
                    metrics |= {name: [value] for name, value in metrics.items()}
    return found


Measured = Mapping[Table, Mapping[str, Any]]
"""Table → network → its entry in results.json."""


def _tested(measured: Measured) -> Iterator[tuple[Table, Claim, dict[str, Verdict]]]:
    """Every claim with its verdict on each network."""
    for table, entries in measured.items():
        found = {name: Figures(entry["rows"]) for name, entry in entries.items()}
        for claim in table.claims:
            yield table, claim, {name: claim.test(each) for name, each in found.items()}


def _summary(measured: Measured, papers: Iterable[str]) -> str:
    rows = []
    for paper in papers:
        mine = {table: each for table, each in measured.items() if table.paper == paper}
        counts = Counter(verdict(found) for *_, found in _tested(mine))
        yes, no, untested = (counts.pop(each, 0) for each in ("yes", "no", "not tested"))
        some = counts.total()
        rows.append([paper, *map(str, (yes + some + no + untested, yes, some, no, untested))])
    heads = ["paper", "claims", "hold", "on some networks", "do not hold", "not tested"]
    return _lines(heads, rows)


def claims(results: Mapping[str, Any]) -> str:
    """The figures behind each claim on every network, as CSV. results: as of ``page``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["paper", "where", "claim", "figures", "network", "measured", "holds"])
    for table, claim, found in _tested({t: results["tables"][n] for n, t in TABLES.items()}):
        for network, (holds, said) in found.items():
            held = {True: "yes", False: "no", None: "not tested"}[holds]
            row = [table.paper, table.place, claim.text, claim.figures, network, said, held]
            writer.writerow(row)
    return text.getvalue()


def _claims(measured: Measured) -> str:
    first = next(name for each in measured.values() for name in each)
    rows: list[list[str]] = []
    for table, claim, found in _tested(measured):
        said = found[first][1]  # without figures: the reason why it was not tested
        shown = f"{claim.figures}: {said}" if claim.figures else said
        new = all(row[0] != table.place for row in rows)
        rows.append([table.place if new else "", claim.text, shown, verdict(found)])
    heads = ["where", "claim", f"figures on {first}", "holds"]
    if len(measured) == 1:
        heads, rows = heads[1:], [row[1:] for row in rows]
    return _lines(heads, rows)


def verdict(found: Mapping[str, Verdict]) -> str:
    """Whether a claim holds, over networks."""
    held = [name for name, (holds, _) in found.items() if holds]
    failed = [name for name, (holds, _) in found.items() if holds is False]
    if held and failed:
        return f"{', '.join(held)} only"
    return "yes" if held else "no" if failed else "not tested"


def _notes(tables: Iterable[Table]) -> str:
    return "".join(
        f"* {table.place[0].upper()}{table.place[1:]}: {table.about}\n" for table in tables
    )


def _setup(results: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for name, network in results["networks"].items():
        virtual = f"{network['virtual_images_per_class']} × {len(network['seeds'])}"
        accuracy = f"{network['accuracy']:.2f} %"
        rows.append(
            [name, f"`{network['checkpoint']}`", accuracy, virtual, network.get("precision", "")]
        )
    heads = ["network", "checkpoint", "accuracy", "virtual images a class × seeds", "precision"]
    yield _lines(heads, rows)
    first = next(iter(results["networks"].values()))
    sets = _joined(f"{name} ({count:,})" for name, count in first["sets"].items())
    yield (
        f"ID images are `{first['test']}` ({first['tested']:,}); `{first['train']}` has the "
        f"training images. OOD sets: {sets}.\n"
    )


def _when(results: Mapping[str, Any]) -> str:
    dates: dict[str, list[str]] = {}
    for table in results["tables"].values():
        for each in table.values():
            versions = f"oodcli {each['versions']['oodcli']}, torch {each['versions']['torch']}"
            dates.setdefault(versions, []).append(each["date"])
    runs = (
        f"{' to '.join(sorted({min(days), max(days)}))} with {versions}"
        for versions, days in sorted(dates.items(), key=lambda each: each[1])
    )
    return f"Measured on {results['machine']}: {'; '.join(runs)}.\n"


def _joined(parts: Iterable[object]) -> str:
    return ", ".join(map(str, parts))


def _lines(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
