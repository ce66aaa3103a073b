"""Real jobs, killed with SIGKILL at random moments and begun again, until they are done.

    python -m benchmarks.bench_kills CHECKPOINT [--kills 30] [--images 1500] [--seed 0]

Each of invert, extract and score (as CSV and as Parquet) runs undisturbed first. Then it is begun,
killed after a random time of up to a tenth more than that took, and started again with the same
words; when it is done, its output must have the bytes of the undisturbed run, and it begins anew.
At every kill, an output that is there must be whole. Exits with 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any


def jobs(checkpoint: Path, images: int) -> dict[str, list[str]]:
    """name → words. The output is the last one."""
    noise = f"noise:uniform?n={images}"
    once = [str(checkpoint.resolve()), noise, "--batch-size", "50"]
    invert = ["invert", once[0], "--per-class", "6", "--batch-size", "10", "--no-compile"]
    return {
        "invert": [*invert, "-o", "v.h5"],
        "extract": ["extract", *once, "-o", "f.h5"],
        "score": ["score", *once, "-d", "all", "-o", "s.csv"],
        "score, Parquet": ["score", *once, "-d", "energy", "-d", "act", "-o", "s.parquet"],
    }


def started(words: list[str], folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "oodcli", *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def outputs(folder: Path) -> dict[str, bytes]:
    """What a user would take for an output: hidden and partial files are none."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.suffix != ".partial"
    }


def killed(words: list[str], kills: int, random: Random) -> dict[str, Any]:
    """Counts of one job."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        start = time.perf_counter()
        process = started(words, folder)
        _, err = process.communicate()
        if process.returncode:
            raise SystemExit(f"{' '.join(words)}\n{err.decode()}")
        seconds = time.perf_counter() - start
        expected = outputs(folder)
        for name in expected:
            (folder / name).unlink()
        counts = {"seconds": round(seconds, 2), "kills": 0, "resumed": 0, "done": 0, "wrong": 0}
        while counts["kills"] < kills:
            process = started(words, folder)
            try:
                _, err = process.communicate(timeout=random.uniform(0, 1.1 * seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                _, err = process.communicate()
                counts["kills"] += 1
            left = outputs(folder)
            whole = all(expected[name] == left[name] for name in left)
            # All may be done when it is killed: the interpreter, too, takes its time to end.
            done = left.keys() == expected.keys() and not leftovers(folder)
            if process.returncode == 0 or done:
                counts["done"] += 1
                whole = whole and done
                for name in left:
                    (folder / name).unlink()
            counts["resumed"] += b"resuming: " in err
            if not whole or process.returncode not in (0, -9):
                counts["wrong"] += 1
                print(f"{words}: {process.returncode} {err.decode()}", file=sys.stderr)
        return counts


def leftovers(folder: Path) -> list[Path]:
    """Stored batches, and files at temporary names; not a folder that has just been emptied."""
    return [*folder.glob(".*"), *folder.glob("*.partial/job.json")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--kills", type=int, default=30, help="shared by the jobs")
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random = Random(options.seed)
    table = jobs(options.checkpoint, options.images)
    results = {
        name: killed(command, -(-options.kills // len(table)), random)
        for name, command in table.items()
    }
    print(json.dumps({"images": options.images, "seed": options.seed, "results": results}))
    return int(any(each["wrong"] for each in results.values()))


if __name__ == "__main__":
    sys.exit(main())
