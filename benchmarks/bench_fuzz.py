"""What broken and hostile files do: mutated inputs over all parsers.

    python -m benchmarks.bench_fuzz [--inputs 10000] [--seed 0] [--seconds 600] [--keep FOLDER]

A small valid sample of everything that oodcli reads is mutated at random (cut, bits flipped, parts
moved, lengths set to huge numbers; text by its words, archives by their members, HDF5 by its
datasets and attributes) and handed to the parser that the command line calls, in processes of their
own that may take 20 seconds and 4 GB of addresses an input. It must be read, or be refused by an
OodcliError or, an image, by its row's error. Anything else is a finding: the exit status is 1, and
--keep keeps the inputs. One JSON object is printed, with the counts of each kind of file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # of this checkout

from mutations import mutated
from samples import PARSERS, SLOW, Parser, write_samples

LIMIT_S = 20.0
START_S = 120.0
LIMIT_MB = 2000.0
ADDRESSES = 4 << 30
"""Bytes that a worker may reserve beyond what it has when it starts."""


@dataclass
class Count:
    """What became of the inputs of one kind."""

    inputs: int = 0
    read: int = 0
    refused: int = 0
    other_exceptions: int = 0
    crashed: int = 0
    timed_out: int = 0
    too_large: int = 0
    largest_mb: float = 0.0
    slowest_s: float = 0.0


# --- processes ----------------------------------------------------------------------------------


def serve(connection: Connection, samples: Path, folder: Path) -> None:
    """A worker: takes kind and seed, answers with outcome, reason, seconds and peak MB."""
    import torch

    from oodcli.errors import OodcliError

    torch.set_num_threads(1)
    parser = Parser(samples)
    used = status_kb("VmSize") * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, used + ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send(("ready", "", 0.0, 0.0))
    while True:
        kind, seed = connection.recv()
        path = write_input(kind, seed, samples, folder)
        reset_peak()
        start = time.perf_counter()
        outcome, reason = "read", ""
        try:
            parser.parse(PARSERS[kind][0], path)
        except OodcliError as error:
            outcome = "refused"
            if not str(error).strip():
                outcome, reason = "other_exceptions", "an empty sentence"
        except BaseException as error:  # a panic of Rust's is none of Exception's
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "oodcli" in frame.filename] or list(frames)
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            outcome, reason = (
                "other_exceptions",
                f"{type(error).__name__} at {where}: {error}"[:300],
            )
        seconds = time.perf_counter() - start
        path.unlink(missing_ok=True)
        connection.send((outcome, reason, seconds, status_kb("VmHWM") / 1000))


def write_input(kind: str, seed: int, samples: Path, folder: Path) -> Path:
    """The mutated file; the same for the same seed."""
    name = PARSERS[kind][1]
    path = folder / name
    path.write_bytes(mutated((samples / name).read_bytes(), name, Random(f"{kind} {seed}")))
    return path


def status_kb(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0


def reset_peak() -> None:
    """Forgets the largest resident size until now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


class Worker:
    """A process that parses; a new one where the last has died or hangs."""

    def __init__(self, samples: Path, folder: Path) -> None:
        self.samples, self.folder = samples, folder
        folder.mkdir()
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, self.samples, self.folder), daemon=True
        )
        self.process.start()
        theirs.close()
        if not self.connection.poll(START_S):
            raise SystemExit(f"a worker did not start in {START_S:g} s")
        self.connection.recv()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()

    def run(self, kind: str, seed: int) -> tuple[str, str, float, float]:
        self.connection.send((kind, seed))
        outcome, reason = "timed_out", f"after {LIMIT_S:g} s"
        try:
            if self.connection.poll(LIMIT_S):
                answer: tuple[str, str, float, float] = self.connection.recv()
                if answer[3] > LIMIT_MB / 2 + 200:  # some of it is kept, and would count again
                    self.stop()
                    self.start()
                return answer
        except (EOFError, OSError):
            self.process.join(5)
            outcome, reason = "crashed", f"exit status {self.process.exitcode}"
        self.stop()
        self.start()
        return outcome, reason, LIMIT_S if outcome == "timed_out" else 0.0, 0.0


@dataclass
class Run:
    """Inputs still to be tried, and what became of the others."""

    inputs: Iterator[tuple[str, int]]
    until: float
    samples: Path
    keep: Path | None
    counts: dict[str, Count] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self, worker: Worker) -> None:
        while time.monotonic() < self.until:
            with self.lock:
                given = next(self.inputs, None)
            if given is None:
                break
            kind, seed = given
            self.note(kind, seed, *worker.run(kind, seed))
        worker.stop()

    def note(
        self, kind: str, seed: int, outcome: str, reason: str, seconds: float, peak: float
    ) -> None:
        if outcome in ("read", "refused") and peak > LIMIT_MB:
            outcome, reason = "too_large", f"{peak:.0f} MB"
        with self.lock:
            count = self.counts.setdefault(kind, Count())
            count.inputs += 1
            setattr(count, outcome, getattr(count, outcome) + 1)
            count.largest_mb = max(count.largest_mb, round(peak, 1))
            count.slowest_s = max(count.slowest_s, round(seconds, 2))
            if outcome in ("read", "refused"):
                return
            self.findings.append(f"{kind}, seed {seed}: {outcome.replace('_', ' ')}: {reason}")
            if self.keep is not None:
                folder = self.keep / f"{kind.replace(' ', '-')}-{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                write_input(kind, seed, self.samples, folder)


def plan(inputs: int, seed: int, only: Callable[[str], bool]) -> Iterator[tuple[str, int]]:
    """Kinds in turn, each with a seed of its own, until there are so many."""
    turn = given = 0
    kinds = [kind for kind in PARSERS if only(kind)]
    while given < inputs:
        for kind in kinds:
            if turn % SLOW.get(kind, 1) == 0 and given < inputs:
                given += 1
                yield kind, seed * 1_000_000 + turn
        turn += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600, help="stop after so long")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs of findings")
    parser.add_argument("--only", default="", help="kinds with this word in their name")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        samples = Path(made) / "samples"
        samples.mkdir()
        write_samples(samples)
        inputs = plan(options.inputs, options.seed, lambda kind: options.only in kind)
        until = time.monotonic() + options.seconds
        run = Run(inputs, until, samples, options.keep)
        workers = [Worker(samples, Path(made) / f"w{n}") for n in range(options.workers)]
        threads = [threading.Thread(target=run.work, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print("\n".join(sorted(run.findings)), file=sys.stderr)
    total = sum(count.inputs for count in run.counts.values())
    print(
        json.dumps(
            {
                "inputs": total,
                "seed": options.seed,
                "findings": sorted(run.findings),
                "results": {kind: vars(run.counts[kind]) for kind in PARSERS if kind in run.counts},
            },
            indent=1,
        )
    )
    return int(bool(run.findings))


if __name__ == "__main__":
    sys.exit(main())
