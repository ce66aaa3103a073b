"""Small pictures of the images that a scores file names, read as ``oodcli score`` reads them."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from oodcli.errors import OodcliError

if TYPE_CHECKING:  # torch is imported only where there is an image to open
    from torch import Tensor

    from oodcli.images.source import ImageSource

SIDE = 96
QUALITY = 80
LARGEST = 1 << 30
"""Bytes of an archive without an index: it is read from the front to find one image."""

_ROW = re.compile(r"(?P<file>.+)\[(?P<row>[0-9]{1,9})\]", re.DOTALL)
_INDEXED = (".zip", ".h5", ".hdf5")


def read_thumbnails(paths: Iterable[str]) -> dict[str, bytes]:
    """Path → JPEG of 96x96 pixels, cut to a square. A path is one of a scores file: of a file, of a
    member of an archive, or a row of an .npz or of virtual images. What cannot be opened again is
    left out, whatever the reason: noise, a dataset, what has moved, what is damaged."""
    groups: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        container = _container(path)
        if container is not None:
            groups.setdefault(container, []).append(path)
    found: dict[str, bytes] = {}
    for container, members in groups.items():
        try:
            found.update(_read(container, members))
        except (OodcliError, OSError):
            continue
    return found


def _container(path: str) -> str | None:
    """The file to open: "" where the path is that itself, None where there is none."""
    # Not Path.is_file, which raises for a name that is too long.
    if os.path.isfile(path):
        return ""
    row = _ROW.fullmatch(path)
    names = [row["file"]] if row else [parent.as_posix() for parent in Path(path).parents]
    for name in names:
        if os.path.isfile(name):
            indexed = name.lower().endswith(_INDEXED)
            return name if indexed or os.path.getsize(name) <= LARGEST else None
    return None


def _read(container: str, paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    from oodcli.images.files import FileList
    from oodcli.images.opening import open_images
    from oodcli.networks.preprocessing import Preprocessing

    black, one = (0.0,) * 3, (1.0,) * 3
    preprocessing = Preprocessing((SIDE, SIDE), black, one, resize=SIDE, interpolation="bicubic")
    source: ImageSource = FileList("", paths)
    if container:
        # Under "./" a file that is called "-" or "noise:…" is a file.
        source = open_images(os.path.join(".", container), preprocessing, ("0",))
    with source.reading() as fetch:
        for row, path in _rows(source, paths):
            rows = fetch(row, row + 1)(preprocessing)
            if rows.errors == [None]:
                yield path, _jpeg(rows.pixels[0])


def _rows(source: ImageSource, paths: Sequence[str]) -> list[tuple[int, str]]:
    """Row and path of those that the source has, in its order: it is read from the front."""
    found = []
    places: dict[str, int] | None = None
    for path in paths:
        row = _ROW.fullmatch(path)
        if row and int(row["row"]) < len(source):
            place = int(row["row"])
            if source.paths(place, place + 1) == [path]:
                found.append((place, path))
                continue
        if places is None:
            places = {name: place for place, name in enumerate(source.paths(0, len(source)))}
        if path in places:
            found.append((places[path], path))
    return sorted(found)


def _jpeg(pixels: Tensor) -> bytes:
    """pixels: (H, W, 3) uint8, or (3, H, W) float32, in [0, 1] but for what inversion overshot."""
    from PIL import Image

    if pixels.dtype.is_floating_point:
        pixels = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)  # (H, W, 3)
    stream = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()
