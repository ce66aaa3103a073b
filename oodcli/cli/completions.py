"""What the shell completes beside commands, options and files, which typer and the shell know.

    _OODCLI_COMPLETE=source_bash oodcli

prints typer's script for bash; those in ``completions/`` are printed that way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

RECORDS = (
    "logits",
    "embedding",
    "layers.mean",
    "layers.std",
    "layers.gram",
    "layers.peak",
    "layers.gradient",
    "batchnorm.mean",
    "batchnorm.var",
    "odin.logits",
    "deconf.h",
    "mos.others",
)
"""Kept apart from the module that records them, which takes long to import."""


def words(*known: str) -> Callable[[str], list[str]]:
    """Completes one of these words."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return complete


def complete_detector_list(incomplete: str) -> list[str]:
    """What ``--for`` accepts: names separated by commas."""
    from oodcli import detectors

    return _after_commas(incomplete, detectors.names())


def complete_records(incomplete: str) -> list[str]:
    """What ``--record`` accepts: ``all``, or words separated by commas."""
    return [*_after_commas(incomplete, RECORDS), *words("all")(incomplete)]


def _after_commas(incomplete: str, known: Iterable[str]) -> list[str]:
    """The last of several words; none that is there already."""
    before, comma, last = incomplete.rpartition(",")
    given = before.split(",")
    return [before + comma + word for word in known if word.startswith(last) and word not in given]


def without_heavy_imports() -> None:
    """Before typer completes. Typer converts the values before the word to be completed, does not
    use them, and ignores what fails; importing pydantic, which converts them, takes longer than
    everything else. The same holds for rich, which typer imports for the help of an option."""
    for name in ("pydantic", "rich"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
