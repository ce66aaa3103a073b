"""Whether c2ir-peak, duo or trio find more than the parts that they add.

    python -m benchmarks.parts ARTEFACT ID.h5 NAME=OOD.h5 … [--every 1]

From feature caches: AUROC and TNR95 in percent of each part, of the sum without it, and of the sum,
means over the OOD sets first. Prints Markdown. Fit c2ir-peak with -p c2ir-peak.nci=0.5 to see nci
as well. --every N takes every N-th row of each cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from oodcli.detectors.common_scale import Summed, on_common_scale
from oodcli.files.artefact import read_artefact
from oodcli.files.cache import open_cache
from oodcli.metrics import auroc, tnr95


def scaled_parts(detector: Summed, cache: Path) -> Tensor:
    """(N, P): what each part adds to the score of each row. Raises SystemExit where a row has no
    finite score."""
    found = []
    with open_cache(cache) as opened:
        for block in opened.readable(detector.score_needs):
            parts = torch.stack([part.score(block) for part in detector.parts], 1)
            found.append(on_common_scale(parts, detector.median, detector.spread))
    rows = torch.cat(found)
    if not torch.isfinite(rows).all():
        raise SystemExit(f"{cache}: a row has no finite score")
    return rows


def combinations(names: Sequence[str]) -> dict[str, list[int]]:
    """Name → indices of the parts that are added."""
    every = range(len(names))
    alone = {name: [k] for k, name in enumerate(names)}
    without = {f"without {name}": [j for j in every if j != k] for k, name in enumerate(names)}
    return {**alone, **(without if len(names) > 2 else {}), "sum": list(every)}


def measured(known: Tensor, sets: Mapping[str, Tensor], which: Sequence[int]) -> list[str]:
    """Cells of a row: the mean over the sets, then each set."""
    ids = known[:, which].sum(1).numpy()
    pairs = []
    for rows in sets.values():
        ood = rows[:, which].sum(1).numpy()
        pairs.append((100 * auroc(ids, ood), 100 * tnr95(ids, ood)))
    return [f"{a:.1f}/{t:.1f}" for a, t in [tuple(np.mean(pairs, axis=0)), *pairs]]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts")
    parser.add_argument("artefact", type=Path, metavar="ARTEFACT")
    parser.add_argument("id", type=Path, metavar="ID.h5")
    parser.add_argument("ood", nargs="+", metavar="NAME=OOD.h5")
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args(words)
    detector = read_artefact(options.artefact).detector
    if not isinstance(detector, Summed):
        raise SystemExit(f"{options.artefact}: {detector.name} is no sum of parts")
    paths = dict(pair.split("=", 1) for pair in options.ood)
    known = scaled_parts(detector, options.id)[:: options.every]
    sets = {
        name: scaled_parts(detector, Path(path))[:: options.every] for name, path in paths.items()
    }
    print(f"| {detector.name} | mean | {' | '.join(sets)} |\n| --- |{' --- |' * (1 + len(sets))}")
    for name, which in combinations([part.name for part in detector.parts]).items():
        print(f"| {name} | {' | '.join(measured(known, sets, which))} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
