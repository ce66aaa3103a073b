"""Printing: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from oodcli import notes
from oodcli.cli import interrupts

if TYPE_CHECKING:
    from rich.table import Table

quiet = False
"""--quiet: only errors on standard error."""
verbose = False
"""--verbose: print details as well."""

who = ""
"""Rank of this process under torchrun, for its errors; otherwise empty."""

_laps: list[tuple[str, float]] = []
"""The finished steps of a command and the times at which they ended; the first is the start."""


def say(message: str, *, always: bool = False) -> None:
    """Print lines to standard error, wrapped to the terminal; commands to copy are not wrapped.
    always: even with --quiet."""
    if quiet and not always:
        return
    message = "\n".join(map(harmless, message.split("\n")))
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns
        message = "\n".join(
            line if line.startswith("$ ") else _folded(line, columns)
            for line in message.split("\n")
        )
    print(message, file=sys.stderr, flush=True)


def detail(message: str) -> None:
    """Print a decision or an assumption, with --verbose."""
    if verbose:
        say(f"detail: {message}")


@contextmanager
def command(*, quietly: bool, in_detail: bool) -> Iterator[None]:
    """Set the volume for a command. With --verbose, print the time of each of its steps at the
    end."""
    global quiet, verbose, _laps
    quiet, verbose, _laps = quietly, in_detail, [("", time.monotonic())]
    heed(logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    finally:
        lap("the rest")
        steps = [(what, end - start) for (_, start), (what, end) in pairwise(_laps)]
        took = ", ".join(f"{what} {_exact(seconds)}" for what, seconds in steps)
        whole = _exact(sum(seconds for _, seconds in steps))
        detail(f"took {whole}: {took}" if len(steps) > 1 else f"took {whole}")
        quiet = verbose = False
        heed(logging.INFO)


def lap(what: str) -> None:
    """Record that a step of the command is done; what: the step in a word or two."""
    _laps.append((what, time.monotonic()))


def _exact(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 90 else notes.duration(seconds)


def harmless(text: str) -> str:
    """The text with control characters escaped, which could move the cursor or start a new line.
    Names from files can contain them."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


class Notes(logging.Handler):
    """Prints log records of the core as notes; with --verbose also its details and finished
    steps."""

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, notes.RANK):
            _rank(getattr(record, notes.RANK))
        elif hasattr(record, notes.DONE):
            lap(getattr(record, notes.DONE))
        elif record.levelno <= logging.DEBUG:
            detail(record.getMessage())
        else:
            word = getattr(record, notes.WORD, "note")
            say(": ".join(filter(None, (word, record.getMessage()))))


def _rank(number: int) -> None:
    """Under torchrun only the first process prints notes; the others print errors."""
    global quiet, who
    who, quiet = f"rank {number}", quiet or number > 0


def heed(level: int) -> None:
    """Print log records of the core from this level on."""
    log = logging.getLogger("oodcli")
    log.handlers[:] = [Notes()]
    log.setLevel(level)


def _folded(line: str, columns: int) -> str:
    return textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False)


def emit(text: str) -> None:
    """Print a result to standard output."""
    print(text)


def emit_json(value: Any) -> None:
    """Print a result as JSON; numbers that JSON lacks become strings."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def width() -> int:
    """Columns of standard output: the terminal's, 80 in a pipe."""
    return shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else 80


def emit_table(table: Table) -> None:
    """Print a table fitted to the terminal; plain characters without trailing spaces in a pipe."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console(width=width()).print(table)
        return
    console = Console(width=width(), no_color=True)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        print(line.rstrip())


def command_line() -> str:
    """The command as it was given, for the files it makes; bytes that are not UTF-8 as \\xNN."""
    words = shlex.join(["oodcli", *sys.argv[1:]])
    return os.fsencode(words).decode("utf-8", "backslashreplace")


@contextmanager
def progress(
    total: int, what: str, per_image: int = 1, *, before: int = 0
) -> Iterator[Callable[[float], None]]:
    """A progress bar with images/s and the remaining time on a terminal; elsewhere a line per
    minute.

    The yielded function is called with increments. total and before, what is already done, are in
    the same unit, in which an image counts per_image; a total of 0 is unknown. The function raises
    when a signal has arrived.
    """
    with _shown(total, what, per_image, before) as advance, interrupts.loop(advance) as step:
        yield step


_UNITS = {"fit": "detectors", "evaluate": "detectors", "show": "thumbnails"}
"""Stages of a few long steps, during which signals act at once, and what they count."""


@contextmanager
def stage(what: str) -> Iterator[Callable[[float, int], None]]:
    """The same bar for ``progress=`` of ``oodcli.api``, which is called with the number of images
    done and their total. The bar starts at the first call."""
    unit = _UNITS.get(what)
    with ExitStack() as stack:

        def begin(done: float, total: int) -> tuple[Callable[[float], None], float]:
            if unit is not None:
                return stack.enter_context(_shown(total, what, 1, 0, unit)), 0.0
            return stack.enter_context(progress(total, what, before=int(done))), done

        yield _differences(begin)


def _differences(
    begin: Callable[[float, int], tuple[Callable[[float], None], float]],
) -> Callable[[float, int], None]:
    """A function that is called with the amount done in all, and passes the increments on to the
    function that ``begin`` returns."""
    advance: Callable[[float], None] | None = None
    before = 0.0

    def step(done: float, total: int) -> None:
        nonlocal advance, before
        if advance is None:
            advance, before = begin(done, total)
            if done == before:
                return
        advance(done - before)
        before = done

    return step


@contextmanager
def _shown(
    total: int, what: str, per_image: int, before: int, unit: str = "images"
) -> Iterator[Callable[[float], None]]:
    if quiet:
        yield lambda count: None
        return
    if not sys.stderr.isatty():
        yield _line_a_minute(total, what, per_image, before, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[done]}/{task.fields[images]} " + unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        start = time.monotonic()
        images = total // per_image if total else "?"
        task = bar.add_task(
            "",
            total=total or None,
            completed=before,
            done=before // per_image,
            images=images,
            rate="",
        )
        done: float = before

        def advance(count: float) -> None:
            nonlocal done
            done += count
            rate = (done - before) / per_image / max(time.monotonic() - start, 1e-9)
            bar.update(task, completed=done, done=int(done // per_image), rate=_rate(rate))

        yield advance


def _rate(each_second: float) -> str:
    return f"{each_second:.1f}/s" if each_second >= 0.1 else f"{each_second * 60:.1f}/min"


def _line_a_minute(
    total: int, what: str, per_image: int, before: int, unit: str
) -> Callable[[float], None]:
    start = last = time.monotonic()
    done: float = before

    def advance(count: float) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= 60:
            last = now
            rate = (done - before) / per_image / (now - start)
            shown = f"{int(done // per_image)} of {total // per_image} {unit}"
            line = f"{what}: {shown}, {_rate(rate)}"
            left = (total - done) * (now - start) / max(done - before, 1)
            if total:
                say(f"{line}, {notes.duration(left)} left")
            else:
                say(line.replace(" of 0", ""))

    return advance
