"""Commands whose n-th write to the disk fails, or is the last thing that the process does.

``python tests/faults.py`` reads jobs as lines of JSON and answers each with one: {"words": […],
"folder": …, "mode": "fail" or "kill", "number": n} → {"status": …, "err": …, "reached": whether
there were so many}. Each runs in a fork of this process; with the mode "warm" in this process
itself, so that everything is imported when it is forked.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

NUMBERED = ("fsync", "ftruncate", "truncate", "rename", "replace", "unlink", "remove", "link")


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
    os.write(1, f"\n{faults.count >= faults.number}".encode())
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
            text, _, reached = err.read_text().rpartition("\n")
            if code == -signal.SIGKILL:
                text, reached = "", "True"
            answer = {"status": code, "err": text, "reached": reached == "True"}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
