"""What can go wrong through no fault of ours.

Every message is one sentence that says what is wrong, where, and what to do about it. The command
line prints it and exits with status 1; whoever uses the package catches :class:`OodcliError`.
"""


class OodcliError(Exception):
    """A fault that the user can mend."""


class CheckpointError(OodcliError):
    """The checkpoint, its model card or its architecture cannot be used."""


class ImagesError(OodcliError):
    """The images as a whole cannot be read (one bad image is a row, not an error)."""


class FileError(OodcliError):
    """A cache, an artefact or a scores file is missing, damaged or does not belong here."""


class DetectorError(OodcliError):
    """A detector is unknown, or lacks something that it needs."""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
