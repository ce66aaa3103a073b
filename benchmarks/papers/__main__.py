"""The tables of the papers, measured with oodcli's commands on your networks and images.

    python -m benchmarks.papers CONFIG DATA --work DIR [TABLE …] [--network NAME …]
    python -m benchmarks.papers write [--check]

The first step runs the tables (without TABLE, all of them) of every network in CONFIG and puts
their figures into benchmarks/papers/results.json; figures of other tables and networks stay. Paths
in CONFIG are relative to the folder DATA. Commands that ran before in the WORK folder are not run
again. The second step writes docs/research/results.md, claims.csv and tables.csv from results.json;
with --check it only fails where they differ. here.toml is the configuration of that page,
public.toml one of the papers' own data sets.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.papers.config import located, read_config
from benchmarks.papers.page import ALL_FIGURES, CLAIMS, PAGE, RESULTS, claims, figures, page
from benchmarks.papers.runs import Runs
from benchmarks.papers.tables import TABLES


def main(words: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if words is None else words)
    if given[:1] == ["write"]:
        return _write(given[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.papers")
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], metavar="TABLE")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--machine", default=platform.processor(), metavar="WORDS")
    parser.add_argument("--network", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args(given)
    config = read_config(options.config, TABLES)
    unknown = sorted(set(options.network) - config.networks.keys())
    if unknown:
        parser.error(f"no network '{unknown[0]}' in {options.config}")
    options.work.mkdir(parents=True, exist_ok=True)
    data, work = options.data.resolve(), options.work.resolve()
    networks = [config.networks[name] for name in options.network or config.networks]
    try:
        networks = [located(each, config, data, work / each.folder / "lists") for each in networks]
    except ValueError as error:
        parser.error(str(error))
    for name in options.tables or TABLES:
        for network in networks:
            if name in network.tables:
                records = dict.fromkeys(r for t in network.tables for r in TABLES[t].records)
                runs = Runs(config, network, data, work, tuple(records))
                measured(runs, name, options.results, options.machine)
    return 0


def measured(runs: Runs, name: str, results: Path, machine: str) -> None:
    """Measures one table on one network and writes it into the results."""
    rows = TABLES[name].measure(runs)
    found = read_results(results)
    found["machine"] = machine
    if runs.counts.keys() >= runs.network.sets.keys():  # not where it was timed alone
        found["networks"] = found.get("networks", {}) | {runs.network.name: _said(runs)}
    tables = found.setdefault("tables", {})
    commands = dict.fromkeys(runs.commands)
    shown = [re.sub(r"(?<=[ =])/\S*/", "", command) for command in commands]  # no folder of ours
    taken = {"date": date.today().isoformat(), "versions": versions()}
    entry = {**taken, "commands": shown, "rows": rows}
    tables[name] = tables.get(name, {}) | {runs.network.name: entry}
    results.write_text(text_of(found), encoding="utf-8")


def text_of(results: Mapping[str, Any]) -> str:
    """JSON with each list of numbers on one line."""
    text = json.dumps(results, indent=1, ensure_ascii=False)
    numbers = r"\[\s+((?:-?[\d.]+,?\s+)+)\]"
    return re.sub(numbers, lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"


def _said(runs: Runs) -> dict[str, Any]:
    """A network's description for the page."""
    return {
        "checkpoint": Path(runs.network.checkpoint).name,
        "accuracy": round(100 * runs.accuracy, 2),
        "test": Path(runs.network.test.images).name,
        "train": Path(runs.network.train).name,
        "tested": runs.counts.get("ID", 0),
        "sets": {name: runs.counts.get(name, 0) for name in runs.network.sets},
        "virtual_images_per_class": runs.config.per_class,
        "seeds": list(runs.config.seeds),
        "precision": runs.config.precision,
    }


def read_results(path: Path = RESULTS) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def versions() -> dict[str, str]:
    python = ".".join(map(str, sys.version_info[:3]))
    names = ("oodcli", "torch", "numpy", "scikit-learn")
    return {"python": python, **{name: version(name) for name in names}}


def _write(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.papers write")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(words)
    results, status = read_results(), 0
    files = {PAGE: page(results), CLAIMS: claims(results), ALL_FIGURES: figures(results)}
    for path, made in files.items():
        if path.exists() and path.read_text("utf-8") == made:
            continue
        print(f"{path.name}: {'is not up to date' if options.check else 'written'}")
        if options.check:
            status = 1
        else:
            path.write_text(made, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
