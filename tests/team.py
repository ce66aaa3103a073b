"""Commands in several processes at once, as torchrun starts them, but as forks of one process that
has imported everything, and with a folder for a store.

``python tests/team.py`` reads jobs as lines of JSON: {"words": for each rank, "folder": …, "env":
…, "stop": {rank: batches after which it is interrupted}}. It answers each with a line: for each
rank {"status": …, "out": …, "err": …, "stored": numbers of its batches}. When a rank fails, it
stops the others.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from children import Child, import_everything


class Store:
    """A file for each key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def set(self, key: str, value: str) -> None:
        unfinished = self.folder / f".{os.getpid()}"
        unfinished.write_text(value, encoding="utf-8")
        unfinished.rename(self._path(key))

    def check(self, keys: list[str]) -> bool:
        return all(self._path(key).exists() for key in keys)

    def get(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def _path(self, key: str) -> Path:
        return self.folder / key.replace("/", "-")


def run(job: dict[str, Any], rank: int, place: Path) -> None:
    """In a fork: never comes back."""
    from commands import oodcli

    from oodcli.jobs.kept import Kept
    from oodcli.jobs.torchrun import Team

    os.chdir(job["folder"])
    os.environ.update(job["env"])
    team = Team(rank, len(job["words"]), Store(place))
    Team.assemble = classmethod(lambda cls: team)  # type: ignore[method-assign, assignment]
    write, stored = Kept.write, []

    def counting(self: Kept, number: tuple[int, ...], batch: Any) -> None:
        write(self, number, batch)
        stored.append(number[0])
        if len(stored) == job["stop"].get(str(rank)):
            raise KeyboardInterrupt

    Kept.write = counting  # type: ignore[method-assign]
    result = oodcli(*job["words"][rank])
    answer = {"status": result.status, "out": result.out, "err": result.err, "stored": stored}
    (place / f"answer{rank}").write_text(json.dumps(answer), encoding="utf-8")
    os._exit(int(result.status != 0))


def answers(job: dict[str, Any]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        place, children = Path(name), {}
        for rank in range(len(job["words"])):
            child = os.fork()
            if not child:
                try:
                    run(job, rank, place)
                except BaseException:  # also a signal after the command: a fork keeps the folder
                    traceback.print_exc()
                    os._exit(128 + signal.SIGTERM)
            children[child] = rank
        ended = {}
        while children:
            child, status = os.wait()
            ended[children.pop(child)] = os.waitstatus_to_exitcode(status)
            if status and children:
                time.sleep(0.3)  # torchrun does not notice at once either
                for other in children:
                    os.kill(other, signal.SIGTERM)
        found = []
        for rank, status in sorted(ended.items()):
            answer = place / f"answer{rank}"
            killed = {"status": status, "out": "", "err": "", "stored": []}
            found.append(json.loads(answer.read_text()) if answer.exists() else killed)
        return found


def main() -> None:
    import_everything()
    for line in sys.stdin:
        print(json.dumps(answers(json.loads(line))), flush=True)


class Teams(Child):
    """A process that runs this file."""

    def __init__(self) -> None:
        super().__init__(__file__)

    def __call__(
        self,
        size: int,
        *words: object,
        folder: Path,
        ranks: Mapping[int, Sequence[object]] | None = None,
        stop: Mapping[int, int] | None = None,
        **env: str,
    ) -> list[SimpleNamespace]:
        """ranks: those whose words are others."""
        each = [[str(word) for word in (ranks or {}).get(rank, words)] for rank in range(size)]
        job = {"words": each, "folder": str(folder), "stop": stop or {}, "env": env}
        return [SimpleNamespace(**each) for each in self.ask(job)]


if __name__ == "__main__":
    main()
