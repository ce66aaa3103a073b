"""Encoded images and archives of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, kind: str = "PNG") -> bytes:
    draws = np.random.default_rng(number)
    stream = io.BytesIO()
    Image.fromarray(draws.integers(0, 256, (8, 8), dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
