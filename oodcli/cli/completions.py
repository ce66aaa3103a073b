"""What the shell completes beside commands, options and files, which typer and the shell know.

    _OODCLI_COMPLETE=source_bash oodcli

prints typer's script for bash; those in ``completions/`` are printed that way.
"""

from __future__ import annotations

import contextlib
import os
import re
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

before_colon = ""
"""The start of the word to be completed that bash passes as a word of its own: ``torchvision:``."""


def words(*known: str) -> Callable[[str], list[str]]:
    """Completes one of these words."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return complete


def complete_detectors(incomplete: str) -> list[str]:
    """What ``-d`` accepts, apart from files."""
    from oodcli import detectors

    return words(*detectors.names(), "all")(incomplete)


def complete_architectures(incomplete: str) -> list[str]:
    """Built-in architectures."""
    from oodcli.networks import architectures

    known = words(*architectures.names())(before_colon + incomplete)
    return [name.removeprefix(before_colon) for name in known]


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


def join_words_of_bash() -> None:
    """bash splits words at ``=`` and ``:``, and typer does not join them. Removes each ``=``, and
    moves what precedes ``:`` in the word to be completed to ``before_colon``: bash replaces only
    what follows it."""
    global before_colon
    last = int(os.environ["COMP_CWORD"])
    line = "\n".join(os.environ["COMP_WORDS"].split("\n")[: last + 1])
    line = re.sub(r"\n=\n?", "\n", line)
    split = re.search(r"(?<=\n)([^\n]+)\n:\n?(?=[^\n]*$)", line)
    if split:
        before_colon = f"{split[1]}:"
        line = line.replace(split[0], "")
    os.environ.update(COMP_WORDS=line, COMP_CWORD=str(line.count("\n")))


def complete_at_the_first_tab() -> None:
    """zsh reads the script at the first Tab. Typer's script only defines the function then, so that
    nothing is offered before the second Tab; this one calls it, as click's does."""
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
    """Before typer completes. Typer converts the values before the word to be completed, does not
    use them, and ignores what fails; importing pydantic, which converts them, takes longer than
    everything else. The same holds for rich, which typer imports for the help of an option."""
    for name in ("pydantic", "rich"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
