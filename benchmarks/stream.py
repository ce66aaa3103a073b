"""What ``score --stream`` gains, by the share of OOD images in the job.

    python -m benchmarks.stream ID.h5 NAME=OOD.h5 … -d DETECTOR … [--draws 20]

Draws jobs from feature caches: ID images, and as many of one OOD set as make the share. Prints
Markdown: TNR95 of the plain scores, the mean change over the sets, and that of the worst set.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import oodcli
from oodcli.files.cache import open_cache
from oodcli.files.scores import ScoreBlock
from oodcli.metrics import tnr95
from oodcli.stages.chosen import SIMILARITY
from oodcli.stages.stream import sketch, smoothed, stream_name

Floats = NDArray[np.float64]


def rows_of(cache: Path, detectors: Sequence[str], folder: Path) -> ScoreBlock:
    """All rows of a cache with their scores and sketches."""
    oodcli.score(cache, None, folder / "scores.csv", detectors, force=True)
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    names = [name for name in found[0] if name not in ("path", "label", "predicted", "confidence")]
    names.remove("error")
    with open_cache(cache) as opened:
        blocks = [each.features for each in opened.blocks({SIMILARITY})]
    sketches = np.concatenate([sketch(each) for each in blocks if each is not None])
    scores = {name: np.array([float(row[name]) for row in found]) for name in names}
    return _job([row["path"] for row in found], scores, sketches)


def _job(
    paths: Sequence[str], scores: Mapping[str, Floats], sketches: NDArray[np.float32]
) -> ScoreBlock:
    none = [""] * len(paths)
    return ScoreBlock(paths, none, none, none, np.zeros(len(paths)), scores, sketches)


def drawn(known: ScoreBlock, ood: ScoreBlock, count: int, share: float, seed: int) -> ScoreBlock:
    """A job of ``count`` rows, of which the last ones are OOD."""
    random = np.random.default_rng(seed)
    few = round(share * count)
    parts = []
    for rows, size in ((known, count - few), (ood, few)):
        if size > len(rows.paths):
            raise SystemExit(f"{len(rows.paths)} rows, but a job needs {size}: lower --rows")
        parts.append((rows, random.permutation(len(rows.paths))[:size]))
    paths = [rows.paths[row] for rows, chosen in parts for row in chosen]
    scores = {
        name: np.concatenate([np.asarray(rows.scores[name])[chosen] for rows, chosen in parts])
        for name in known.scores
    }
    sketches = [rows.sketches[chosen] for rows, chosen in parts if rows.sketches is not None]
    return _job(paths, scores, np.concatenate(sketches))


def gains(job: ScoreBlock, few: int) -> dict[str, tuple[float, float]]:
    """Detector → TNR95 in percent of the plain scores and of those that borrow. few: OOD rows."""
    names = list(job.scores)
    (found,) = smoothed([job], names)
    pairs = {name: (found.scores[name], found.scores[stream_name(name)]) for name in names}
    return {
        name: tuple(100 * tnr95(each[:-few], each[-few:]) for each in pair)  # type: ignore[misc]
        for name, pair in pairs.items()
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream")
    parser.add_argument("id", type=Path, metavar="ID.h5")
    parser.add_argument("ood", nargs="+", metavar="NAME=OOD.h5")
    parser.add_argument("-d", "--detector", action="append", required=True, metavar="DETECTOR")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--share", type=float, nargs="+", default=[0.005, 0.02, 0.1, 0.5])
    parser.add_argument("--draws", type=int, default=10)
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        known = rows_of(options.id, options.detector, Path(folder))
        sets = {
            name: rows_of(Path(path), options.detector, Path(folder))
            for name, _, path in (each.partition("=") for each in options.ood)
        }
    print("| share | detector | TNR95 | change | worst set |\n| --- | --- | --- | --- | --- |")
    for share in options.share:
        few = round(share * options.rows)
        found: dict[str, dict[str, Floats]] = {name: {} for name in known.scores}
        for set_, rows in sets.items():
            jobs = [drawn(known, rows, options.rows, share, seed) for seed in range(options.draws)]
            each = [gains(job, few) for job in jobs]
            for name in found:
                found[name][set_] = np.mean([pair[name] for pair in each], axis=0)
        for name, by_set in found.items():
            change = {set_: borrowed - plain for set_, (plain, borrowed) in by_set.items()}
            worst = min(change, key=lambda set_: change[set_])
            plain = np.mean([pair[0] for pair in by_set.values()])
            mean = np.mean(list(change.values()))
            print(f"| {share:g} | `{name}` | {plain:.1f} | {mean:+.1f} | ", end="")
            print(f"{change[worst]:+.1f} ({worst}) |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
