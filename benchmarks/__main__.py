"""All benchmarks, one after another, each in a process of its own.

    python -m benchmarks [CHECKPOINT] [--only NAME …] [-o FOLDER] [--threads 2] [--full] [-- WORD …]

Without a CHECKPOINT: the network of 'oodcli demo', trained here in seconds. Writes FOLDER/
benchmarks.json and benchmarks.md (default: benchmark-results), both anew after each benchmark, and
prints the Markdown in the end. As it is, all of it takes less than 15 minutes on two cores; --full
takes the sizes and rounds of docs/research/cost.md instead, which is hours and 10 GB of disk. Words
after -- are handed to every benchmark that runs. The exit status is 1 when one failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bench_fit import FITTED
from benchmarks.measure import machine, pinned


class Benchmark(NamedTuple):
    """What bench_NAME is given: always, and then as it is or with --full. CHECKPOINT, FOLDER (an
    empty one) and THREADS stand for what they say."""

    words: tuple[str, ...]
    usual: tuple[str, ...] = ()
    full: tuple[str, ...] = ()


BENCHMARKS = {
    "startup": Benchmark(("CHECKPOINT",)),
    "score": Benchmark(("CHECKPOINT", "--threads", "THREADS")),
    "invert": Benchmark(("CHECKPOINT", "--threads", "THREADS"), usual=("--rounds", "3")),
    "fit": Benchmark(
        ("FOLDER",),
        usual=("--rows", "10000", "--width", "512", "--only", *(n for n in FITTED if n != "lsgm")),
    ),
    "memory": Benchmark(("CHECKPOINT",), full=("--rows", "1000000")),
    "growth": Benchmark(("CHECKPOINT",)),
    "company": Benchmark(("CHECKPOINT",), usual=("--jobs", "3", "--per-class", "5")),
    "kills": Benchmark(("CHECKPOINT",), usual=("--kills", "12"), full=("--kills", "300")),
    "fuzz": Benchmark((), usual=("--inputs", "500", "--seconds", "60"), full=("--inputs", "10000")),
}


def main(words: Sequence[str] | None = None) -> int:
    given, extra = split_off(sys.argv[1:] if words is None else words)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=_first_line(__doc__))
    parser.add_argument("checkpoint", type=Path, nargs="?", metavar="CHECKPOINT")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=[], metavar="NAME")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmark-results"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args(given)
    if options.checkpoint is not None and not options.checkpoint.is_file():
        parser.error(f"{options.checkpoint} is not a file")
    options.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "machine": machine(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(
            ["python", "-m", "benchmarks", *given, *(["--", *extra] * bool(extra))]
        ),
        "checkpoint": str(options.checkpoint or "the network of 'oodcli demo', 8 x 8 digits"),
        "threads": options.threads,
        "benchmarks": {},
    }
    with checkpoint_of(options.checkpoint) as checkpoint:
        for name in options.only or BENCHMARKS:
            print(f"{name} …", file=sys.stderr, flush=True)
            entry = run(name, checkpoint, options.threads, options.full, extra)
            outcome = "failed" if "error" in entry else "done"
            print(f"{name}: {outcome} after {entry['seconds']:.0f} s", file=sys.stderr)
            report["benchmarks"][name] = entry
            text = json.dumps(report, indent=1, ensure_ascii=False)
            (options.output / "benchmarks.json").write_text(text + "\n", encoding="utf-8")
            (options.output / "benchmarks.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report), end="")
    return int(any("error" in entry for entry in report["benchmarks"].values()))


def split_off(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words before and after the first ``--``."""
    cut = list(words).index("--") if "--" in words else len(words)
    return list(words[:cut]), list(words[cut + 1 :])


@contextlib.contextmanager
def checkpoint_of(given: Path | None) -> Iterator[Path]:
    """The given one, or the demo's in a temporary folder."""
    if given is not None:
        yield given.resolve()
        return
    import torch

    from oodcli.stages.demo import CARD, TRAINED_ON, digits, train

    images, labels = digits()
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "digits.pt"
        torch.save(train(images[:TRAINED_ON], labels[:TRAINED_ON], lambda count: None), path)
        path.with_suffix(".toml").write_text(CARD, encoding="utf-8")
        yield path


def run(
    name: str, checkpoint: Path, threads: int, full: bool, extra: Iterable[str] = ()
) -> dict[str, Any]:
    """The object that a benchmark printed, or the ``error`` that it ended with, and the seconds
    that it took."""
    known = BENCHMARKS[name]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        stands_for = {"CHECKPOINT": str(checkpoint), "FOLDER": folder, "THREADS": str(threads)}
        given = [*known.words, *(known.full if full else known.usual), *extra]
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.bench_{name}"]
            + [stands_for.get(word, word) for word in given],
            cwd=Path(__file__).parents[1],
            env=pinned(threads),
            capture_output=True,
            text=True,
        )
    seconds = round(time.perf_counter() - start, 1)
    try:
        if done.returncode:
            raise ValueError(f"exit status {done.returncode}")
        return {**json.loads(done.stdout), "seconds": seconds}
    except (ValueError, TypeError) as error:  # printed no JSON object
        return {
            "error": "\n".join([str(error), *done.stderr.splitlines()[-8:]]),
            "seconds": seconds,
        }


def markdown(report: Mapping[str, Any]) -> str:
    """A heading and a table for each benchmark; what is neither is in the JSON alone."""
    parts = ["# Benchmarks", settings(report["machine"])]
    parts.append(settings({key: report[key] for key in ("date", "checkpoint", "threads")}))
    parts.append(f"`{report['command']}`")
    for name, entry in report["benchmarks"].items():
        parts.append(f"## {name}")
        if "error" in entry:
            parts.append(f"It failed:\n\n```\n{entry['error']}\n```")
            continue
        parts.append(settings(entry))
        parts += [table(value, key) for key, value in entry.items() if is_table(value)]
    return "\n\n".join(parts) + "\n"


def settings(entry: Mapping[str, Any]) -> str:
    """What is one word or number, and lists of them, on a line."""
    shown = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in entry.items()
        if isinstance(value, str | int | float)
        or (isinstance(value, list) and not any(isinstance(each, list) for each in value))
    }
    return "; ".join(f"{key.replace('_', ' ')}: {text}" for key, text in shown.items() if text)


def is_table(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(row, dict) for row in value.values())
    )


def table(rows: Mapping[str, Mapping[str, Any]], title: str = "") -> str:
    """Rows are contestants, columns are metrics; a cell is empty where one has no such metric."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [
        [title.replace("results", ""), *(column.replace("_", " ") for column in columns)],
        ["---", *["---:"] * len(columns)],
        *([name, *(cell(row.get(column)) for column in columns)] for name, row in rows.items()),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    digits = f"{value:,.4g}"
    return f"{value:,.0f}" if "e" in digits and 1e4 <= abs(value) < 1e15 else digits


def _first_line(text: str | None) -> str:
    return (text or "").splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
