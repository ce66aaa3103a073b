"""Where things are printed: results on standard output, everything else on standard error."""

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
"""--quiet: nothing on standard error but errors."""
verbose = False
"""--verbose: details, too."""

who = ""
"""Which of several processes of torchrun this is, for its errors; empty where it is none."""

_laps: list[tuple[str, float]] = []
"""What a command has done, and when it was done with that; first, when it began."""


def say(message: str, *, always: bool = False) -> None:
    """Lines on standard error, for a person; on a terminal they break between words, but for a
    command to be copied. always: even with --quiet."""
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
    """With --verbose: what was decided or assumed, and is not said otherwise."""
    if verbose:
        say(f"detail: {message}")


@contextmanager
def command(*, quietly: bool, in_detail: bool) -> Iterator[None]:
    """A command, and how much it says. With --verbose it ends, however it does, with the time that
    each of its steps took."""
    global quiet, verbose, _laps
    outer = quiet, verbose, _laps  # a demo consists of commands
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
        quiet, verbose, _laps = outer
        heed(logging.DEBUG if verbose else logging.INFO)


def lap(what: str) -> None:
    """A step of the command is done: what, in a word or two."""
    _laps.append((what, time.monotonic()))


def _exact(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 90 else notes.duration(seconds)


def harmless(text: str) -> str:
    """The text with everything escaped that could move a terminal's cursor or begin another line:
    names in messages are whatever a file says."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


class Notes(logging.Handler):
    """What the core logs while it works, as notes; with --verbose also its details, and the steps
    that are done."""

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
    """Of several processes of torchrun, the first one prints, and the others only errors."""
    global quiet, who
    who, quiet = f"rank {number}", quiet or number > 0


def heed(level: int) -> None:
    """Prints what the core logs from this level on."""
    log = logging.getLogger("oodcli")
    log.handlers[:] = [Notes()]
    log.setLevel(level)


def _folded(line: str, columns: int) -> str:
    return textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False)


def emit(text: str) -> None:
    """A result, on standard output."""
    print(text)


def emit_json(value: Any) -> None:
    """A result as JSON; numbers that JSON lacks become strings."""
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
    """A table fitted to the terminal; plain characters in a pipe."""
    from rich.console import Console

    Console(width=width(), no_color=None if sys.stdout.isatty() else True).print(table)


def command_line() -> str:
    """The command as it was given, for the files it makes; bytes that are not UTF-8 as \\xNN."""
    words = shlex.join(["oodcli", *sys.argv[1:]])
    return os.fsencode(words).decode("utf-8", "backslashreplace")


@contextmanager
def progress(
    total: int, what: str, per_image: int = 1, *, before: int = 0
) -> Iterator[Callable[[float], None]]:
    """A bar with images/s and the time left on a terminal; elsewhere a line a minute.

    The yielded function is told how much more is done; total is in the same unit, of which an
    image has per_image, and so is what was done before; a total of 0 is not known. It raises what a
    signal has asked for."""
    with _shown(total, what, per_image, before) as advance, interrupts.loop(advance) as step:
        yield step


@contextmanager
def watching(what: str) -> Iterator[Callable[[float, int], None]]:
    """The same for ``progress=`` of ``oodcli.api``, which is told how many images are done, and of
    how many; it begins when it is called first."""
    with ExitStack() as stack:

        def begin(done: float, total: int) -> tuple[Callable[[float], None], float]:
            return stack.enter_context(progress(total, what, before=int(done))), done

        yield _differences(begin)


@contextmanager
def steps(what: str, unit: str) -> Iterator[Callable[[float, int], None]]:
    """The same for a few long steps, such as detectors that are fitted; signals act at once."""
    with ExitStack() as stack:

        def begin(done: float, total: int) -> tuple[Callable[[float], None], float]:
            return stack.enter_context(_shown(total, what, 1, 0, unit)), 0.0

        yield _differences(begin)


def _differences(
    begin: Callable[[float, int], tuple[Callable[[float], None], float]],
) -> Callable[[float, int], None]:
    """Is told how much is done in all, and tells what ``begin`` returns how much more that is than
    before."""
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
