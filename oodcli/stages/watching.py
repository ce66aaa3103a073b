"""Progress of a long job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from oodcli.stages.record import Progress, no_progress

Watch = Callable[[float, int], None]
"""Called with the number of images (or detectors) done and their total; 0 if it is unknown. An
exception that it raises stops the job."""

Watching = Callable[[str], AbstractContextManager[Watch]]
"""Opens a progress callback for a stage, such as invert, extract or fit."""


@contextmanager
def unwatched(_: str) -> Iterator[Watch]:
    """A ``Watching`` that tells nobody."""
    yield lambda done, total: None


def watched(watch: Watch | None, total: int, *, before: float = 0, each: int = 1) -> Progress:
    """A callback for the loops of a job: they call it with the increment, in units of ``1/each``
    image. before: images already done, which the watcher is told at once."""
    if watch is None:
        return no_progress
    done = before * each

    def advance(count: int) -> None:
        nonlocal done
        done += count
        watch(done / each, total)

    advance(0)
    return advance
