"""The same work by one process, by torchrun's two, by two shards at a time, and by Ray.

    python -m benchmarks.bench_scale CHECKPOINT [--images 20000] [--per-class 20] [--rounds 3]

Wall time of whole commands, start-up included, each process with one thread (and one process with
two, for comparison). All ways take turns, so that a noisy machine is as noisy for all; medians are
printed as JSON, and what each way makes is compared byte for byte. Ray is left out where it is not
installed. To see what a way costs apart from the work, --images 0 scores 128 images.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from benchmarks.measure import machine

OODCLI = (sys.executable, "-m", "oodcli")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def run(words: list[str], threads: int = 1) -> None:
    """Raises CalledProcessError when a command fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(words, env=environment, check=True, capture_output=True)


def at_once(commands: list[list[str]]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    started = [
        subprocess.Popen(each, env=environment, stdout=quiet, stderr=quiet) for each in commands
    ]
    for process in started:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)


def ways(job: list[str], suffix: str, folder: Path) -> dict[str, Callable[[Path], None]]:
    """Name → what makes the output. job: words of oodcli without -o."""
    parts = [folder / f"part{number}{suffix}" for number in (1, 2)]

    def sharded(output: Path) -> None:
        at_once(
            [
                [*OODCLI, *job, "--shard", f"{number}/2", "-o", str(part), "--force"]
                for number, part in enumerate(parts, 1)
            ]
        )
        run([*OODCLI, "merge", *map(str, parts), "-o", str(output)])

    found: dict[str, Callable[[Path], None]] = {
        "one process": lambda output: run([*OODCLI, *job, "-o", str(output)]),
        "one process, two threads": lambda output: run([*OODCLI, *job, "-o", str(output)], 2),
        "torchrun, two processes": lambda output: run(
            [*TORCHRUN, "2", "-m", "oodcli", *job, "-o", str(output)]
        ),
        "two shards, then merge": sharded,
    }
    if job[0] == "score" and find_spec("ray") is not None:
        found["ray"] = lambda output: run([*OODCLI, *job, "--engine", "ray", "-o", str(output)])
    return found


def measured(job: list[str], suffix: str, rounds: int) -> dict[str, dict[str, float | bool]]:
    seconds: dict[str, list[float]] = {}
    same: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for turn in range(rounds):
            for way, make in ways(job, suffix, folder).items():
                output = folder / f"{turn} {way}{suffix}"
                start = time.perf_counter()
                make(output)
                seconds.setdefault(way, []).append(time.perf_counter() - start)
                if way != "one process, two threads":
                    first = folder / f"{turn} one process{suffix}"
                    same[way] = same.get(way, True) and rows(output) == rows(first)
            for path in folder.iterdir():
                path.unlink()
    base = statistics.median(seconds["one process"])
    return {
        way: {
            "seconds": round(statistics.median(times), 2),
            "speed-up": round(base / statistics.median(times), 2),
            **({"same": same[way]} if way in same else {}),
        }
        for way, times in seconds.items()
    }


def rows(path: Path) -> object:
    """What must be the same: of HDF5 the checksum of the list and of every dataset."""
    if path.suffix != ".h5":
        return path.read_bytes()
    import h5py

    with h5py.File(path) as file:
        found = {"": file.attrs["rows_sha256"]}
        file.visititems(lambda each, node: found.update({each: node.attrs.get("sha256")}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--per-class", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    checkpoint = str(options.checkpoint)
    noise = f"noise:blob?n={options.images or 128}"
    score = ["score", checkpoint, noise, "-d", "energy", "-d", "rg"]
    invert = ["invert", checkpoint, "--per-class", str(options.per_class)]
    invert += ["--no-compile", "--batch-size", "50"]  # shards are cut between batches
    report = {
        "machine": machine(),
        "images": options.images or 128,
        "virtual images a class": options.per_class,
        "score": measured(score, ".csv", options.rounds),
        "invert": measured(invert, ".h5", options.rounds),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
