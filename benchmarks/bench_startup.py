"""What it costs to start: help, completion, and the shortest command that needs torch.

    python -m benchmarks.bench_startup CHECKPOINT [--rounds 7]

Processor time (user and system) of a process, beside that of a bare Python and of one that imports
typer and nothing else. All take turns, so that a noisy machine is as noisy for all; the first turn
fills the caches and does not count. Best and median are printed as JSON. Where
PYTHONDONTWRITEBYTECODE is set, every start compiles what is installed in editable mode, which adds
some 10 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

BASH = {"_OODCLI_COMPLETE": "complete_bash"}
MAIN = "import sys; sys.argv[0] = 'oodcli'; from oodcli.cli import main; main()"
"""As the console script has it, which need not be on the path."""


def contestants(checkpoint: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Arguments of Python and what is added to the environment, by name."""

    def oodcli(*words: str, **environment: str) -> tuple[list[str], dict[str, str]]:
        return ["-c", MAIN, *words], environment

    return {
        "python -c ''": (["-c", ""], {}),
        "import typer": (["-c", "import typer"], {}),
        "oodcli --version": oodcli("--version"),
        "oodcli --help": oodcli("--help"),
        "oodcli score --help": oodcli("score", "--help"),
        "complete a command": oodcli(**BASH, COMP_WORDS="oodcli s", COMP_CWORD="1"),
        "complete an option": oodcli(**BASH, COMP_WORDS="oodcli score --", COMP_CWORD="2"),
        "complete a detector": oodcli(**BASH, COMP_WORDS="oodcli score -d ", COMP_CWORD="3"),
        "oodcli inspect CHECKPOINT": oodcli("inspect", str(checkpoint)),
    }


def seconds(words: list[str], environment: dict[str, str]) -> float:
    """Processor time of a process. Raises CalledProcessError when it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *words],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    work = contestants(options.checkpoint)
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(options.rounds + 1):
        for name, (words, environment) in work.items():
            spent = seconds(words, environment)
            if turn >= 1:
                times[name].append(spent)
    print(
        json.dumps(
            {
                "rounds": options.rounds,
                "python": platform.python_version(),
                "typer": version("typer"),
                "results": {
                    name: {
                        "best_s": round(min(spent), 3),
                        "median_s": round(statistics.median(spent), 3),
                    }
                    for name, spent in times.items()
                },
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
