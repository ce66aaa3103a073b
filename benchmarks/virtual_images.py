"""How many virtual images are enough: detection by detectors that are fitted on fewer of them.

    python -m benchmarks.virtual_images VIRTUAL.h5 ID.h5 NAME=OOD.h5 … -d DETECTOR …
        [--numbers 25 50 100 200] [--draws 5] [--class-means]

All files are feature caches. Draws rows of VIRTUAL.h5 at random. With over 100 classes, c2ir-z and
mds++ are fitted with one mean that all classes share; with --class-means, with the mean of each
class that VIRTUAL.h5 has. Prints Markdown: AUROC and TNR95 in percent, means over the OOD sets and
the draws, and the standard deviation of TNR95 over these.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean, stdev
from unittest.mock import patch

import torch

from benchmarks.real_images import Blocks, picked, scores
from oodcli import detectors
from oodcli.detectors import c2ir_z
from oodcli.detectors.base import Detector
from oodcli.files.cache import open_cache
from oodcli.metrics import auroc, tnr95


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.virtual_images")
    parser.add_argument("virtual", type=Path, metavar="VIRTUAL.h5")
    parser.add_argument("id", type=Path, metavar="ID.h5")
    parser.add_argument("ood", nargs="+", metavar="NAME=OOD.h5")
    parser.add_argument("-d", "--detector", action="append", required=True, metavar="DETECTOR")
    parser.add_argument("--numbers", type=int, nargs="+", default=[25, 50, 100, 200])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--class-means", action="store_true")
    options = parser.parse_args(words)
    kinds = [detectors.get(name) for name in options.detector]
    needs = frozenset[str]().union(*(kind.needs | kind.fit_needs() for kind in kinds))
    print("| fitted on | detector | AUROC | TNR95 |\n| --- | --- | --- | --- |")
    with ExitStack() as stack:

        def read(path: str | Path) -> Blocks:
            return list(stack.enter_context(open_cache(Path(path))).rows(needs))

        virtual, known = read(options.virtual), read(options.id)
        sets = [read(each.partition("=")[2]) for each in options.ood]
        count = sum(map(len, virtual))
        for number in (*(each for each in options.numbers if each < count), count):
            draws = options.draws if number < count else 1
            for kind in kinds:
                areas, rates = [], []
                for draw in range(draws):
                    generator = torch.Generator().manual_seed(draw)
                    rows = torch.randperm(count, generator=generator)[:number].sort().values
                    detector = fitted(kind, picked(virtual, rows), options.class_means)
                    inside = scores(detector, known).numpy()
                    outside = [scores(detector, blocks).numpy() for blocks in sets]
                    areas.append(100 * fmean(auroc(inside, each) for each in outside))
                    rates.append(100 * fmean(tnr95(inside, each) for each in outside))
                spread = f" ± {stdev(rates):.1f}" if draws > 1 else ""
                print(f"| {number} | `{kind.name}` | {fmean(areas):.1f} | ", end="")
                print(f"{fmean(rates):.1f}{spread} |", flush=True)
    return 0


def fitted(kind: type[Detector], virtual: Blocks, class_means: bool) -> Detector:
    """class_means: whether c2ir-z and mds++ have the means of the classes in ``virtual``, or one
    that all classes share, which is c2ir-z's own choice for over 100 classes."""
    if kind.name == "mds++":
        return kind.fit(virtual, classes="labels" if class_means else "none")
    if not class_means:
        return kind.fit(virtual)
    with patch.object(c2ir_z, "FEW_ROWS", 0):
        return kind.fit(virtual)


if __name__ == "__main__":
    sys.exit(main())
