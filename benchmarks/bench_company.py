"""What commands lose when they share the processor.

    python -m benchmarks.bench_company CHECKPOINT [--jobs 6] [--rows 20000] [--images 200]
        [--active]

As many equal jobs of 'oodcli score' on noise, then of 'oodcli invert', one after another, and all
at the same time; each a process that chooses its own number of threads. Prints the seconds of both,
their ratio, which is 1 where company costs nothing, and the processor seconds. --active: idle
threads spin, as OpenMP's do by default, instead of soon sleeping as oodcli has them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.measure import usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--active", action="store_true")
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        os.environ.pop(name, None)
    if options.active:
        os.environ["OMP_WAIT_POLICY"] = "active"
    commands = {
        "score": ["score", str(options.checkpoint), f"noise:uniform?n={options.rows}", "-d", "msp"],
        "invert": ["invert", str(options.checkpoint), "--total", str(options.images)],
    }
    results = {}
    with tempfile.TemporaryDirectory() as folder:

        def job(command: list[str], number: int) -> float:
            suffix = {"score": "csv", "invert": "h5"}[command[0]]
            output = ["-o", f"{folder}/{number}.{suffix}", "--force"]
            found = usage([sys.executable, "-m", "oodcli", *command, *output])
            return found["processor_seconds"]

        for name, command in commands.items():
            job(command, 0)  # files are in memory, and what can be compiled is
            report = {}
            for how, at_once in (("after one another", 1), ("side by side", options.jobs)):
                start = time.perf_counter()
                with ThreadPoolExecutor(at_once) as pool:
                    spent = list(pool.map(partial(job, command), range(options.jobs)))
                report[how] = round(time.perf_counter() - start, 2)
                report[f"processor seconds, {how}"] = round(sum(spent), 2)
            report["ratio"] = round(report["side by side"] / report["after one another"], 3)
            results[name] = report
    print(json.dumps({"jobs": options.jobs, "results": results}, indent=1))


if __name__ == "__main__":
    main()
