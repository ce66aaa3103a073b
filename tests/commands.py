"""Running the command line in this process, as a shell would see it."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from oodcli.cli import main


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


def oodcli(*words: object, stdin: str = "") -> Result:
    """Status, standard output and standard error of ``oodcli words…``."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", ["oodcli", *map(str, words)]),
        patch.object(sys, "stdin", io.StringIO(stdin)),
    ):
        try:
            main()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Result(status, out.getvalue(), err.getvalue())


def fails(sentence, *words, leaves=None):
    """One sentence on standard error, nothing on standard output, status 1, nothing written."""
    before = set(os.listdir(leaves)) if leaves else set()
    result = oodcli(*words)
    assert result.status == 1, result
    assert result.out == ""
    complaint = [line for line in result.err.splitlines() if line.startswith("oodcli: ")]
    assert len(complaint) == 1
    assert sentence in complaint[0]
    assert "Traceback" not in result.err
    if leaves:
        assert set(os.listdir(leaves)) == before
