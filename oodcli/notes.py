"""What a long job logs for the person who waits for it. The command line prints the lines as notes,
and those of level DEBUG with ``--verbose``."""

from __future__ import annotations

import logging

WORD = "word"
"""Key of a record's ``extra``: what stands before the line in place of ``note``; may be empty."""
DONE = "done"
"""Key of a record's ``extra``: a step of the job that is done, in a word or two."""

RANK = "rank"
"""Key of a record's ``extra``: the number of this process among those that torchrun has started."""


def say(log: logging.Logger, message: str, word: str = "note") -> None:
    """Logs a line at level INFO."""
    log.info("%s", message, extra={WORD: word})


def rank(log: logging.Logger, number: int, of: int) -> None:
    """Logs at level INFO which of several processes this is: the command line is quiet in all but
    the first."""
    log.info("process %d of %d that torchrun has started", number, of, extra={RANK: number})


def done(log: logging.Logger, step: str) -> None:
    """Logs at level DEBUG that a step is done: the command line measures its time."""
    log.debug("done: %s", step, extra={DONE: step})


def duration(seconds: float) -> str:
    """For a person: 40 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
