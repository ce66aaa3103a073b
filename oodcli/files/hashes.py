"""Checksums of whole files."""

from __future__ import annotations

import hashlib
from pathlib import Path

BLOCK = 1 << 20
"""Bytes that are read at a time."""


def file_sha256(*paths: Path) -> str:
    """Hexadecimal SHA-256 of the bytes of one or more files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()
