"""Commands whose n-th write to the disk fails, or is the last thing that the process does.

``python tests/faults.py`` reads jobs as lines of JSON and answers each with one: {"words": […],
"folder": …, "mode": "fail" or "kill", "number": n} → {"status": …, "err": …, "changes": how many
there were, or n where the process was killed}. Each runs in a fork of this process; with the mode
"warm" in this process itself, so that everything is imported when it is forked.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from children import Child

NUMBERED = ("fsync", "ftruncate", "truncate", "rename", "replace", "unlink", "remove", "link")
NUMBERED += ("mkdir", "rmdir")


class Faults:
    """Counts what is about to change the disk. mode: ``fail``, or ``kill``; half of a write is done
    before either. name: of the operation that it was."""

    def __init__(self, mode: str, number: int) -> None:
        self.mode, self.number = mode, number
        self.count = 0
        self.pid = os.getpid()

    def due(self) -> bool:
        if os.getpid() != self.pid:
            return False
        self.count += 1
        return self.count == self.number

    def strike(self) -> None:
        if self.mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def install(self) -> None:
        faults, real_write, real_open = self, os.write, os.open

        def write(handle: int, data: Any) -> int:
            if handle > 2 and faults.due():
                real_write(handle, bytes(data)[: len(data) // 2])
                faults.strike()
            return real_write(handle, data)

        def opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & os.O_CREAT and faults.due():
                faults.strike()
            return real_open(path, flags, *more, **named)

        def numbered(real: Any) -> Any:
            def operation(*values: Any, **named: Any) -> Any:
                if faults.due():
                    faults.strike()
                return real(*values, **named)

            return operation

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                if faults.due():
                    super().write(bytes(data)[: len(data) // 2])
                    faults.strike()
                return super().write(data) or 0

        def open_file(
            file: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any
        ) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return builtin(file, mode, buffering, *more, **named)
            raw = Raw(file, mode.replace("b", "").replace("t", ""))
            whole = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return whole if "b" in mode else io.TextIOWrapper(whole, *more, **named)

        builtin = builtins.open
        os.write, os.open = write, opened
        for name in NUMBERED:
            setattr(os, name, numbered(getattr(os, name)))
        io.FileIO = Raw  # type: ignore[misc]
        builtins.open = io.open = open_file


def run(job: dict[str, Any]) -> None:
    """In a fork: never comes back."""
    with open(job["err"], "w") as err:
        os.dup2(err.fileno(), 2)
        os.dup2(err.fileno(), 1)
    os.chdir(job["folder"])
    sys.argv = ["oodcli", *job["words"]]
    faults = Faults(job["mode"], job["number"])
    faults.install()
    from oodcli.cli import main

    status = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 70
    # A fault in the very end may be passed over: then the status is 0, but it was reached.
    os.write(1, f"\n{faults.count}".encode())
    os._exit(status)


def main() -> None:
    import torch

    torch.set_num_threads(1)  # a fork and a pool of threads do not go together
    from commands import oodcli

    with tempfile.TemporaryDirectory() as place:
        err = Path(place) / "err"
        for line in sys.stdin:
            job = json.loads(line)
            if job["mode"] == "warm":
                os.chdir(job["folder"])
                result = oodcli(*job["words"])
                print(json.dumps({"status": result.status, "err": result.err}), flush=True)
                continue
            child = os.fork()
            if not child:
                run({**job, "err": str(err)})
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            text, _, changes = err.read_text().rpartition("\n")
            if code == -signal.SIGKILL:
                text, changes = "", job["number"]
            answer = {"status": code, "err": text, "changes": int(changes)}
            print(json.dumps(answer), flush=True)


class Process(Child):
    """A process that runs this file."""

    def __init__(self) -> None:
        super().__init__(__file__)

    def __call__(self, words: list[str], folder: Path, mode: str, number: int = 0) -> Any:
        return self.ask({"words": words, "folder": str(folder), "mode": mode, "number": number})


NEVER = 10**6
"""More changes of the disk than any job makes."""


def first_middle_last(changes: int) -> Iterable[int]:
    return sorted({1, (changes + 1) // 2, changes})


def every(changes: int) -> Iterable[int]:
    return range(1, changes + 1)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def folders(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_dir()]


def is_done(folder: Path, expected: dict[str, bytes]) -> bool:
    """The outputs are there, and the job is forgotten: only a folder was left to remove."""
    return files(folder) == expected and not list(folder.glob("*.partial/job.json"))


def check_resumes(
    process: Process, command: str, start: Path, place: Path, where: Any = every
) -> None:
    """The disk refuses the n-th change (creation, write, flush, truncation, rename, removal), or
    the process is killed there. What is there then is whole, and the same command succeeds with the
    same bytes as without the fault.

    start: the folder that the job begins with. place: where copies of it are made. where: how many
    changes the job makes → the n to try.
    """
    words = command.split()
    whole = shutil.copytree(start, place / "whole")
    assert process(words, whole, "warm")["status"] == 0
    before, expected = files(start), files(whole)
    undisturbed = process(words, shutil.copytree(start, place / "undisturbed"), "fail", NEVER)
    assert undisturbed["status"] == 0
    assert undisturbed["changes"] > 5
    for mode in ("fail", "kill"):
        for number in where(undisturbed["changes"]):
            folder = shutil.copytree(start, place / f"{mode}-{number}")
            first = process(words, folder, mode, number)
            case = f"{mode} {number}: {first}"
            assert first["changes"] >= number, case
            left = files(folder)
            assert all(left[n] in (expected[n], before.get(n)) for n in expected.keys() & left)
            if mode == "fail":
                assert first["status"] in (0, 1), case
                assert "Traceback" not in first["err"], case
                assert "standard output" not in first["err"], case
                assert first["status"] == 0 or not [name for name in left if ".new." in name]
            if not is_done(folder, expected):
                again = process(words, folder, "warm")
                assert again["status"] == 0, f"{case}\n{again}"
                assert folders(folder) == folders(whole), case
            assert files(folder) == expected, case
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
