"""File names and reasons as text that any terminal and file can hold."""

from __future__ import annotations

import os


def printable(text: str) -> str:
    """The text with bytes that are not UTF-8 (of a file's name) written as \\xNN."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def unreadable_file(error: BaseException) -> str:
    """One line on why a file could not be read, without repeating its name."""
    if isinstance(error, OSError) and error.strerror:
        return printable(error.strerror)
    return printable((str(error).splitlines() or [""])[0] or type(error).__name__)
