"""docs/results.md: what was measured beside what the papers have, and what that makes of their
claims. All of it is made from results.json, published.json and the tables' own claims."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.papers.table import TABLES, Figures, Table, get

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PUBLISHED = HERE / "published.json"
PAGE = HERE.parents[1] / "docs" / "results.md"

TITLES = {
    "tnr95": "TNR95",
    "fpr95": "FPR95",
    "fpr95-ood": "FPR95, OOD positive",
    "auroc": "AUROC",
    "detection-accuracy": "detection accuracy",
    "aupr-in": "AUPR, ID",
    "aupr-out": "AUPR, OOD",
    "tpr10": "TPR10",
    "rank": "average rank",
}

INTRODUCTION = """\
# The papers' tables

The tables of the five papers that `oodcli` has its detectors from, taken anew with its commands.
The papers' figures stand **beside** ours and are not to be equalled: networks and OOD sets are
others. What can be compared is the order of methods on one network, and that is what the claims
are about. The last table is of no paper: our own detectors.
"""

CONVENTIONS = """\
* All figures are percent, but ranks and seconds. In brackets: 95 % bootstrap intervals of
  `oodcli evaluate`. They say how much depends on which images were drawn, nothing of other
  networks, training runs or OOD sets.
* "mean" is over the OOD sets. It has no interval where these were not evaluated together. Of the
  papers, LSGM's and that of the indicators print no means; those here are ours, of their figures.
* Seeds are those of the inversion. All else is deterministic, or has seed 0.
* "Holds" compares figures as they are (means over seeds), without regard to the intervals. Where a
  claim needs a number that the paper does not give, it says that the number is ours.
* Methods are named as oodcli names them: [their pages](detectors/index.md) have the formulas, and
  where those leave the papers.
"""


def page(results: Mapping[str, Any]) -> str:
    """results: what results.json holds."""
    tables = {name: get(name) for name in TABLES if name in results["tables"]}
    parts = [INTRODUCTION, *_networks(results), CONVENTIONS, "## Claims\n"]
    for paper in dict.fromkeys(table.paper for table in tables.values()):
        mine = {name: table for name, table in tables.items() if table.paper == paper}
        parts += [f"### {paper}: claims\n", _claims(mine, results["tables"])]
    published = read_published()
    for name, table in tables.items():
        parts += _section(table, results["tables"][name], published.get(name, []))
    parts += _how(results)
    return "\n".join(parts)


def read_published() -> dict[str, list[dict[str, Any]]]:
    """Table → the papers' networks, with rows like ours."""
    found: dict[str, list[dict[str, Any]]] = json.loads(PUBLISHED.read_text("utf-8"))
    for entries in found.values():
        for entry in entries:
            for on in entry["rows"].values():
                for metrics in on.values():
                    metrics |= {name: [value] for name, value in metrics.items()}
    return found


def _networks(results: Mapping[str, Any]) -> Iterator[str]:
    heads = ["network", "checkpoint", "right", "ID images: test, training, virtual", "OOD images"]
    rows = []
    for name, network in results["networks"].items():
        inside = (
            f"{network['test']} ({network['tested']:,})",
            network["train"],
            f"{network['virtual_images_per_class']} a class (seeds {network['seeds']})",
            *(["passes in bfloat16"] if network.get("precision") == "bfloat16" else []),
        )
        sets = ", ".join(f"{each} ({count:,})" for each, count in network["sets"].items())
        right = f"{network['accuracy']:.2f} %"
        rows.append([name, f"`{network['checkpoint']}`", right, ", ".join(inside), sets])
    yield _lines(heads, rows)


def _claims(tables: Mapping[str, Table], results: Mapping[str, Any]) -> str:
    rows = []
    for name, table in tables.items():
        for claim in table.claims:
            found = {n: claim.test(Figures(each["rows"])) for n, each in results[name].items()}
            rows.append([table.place, claim.text, *verdict(found)])
    return _lines(["", "claim", "here", "evidence"], rows)


def verdict(found: Mapping[str, tuple[bool | None, str]]) -> tuple[str, str]:
    """In words, over networks, and the evidence."""
    held = [name for name, (holds, _) in found.items() if holds]
    failed = [name for name, (holds, _) in found.items() if holds is False]
    if not held and not failed:
        said = "could not be tested"
    elif not failed:
        said = "holds"
    elif not held:
        said = "does not hold"
    else:
        said = f"holds on {', '.join(held)} only"
    reasons = [why for _, why in found.values()]
    if len(set(reasons)) == 1:
        return said, reasons[0]
    return said, "; ".join(f"{name}: {why}" for name, (_, why) in found.items())


def _section(
    table: Table, results: Mapping[str, Any], published: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    yield f"## {table.paper}, {table.place}\n"
    yield f"{table.about}\n"
    ours = {name: each["rows"] for name, each in results.items()}
    theirs = {f"*paper: {each['network']}, {each['place']}*": each["rows"] for each in published}
    yield _means(table, ours, theirs)
    by_set = [_by_set(name, rows) for name, rows in {**ours, **theirs}.items()]
    yield from (each for each in by_set if each)


def _means(table: Table, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    rows = []
    for method in order(ours, theirs):
        for source, found in {**ours, **theirs}.items():
            if method in found:
                mean = found[method]["mean"]
                cells = [_interval(mean.get(metric), metric) for metric in table.metrics]
                rows.append([_named(method), source, *cells])
    metrics = [TITLES.get(metric, metric) for metric in table.metrics]
    return _lines(["mean over sets" if theirs else "", "network", *metrics], rows)


def order(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Methods as we have them, each followed by the paper's of that name without our seed; those of
    the paper alone come last."""
    mine = dict.fromkeys(method for rows in ours.values() for method in rows)
    known = dict.fromkeys(method for rows in theirs.values() for method in rows)
    found: dict[str, None] = {}
    for plain in map(without_seed, mine):
        found |= dict.fromkeys(method for method in mine if without_seed(method) == plain)
        found |= dict.fromkeys([plain] if plain in known else [])
    return [*found, *(method for method in known if method not in found)]


def without_seed(method: str) -> str:
    return re.sub(r", seed \d+$", "", method)


def _by_set(source: str, rows: Mapping[str, Any]) -> str:
    sets = dict.fromkeys(name for on in rows.values() for name in on if name != "mean")
    if not sets:
        return ""
    lines = [
        [_named(method), *(_number(rows[method].get(name, {}).get("auroc")) for name in sets)]
        for method in order({source: rows}, {})
    ]
    return f"AUROC by set, {source}:\n\n" + _lines(["", *sets], lines)


def _interval(cell: Sequence[float] | None, metric: str) -> str:
    if cell is not None and len(cell) == 3:
        return f"{cell[0]:.1f} [{cell[1]:.1f}, {cell[2]:.1f}]"
    return _number(cell, 2 if metric.endswith(", s") else 1)


def _number(cell: Sequence[float] | None, digits: int = 1) -> str:
    return "" if cell is None else f"{cell[0]:.{digits}f}"


def _named(method: str) -> str:
    """In the type of code where it begins with a detector's name."""
    from oodcli import detectors

    first, comma, rest = method.partition(",")
    return f"`{first}`{comma}{rest}" if first in detectors.names() else method


def _how(results: Mapping[str, Any]) -> Iterator[str]:
    yield "## How\n"
    taken: dict[str, list[str]] = {}
    for table in results["tables"].values():
        for each in table.values():
            said = ", ".join(f"{name} {number}" for name, number in each["versions"].items())
            taken.setdefault(said, []).append(each["date"])
    when = (
        f"{' to '.join(sorted({min(dates), max(dates)}))} with {said}"
        for said, dates in sorted(taken.items(), key=lambda each: each[1])
    )
    yield f"Taken on {results['machine']}: {'; '.join(when)}.\n"
    yield (
        "<!-- not run: takes an hour, and the data -->\n\n"
        "```sh\n"
        "python -m benchmarks.papers benchmarks/papers/here.toml DATA --work work\n"
        "python -m benchmarks.papers benchmarks/papers/resnet34.toml DATA --work work\n"
        "python -m benchmarks.papers benchmarks/papers/wrn.toml DATA --work work\n"
        "python -m benchmarks.papers write\n"
        "```\n"
    )
    first = next(iter(results["tables"]))
    yield (
        "DATA is a folder with the checkpoints and images that the configuration names; "
        "`public.toml` beside it\nnames the papers' own data sets. What was run before is not run "
        "again. Each table is a small script in\n`benchmarks/papers/`, and `results.json` there "
        "has all commands, figures and intervals. The commands\nof "
        f"{get(first).paper}, {get(first).place}, on one network and the first OOD set:\n"
    )
    yield "```text"
    yield from _commands(results, first)
    yield "```\n"


def _commands(results: Mapping[str, Any], table: str) -> Iterator[str]:
    network, said = next(iter(results["networks"].items()))
    others = list(said["sets"])[1:]
    for command in dict.fromkeys(results["tables"][table][network]["commands"]):
        output = command.split(" -o ")[-1] if " -o " in command else ""
        if not any(name in output for name in others):
            yield shortened(command)


def shortened(command: str) -> str:
    """Lists of more than three detectors or sets as their first and their number."""

    def cut(match: re.Match[str]) -> str:
        option = match["option"]
        return f"{match['first']} … ({match['rest'].count(f' {option} ') + 1} {option})"

    command = re.sub(r" --(?:force|quiet)\b", "", command)
    command = re.sub(
        r"(?P<first>(?P<option>-d|--ood) \S+)(?P<rest>(?: (?P=option) \S+){3,})", cut, command
    )
    return re.sub(
        r"(--for [^\s,]+)((?:,[^\s,]+){3,})", lambda m: f"{m[1]},… ({m[2].count(',') + 1})", command
    )


def _lines(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
