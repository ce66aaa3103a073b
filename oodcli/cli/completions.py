"""Completion of values. Typer completes commands and options, and the shell completes files.

    _OODCLI_COMPLETE=source_bash oodcli

prints typer's script for bash. The scripts in ``completions/`` are printed this way.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable

from oodcli.records import ON_REQUEST

before_colon = ""
"""The start of the completed word, such as ``torchvision:``, where bash splits it off."""


def words(*known: str) -> Callable[[str], list[str]]:
    """Complete one of these values."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return complete


def complete_detectors(incomplete: str) -> list[str]:
    """Complete ``-d``: a detector's name. The shell completes files."""
    from oodcli import detectors

    return words(*detectors.names(), "all")(incomplete)


def complete_architectures(incomplete: str) -> list[str]:
    """Complete ``--arch``: the built-in architectures."""
    from oodcli.networks import architectures

    known = words(*architectures.names())(before_colon + incomplete)
    return [name.removeprefix(before_colon) for name in known]


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


def join_words_of_bash() -> None:
    """Join the words that bash splits at ``=`` and ``:``; typer does not. Remove each ``=``, and
    move the part before ``:`` of the completed word to ``before_colon``, because bash replaces
    only the part after it."""
    global before_colon
    last = int(os.environ["COMP_CWORD"])
    line = "\n".join(os.environ["COMP_WORDS"].split("\n")[: last + 1])
    line = re.sub(r"\n=\n?", "\n", line)
    split = re.search(r"(?<=\n)([^\n]+)\n:\n?(?=[^\n]*$)", line)
    if split:
        before_colon = f"{split[1]}:"
        line = line[: split.start()] + line[split.end() :]
    os.environ.update(COMP_WORDS=line, COMP_CWORD=str(line.count("\n")))


def complete_at_the_first_tab() -> None:
    """Call the function in zsh's script. zsh reads the script at the first Tab; typer's script only
    defines the function then, and completes nothing before the second Tab."""
    defines = "\ncompdef %(complete_func)s %(prog_name)s\n"
    calls = f"""
if [ "$funcstack[1]" = "_%(prog_name)s" ]; then
  %(complete_func)s "$@"
else
  {defines.strip()}
fi
"""
    with contextlib.suppress(ImportError, AttributeError):  # typer keeps these names to itself
        from typer import _completion_classes, _completion_shared

        script = _completion_shared.COMPLETION_SCRIPT_ZSH.replace(defines, calls)
        _completion_shared._completion_scripts["zsh"] = script
        _completion_classes.ZshComplete.source_template = script


def without_heavy_imports() -> None:
    """Block imports that slow completion down. Typer converts the values before the completed
    word with pydantic, does not use them, and ignores failures; importing pydantic takes longer
    than the rest. Typer imports rich for the help of an option, which is as slow."""
    for name in ("pydantic", "rich"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
