"""Errors that the user can fix.

Every message is one sentence: what is wrong, where, and the next step. The command line prints it
and exits with status 1; programs catch :class:`OodcliError`.
"""

from __future__ import annotations


class OodcliError(Exception):
    """An error that the user can fix. hint: the next step on the command line, in terms of commands
    and options; ``str`` leaves it out."""

    def __init__(self, sentence: str = "", *, hint: str = "") -> None:
        super().__init__(sentence)
        self.hint = hint

    @property
    def text(self) -> str:
        """The sentence with the hint, as the command line prints it."""
        return f"{self}: {self.hint}" if self.hint else str(self)


class CheckpointError(OodcliError):
    """The checkpoint, its model card or its architecture cannot be used."""


class ImagesError(OodcliError):
    """The images as a whole cannot be read. (A single bad image is a row, not an error.)"""


class FileError(OodcliError):
    """A cache, artefact or scores file is missing, damaged, or belongs to something else."""


class DetectorError(OodcliError):
    """A detector is unknown, or something that it needs is missing."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or its type if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def first_sentence(error: BaseException) -> str:
    """The first sentence of that line, shortened to fit into a line of ours."""
    return first_line(error).split(". ")[0][:160].rstrip(".")
