"""How far a long job is, for whoever started it."""

from __future__ import annotations

from collections.abc import Callable

from oodcli.stages.record import Progress, no_progress

Watch = Callable[[float, int], None]
"""Is told how many images (or detectors) are done, and of how many; 0 where that is not known. It
may raise to end the job."""


def watched(watch: Watch | None, total: int, *, before: float = 0, each: int = 1) -> Progress:
    """What the loops of a job call with how much more they have done, in a unit of which one image
    has ``each``. before: images that are done already, which the watcher is told at once."""
    if watch is None:
        return no_progress
    done = before * each

    def advance(count: int) -> None:
        nonlocal done
        done += count
        watch(done / each, total)

    advance(0)
    return advance
