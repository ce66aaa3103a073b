"""A JSON object in a file, with a format and a version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from oodcli.errors import FileError

LARGEST = 1 << 24
"""Largest size of such a file in bytes; the names of a thousand classes take 20 kB."""


def read_object(
    path: Path, format_: str, version: int, *, damaged: str, again: str
) -> dict[str, Any] | None:
    """None without a file. Raises FileError with the text ``damaged`` for anything but an object of
    this format, and for another version. again: how to make the file anew."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        found = json.loads(data) if len(data) <= LARGEST else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != format_:
        raise FileError(damaged)
    if found.get("version") != version:
        raise FileError(
            f"{path} has format version {found.get('version')}, this oodcli reads {version}: use a "
            f"newer oodcli, or {again}"
        )
    return found
