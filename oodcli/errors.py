"""What can go wrong through no fault of ours.

Every message is one sentence that says what is wrong, where, and what to do about it. The command
line prints it and exits with status 1; whoever uses the package catches :class:`OodcliError`.
"""

from __future__ import annotations


class OodcliError(Exception):
    """A fault that the user can fix. hint: how the sentence goes on on the command line, where it
    speaks of commands and options; ``str`` leaves it out."""

    def __init__(self, sentence: str = "", *, hint: str = "") -> None:
        super().__init__(sentence)
        self.hint = hint

    @property
    def text(self) -> str:
        """The sentence and the hint, as the command line prints them."""
        return f"{self}: {self.hint}" if self.hint else str(self)


class CheckpointError(OodcliError):
    """The checkpoint, its model card or its architecture cannot be used."""


class ImagesError(OodcliError):
    """The images as a whole cannot be read (one bad image is a row, not an error)."""


class FileError(OodcliError):
    """A cache, an artefact or a scores file is missing, damaged or does not belong here."""


class DetectorError(OodcliError):
    """A detector is unknown, or lacks something that it needs."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or its kind where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def first_sentence(error: BaseException) -> str:
    """The first sentence of that line, short enough for a line of ours."""
    return first_line(error).split(". ")[0][:160].rstrip(".")
