"""Completion of values. Typer completes commands and options, and the shell completes files.

    _OODCLI_COMPLETE=source_bash oodcli

prints typer's script for bash. The scripts in ``completions/`` are printed this way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

from oodcli.records import ON_REQUEST


def words(*known: str) -> Callable[[str], list[str]]:
    """Complete one of these values."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return complete


def complete_detector_list(incomplete: str) -> list[str]:
    """Complete ``--for``: names separated by commas."""
    from oodcli import detectors

    return _after_commas(incomplete, detectors.names())


def complete_records(incomplete: str) -> list[str]:
    """Complete ``--record``: ``all``, or words separated by commas."""
    return [*_after_commas(incomplete, ON_REQUEST), *words("all")(incomplete)]


def _after_commas(incomplete: str, known: Iterable[str]) -> list[str]:
    """Complete the last of several words, leaving out those already given."""
    before, comma, last = incomplete.rpartition(",")
    given = before.split(",")
    return [before + comma + word for word in known if word.startswith(last) and word not in given]


def without_heavy_imports() -> None:
    """Block imports that slow completion down. Typer converts the values before the completed
    word with pydantic, does not use them, and ignores failures; importing pydantic takes longer
    than the rest. Typer imports rich for the help of an option, which is as slow."""
    for name in ("pydantic", "rich"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
