"""Log lines of long jobs. The command line prints them as notes, and DEBUG lines with
``--verbose``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

WORD = "word"
"""Key of a record's ``extra``: the prefix of the line instead of ``note``; may be empty."""
DONE = "done"
"""Key of a record's ``extra``: a finished step of the job, in a word or two."""

RANK = "rank"
"""Key of a record's ``extra``: the rank of this process under torchrun."""


def say(log: logging.Logger, message: str, word: str = "note") -> None:
    """Log a line at level INFO."""
    log.info("%s", message, extra={WORD: word})


_SAID: set[str] = set()


def once(log: logging.Logger, message: str) -> None:
    """Log a line at level INFO, unless this process has logged it before."""
    if message not in _SAID:
        _SAID.add(message)
        say(log, message)


def rank(log: logging.Logger, number: int, of: int) -> None:
    """Log the rank of this process at level INFO. The command line is quiet in all but the
    first."""
    log.info("process %d of %d that torchrun has started", number, of, extra={RANK: number})


def done(log: logging.Logger, step: str) -> None:
    """Log at level DEBUG that a step is done. The command line measures its time."""
    log.debug("done: %s", step, extra={DONE: step})


@contextmanager
def only_from(level: int, name: str) -> Iterator[None]:
    """While open, the logger called name, of a package, drops lines below the level."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)


def duration(seconds: float) -> str:
    """Seconds as text: 40 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
