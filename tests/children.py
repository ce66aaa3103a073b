"""A process that runs a file of tests, which forks for every job: all that a job needs has been
imported before the fork."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from contextlib import suppress
from types import TracebackType
from typing import Any, Self


class Child:
    """Runs ``python FILE``, which answers each line of JSON with another one. A context manager."""

    def __init__(self, file: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", file],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, job: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, where: TracebackType | None
    ) -> None:
        self.process.communicate(timeout=60)
        assert self.process.returncode == 0 or error is not None


def import_everything() -> None:
    """Every module of oodcli, and one thread: a fork and a pool of threads do not go together."""
    import torch

    import oodcli

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(oodcli.__path__, "oodcli."):
        if not module.name.endswith("__main__"):
            with suppress(ImportError):  # of an optional package
                importlib.import_module(module.name)
