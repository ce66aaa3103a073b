"""Whether memory grows with the number of images.

    python -m benchmarks.bench_memory CHECKPOINT [--rows 20000] [--folder DIR]

Peak resident memory and seconds of 'oodcli score' on noise, of 'oodcli extract' of the same noise
into a cache, and of 'oodcli score' of that cache, each in a process of its own, at a tenth of the
rows and at all of them. With every detector that needs no gradients and no images of the user's.
The cache goes to DIR, by default a temporary folder, and is removed; with --rows 1000000 that is
6 GB for the demo's network.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import peak
from oodcli import detectors
from oodcli.networks.load import load_classifier
from oodcli.recording.recorder import AGAIN, recordable


def single_pass(checkpoint: Path) -> list[str]:
    """Detectors that a forward pass of this network serves, without images of the user's."""
    recorded = recordable(load_classifier(checkpoint)) - AGAIN
    kinds = [detectors.get(name) for name in detectors.names()]
    return [
        kind.name
        for kind in kinds
        if kind.needs <= recorded and (not kind.fitted or kind.reference_images is not None)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    names = single_pass(options.checkpoint)
    chosen = [word for name in names for word in ("-d", name)]
    results = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        cache, scores = f"{made}/cache.h5", f"{made}/scores.csv"
        for rows in dict.fromkeys((max(options.rows // 10, 1), options.rows)):
            images = [str(options.checkpoint), f"noise:uniform?n={rows}"]
            commands = {
                "score noise": ["score", *images, *chosen, "-o", scores],
                "extract noise": ["extract", *images, "-o", cache],
                "score the cache": ["score", cache, "-d", "all", "-o", scores],
            }
            for name, words in commands.items():
                seconds, megabytes = peak([sys.executable, "-m", "oodcli", *words, "--force"])
                results[f"{name}, {rows:,} rows"] = {
                    "peak_mb": round(megabytes),
                    "seconds": round(seconds, 1),
                }
    report = {
        "rows": options.rows,
        "detectors": len(names),
        "threads": torch.get_num_threads(),
        "results": results,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
