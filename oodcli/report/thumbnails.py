"""Small pictures of the images that a scores file names, read as ``oodcli score`` reads them."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oodcli.errors import OodcliError

if TYPE_CHECKING:  # torch is imported only where there is an image to open
    from torch import Tensor

    from oodcli.images.source import ImageSource
    from oodcli.networks.preprocessing import Preprocessing

SIDE = 96
QUALITY = 80
LARGEST = 1 << 30
"""Bytes of an archive without an index: it is read from the front to find one image."""

_ROW = re.compile(r"(?P<file>.+)\[(?P<row>[0-9]{1,9})\]", re.DOTALL)
_INDEXED = (".zip", ".h5", ".hdf5")


def read_thumbnails(
    paths: Iterable[str],
    source: ImageSource | None = None,
    size: Preprocessing | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, bytes]:
    """Path → JPEG, cut to a square of 96x96 pixels. A path is one of a scores file: of a file, of a
    member of an archive, or a row of an .npz or of virtual images. source: images to look in before
    that; it may lie elsewhere now. size: the network's preprocessing, for noise. progress: called
    with the number of paths done and their total. What cannot be opened again is left out, whatever
    the reason: noise, a dataset, what has moved, what is damaged."""
    wanted = list(dict.fromkeys(paths))
    found: dict[str, bytes] = {}

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, len(wanted))

    def read(pictures: Iterator[tuple[str, bytes]]) -> None:
        with suppress(OodcliError, OSError):
            for path, content in pictures:
                found[path] = content
                tell(len(found))

    tell(0)
    if source is not None:
        read(_pictures(source, _rows(source, wanted), size))
    groups: dict[str, list[str]] = {}
    for path in wanted:
        container = None if path in found else _container(path)
        if container is not None:
            groups.setdefault(container, []).append(path)
    for container, members in groups.items():
        read(_read(container, members))
    tell(len(wanted))
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

    source: ImageSource = FileList("", paths)
    if container:
        # Under "./" a file that is called "-" or "noise:…" is a file.
        source = open_source(os.path.join(".", container))
    yield from _pictures(source, _rows(source, paths))


def open_source(images: str) -> ImageSource:
    """IMAGES of ``score``, to take thumbnails from. Raises ImagesError."""
    from oodcli.images.opening import open_images

    return open_images(images, _square(), ("0",))


def noise_of(
    made: Mapping[str, Any] | None, source: ImageSource | None = None
) -> tuple[ImageSource | None, Preprocessing | None]:
    """``source`` and ``size`` of ``read_thumbnails``, from the metadata of a scores file. Without a
    source, it is the noise that was scored, if it was noise: that can be drawn again."""
    if made is None or "preprocessing" not in made:
        return source, None
    from oodcli.networks.preprocessing import Preprocessing

    if source is None and str(made.get("source")).startswith("noise:"):
        with suppress(OodcliError):
            source = open_source(str(made["source"]))
    return source, Preprocessing.from_dict(made["preprocessing"])


def _square() -> Preprocessing:
    from oodcli.networks.preprocessing import Preprocessing

    return Preprocessing((SIDE, SIDE), (0.0,) * 3, (1.0,) * 3, resize=SIDE, interpolation="bicubic")


def _pictures(
    source: ImageSource, rows: Sequence[tuple[int, str]], size: Preprocessing | None = None
) -> Iterator[tuple[str, bytes]]:
    from oodcli.images.generated import Noise

    preprocessing = _square()
    if isinstance(source, Noise):  # of another size it would be other noise
        if size is None:
            return
        preprocessing = size
    with source.reading() as fetch:
        for row, path in rows:
            found = fetch(row, row + 1)(preprocessing)
            if found.errors == [None]:
                yield path, _jpeg(found.pixels[0])


def _rows(source: ImageSource, paths: Sequence[str]) -> list[tuple[int, str]]:
    """Row and path of those that the source has, in its order: it is read from the front. Where
    it has none of them, they are looked up without their first folders."""
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
    return sorted(found or _moved(source, places or {}, paths))


def _moved(
    source: ImageSource, places: Mapping[str, int], paths: Sequence[str]
) -> list[tuple[int, str]]:
    """The paths below the source's own folder, with as many folders taken off as finds most of
    them; the same number for all, because a name alone may be that of several images."""
    below: dict[str, list[int]] = {}
    for path, place in places.items():
        inside = path.removeprefix(f"{Path(source.name).as_posix()}/")
        name = path.rpartition("/")[2] if inside == path else inside
        below.setdefault(name, []).append(place)
    best: list[tuple[int, str]] = []
    for depth in range(max((path.count("/") for path in paths), default=0) + 1):
        ends = [(path.split("/", depth)[-1], path) for path in paths if path.count("/") >= depth]
        found = [(below[end][0], path) for end, path in ends if len(below.get(end, ())) == 1]
        best = max(best, found, key=len)
    return best


def _jpeg(pixels: Tensor) -> bytes:
    """pixels: (H, W, C) uint8, or (C, H, W) float32, in [0, 1] but for what inversion overshot."""
    from PIL import Image

    if pixels.dtype.is_floating_point:
        pixels = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)  # (H, W, C)
    stream = io.BytesIO()
    image = Image.fromarray(pixels.expand(-1, -1, 3).contiguous().numpy())
    image.thumbnail((SIDE, SIDE))
    image.save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()
