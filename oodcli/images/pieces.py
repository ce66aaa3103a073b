"""Images on any file system, in pieces that are read front to back: for jobs of many hosts.

What is named is a folder, .tar shards in WebDataset's style, or Parquet files with the bytes of
images; each with a scheme such as ``s3://`` (what fsspec knows), or local. Nothing is listed but
files, and of Parquet the numbers of rows.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import IO, Any, Literal, NamedTuple, cast

import torch

from oodcli.errors import ImagesError
from oodcli.images.files import LARGEST_MEMBER, StrictHeader, is_hidden, is_image
from oodcli.images.labels import UNKNOWN
from oodcli.images.pixels import (
    Load,
    UnreadableError,
    kind_of_left_out,
    load_bytes,
    refuse,
    refuse_suffix,
)
from oodcli.images.words import printable, unreadable_file

Kind = Literal["rows", "files", "tar", "parquet"]

TAR = re.compile(r"\.(tar|tgz|tar\.gz|tar\.bz2|tar\.xz)$", re.IGNORECASE)
PARQUET = re.compile(r"\.(parquet|pq)$", re.IGNORECASE)
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
IMAGE_COLUMNS = ("image", "img", "bytes", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "cls", "fine_label")
PATH_COLUMNS = ("path", "__key__", "file_name")
MOST_FILES = 1 << 24
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Piece:
    """Some rows, read by one task. number: its place among all pieces. where: the source of rows
    [start, stop), a file, or a row group ``start`` of one. names: files."""

    number: int
    kind: Kind
    where: str
    start: int = 0
    stop: int = 0
    names: tuple[str, ...] = ()


class Chunk(NamedTuple):
    """n rows of a piece that are not decoded yet. labels: names or numbers of classes, or None."""

    paths: list[str]
    labels: list[str | int | None]
    loads: list[Load]


def is_remote(spec: str) -> bool:
    """Whether only this module knows what to do with these IMAGES."""
    if "://" in spec or PARQUET.search(spec):
        return True
    pattern = BRACES.search(spec) or any(sign in spec for sign in "*?[")
    return bool(pattern and TAR.search(spec)) and not os.path.exists(spec)


def pieces(spec: str, size: int) -> list[Piece]:
    """What is to be read, in order, ``size`` files of a folder together. Raises ImagesError where
    there is nothing, or it is out of reach."""
    found: list[Piece] = []
    for each in _expanded(spec):
        filesystem, path = _filesystem(each)
        if TAR.search(path) or PARQUET.search(path):
            files = _glob(filesystem, path, each)
        else:
            files = _listed(filesystem, path, each)
        if PARQUET.search(path):
            for name in files:
                groups = _row_groups(filesystem, name)
                found += [
                    Piece(len(found) + i, "parquet", _address(each, name), i) for i in range(groups)
                ]
        elif TAR.search(path):
            found += [
                Piece(len(found) + i, "tar", _address(each, name)) for i, name in enumerate(files)
            ]
        else:
            for start in range(0, len(files), size):
                names = tuple(_address(each, name) for name in files[start : start + size])
                found.append(Piece(len(found), "files", each, names=names))
    if not found:
        raise ImagesError(f"{spec} has no images")
    return found


def sizes(spec: str) -> list[str]:
    """Names and sizes of the files that are named, so that another state of them is noticed."""
    found = []
    for each in _expanded(spec):
        filesystem, path = _filesystem(each)
        names = (
            _glob(filesystem, path, each)
            if TAR.search(path) or PARQUET.search(path)
            else _listed(filesystem, path, each)
        )
        found += [f"{name} {filesystem.size(name)}" for name in names[:MOST_FILES]]
    return found


def left_out(spec: str) -> Counter[str]:
    """Suffix → files of a folder that are no images by theirs. Hidden ones are not counted."""
    found: Counter[str] = Counter()
    for each in _expanded(spec):
        filesystem, path = _filesystem(each)
        if TAR.search(path) or PARQUET.search(path):
            continue
        for name in _find(filesystem, path, each):
            below = name[len(path) :]
            if not is_image(below) and not is_hidden(below) and (kind := kind_of_left_out(name)):
                found[kind] += 1
    return found


def chunks(piece: Piece, size: int) -> Iterator[Chunk]:
    """The rows of a piece that is not of kind ``rows``, at most ``size`` together. Raises
    ImagesError when a file breaks off in the middle, or is out of reach."""
    try:
        rows = {"files": _files, "tar": _tar, "parquet": _parquet}[piece.kind](piece)
        waiting = Chunk([], [], [])
        for path, label, load in rows:
            waiting.paths.append(printable(path))
            waiting.labels.append(label)
            waiting.loads.append(load)
            if len(waiting.paths) == size:
                yield waiting
                waiting = Chunk([], [], [])
        if waiting.paths:
            yield waiting
    except ImagesError:
        raise
    except Exception as error:  # what fsspec's many file systems, tarfile and pyarrow may raise
        raise ImagesError(f"{piece.where} cannot be read: {unreadable_file(error)}") from error


_Row = tuple[str, "str | int | None", Load]


def _files(piece: Piece) -> Iterator[_Row]:
    for name in piece.names:
        filesystem, path = _filesystem(name)
        try:
            refuse_suffix(name)
            size = filesystem.size(path)
            load = (
                partial(refuse, f"{size} bytes are too many for an image")
                if size is not None and size > LARGEST_MEMBER
                else partial(load_bytes, filesystem.cat_file(path))
            )
        except UnreadableError as error:
            load = partial(refuse, str(error))
        except Exception as error:  # one file costs one row
            load = partial(refuse, unreadable_file(error))
        yield name, _folder_of(piece, PurePosixPath(path)), load


def _folder_of(piece: Piece, path: PurePosixPath) -> str | None:
    """The folder that is a file's label: that it lies in, unless that is all of the images."""
    root = PurePosixPath(_filesystem(piece.where)[1])
    return None if path.parent == root else path.parent.name


def _tar(piece: Piece) -> Iterator[_Row]:
    """In the archive's order. A ``.cls`` beside an image, before or after it, is its label."""
    with (
        _open(piece.where) as stream,
        tarfile.open(fileobj=stream, mode="r|*", tarinfo=StrictHeader) as archive,
    ):
        waiting: _Row | None = None
        key: tuple[str, str] | None = None
        label: str | int | None = None
        for info in archive:
            archive.members = []  # type: ignore[attr-defined]  # it keeps a kilobyte a member
            if _key(info.name) != key:
                if waiting is not None:
                    yield waiting
                key, label, waiting = _key(info.name), None, None
            if not info.isreg():
                continue
            if info.name.endswith(".cls") and info.size < 1000:
                text = _member(archive, info).decode("utf-8", "replace").strip()
                label = int(text) if text.isdecimal() else text
                if waiting is not None:
                    waiting = (waiting[0], label, waiting[2])
            elif is_image(info.name):
                if waiting is not None:
                    yield waiting
                load = _loading(archive, info)
                waiting = (f"{piece.where}/{info.name}", label, load)
        if waiting is not None:
            yield waiting


def _loading(archive: tarfile.TarFile, info: tarfile.TarInfo) -> Load:
    try:
        refuse_suffix(info.name)
    except UnreadableError as error:
        return partial(refuse, str(error))
    if info.size > LARGEST_MEMBER:
        return partial(refuse, f"{info.size} bytes are too many for an image")
    return partial(load_bytes, _member(archive, info))


def _key(name: str) -> tuple[str, str]:
    """What files of one sample share: the folder, and the name up to its first dot."""
    folder, _, last = name.rpartition("/")
    return folder, last.partition(".")[0]


def _member(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(info)
    data = b"" if stream is None else stream.read()
    if len(data) != info.size:
        raise ImagesError(f"the archive ends within {info.name}")
    return data


def _parquet(piece: Piece) -> Iterator[_Row]:
    from pyarrow.parquet import ParquetFile

    with _open(piece.where) as stream, ParquetFile(stream) as file:
        names = file.schema_arrow.names
        image, label, path = (
            next((each for each in known if each in names), None)
            for known in (IMAGE_COLUMNS, LABEL_COLUMNS, PATH_COLUMNS)
        )
        if image is None:
            raise ImagesError(
                f"{piece.where} has the columns {', '.join(names)}, but none of "
                f"{', '.join(IMAGE_COLUMNS)}: rename the one with the bytes of the images"
            )
        before = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
        columns = [each for each in (image, label, path) if each is not None]
        number = before
        # An image that many rows have may be stored once: no more of them than fit in the memory.
        group = file.metadata.row_group(piece.start)
        chunks = [group.column(i) for i in range(group.num_columns)]
        unpacked = [chunk.total_uncompressed_size for chunk in chunks]
        rows = max(1, min(ROWS_AT_ONCE, LARGEST_MEMBER // max(1, *unpacked)))
        for batch in file.iter_batches(rows, row_groups=[piece.start], columns=columns):
            for row in batch.to_pylist():
                yield _parquet_row(piece, number, row, image, label, path)
                number += 1


def _parquet_row(
    piece: Piece,
    number: int,
    row: Mapping[str, Any],
    image: str,
    label: str | None,
    path: str | None,
) -> _Row:
    cell = row[image]
    name = row[path] if path is not None else None
    if isinstance(cell, dict):  # as Hugging Face keeps images
        name = name or cell.get("path")
        cell = cell.get("bytes")
    load = (
        partial(load_bytes, cell)
        if isinstance(cell, bytes)
        else partial(refuse, "the row has no image")
    )
    given = row[label] if label is not None else None
    known = given if isinstance(given, int | str) and not isinstance(given, bool) else None
    return f"{piece.where}#{number}" + (f"/{name}" if name else ""), known, load


def folder_names(found: Sequence[Piece]) -> list[str]:
    """The distinct names of the folders that are labels of the files in these pieces, sorted."""
    labels = (
        _folder_of(piece, PurePosixPath(_filesystem(name)[1]))
        for piece in found
        if piece.kind == "files"
        for name in piece.names
    )
    return sorted({label for label in labels if label is not None})


def labels_of(
    given: Sequence[str | int | None],
    class_names: Sequence[str],
    table: Mapping[str, int] = MappingProxyType({}),
) -> torch.Tensor:
    """Names and numbers → classes of the network, -1 for what is none. (n,) int64. table: classes
    of names, which come first."""
    index = {**{name: number for number, name in enumerate(class_names)}, **table}

    def label(each: str | int | None) -> int:
        if isinstance(each, str) and each not in index and re.fullmatch(r"[0-9]{1,18}", each):
            each = int(each)
        if isinstance(each, str):
            return index.get(each, UNKNOWN)
        return each if each is not None and 0 <= each < len(class_names) else UNKNOWN

    return torch.tensor([label(each) for each in given], dtype=torch.int64)


# ----------------------------------------------------------------------------------- file systems


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError:
        raise ImagesError(
            "images outside local folders need fsspec: pip install 'oodcli[ray]'"
        ) from None
    return fsspec


def _filesystem(address: str) -> tuple[Any, str]:
    try:
        filesystem, path = _fsspec().core.url_to_fs(address)
    except (ImportError, ValueError, OSError) as error:  # a scheme that needs another package
        raise ImagesError(f"{address} cannot be reached: {unreadable_file(error)}") from error
    return filesystem, path


def _open(address: str) -> IO[bytes]:
    filesystem, path = _filesystem(address)
    return cast(IO[bytes], filesystem.open(path, "rb"))


def _address(spec: str, path: str) -> str:
    """The address of a file that was found under a spec."""
    scheme, mark, _ = spec.partition("://")
    return f"{scheme}://{path}" if mark and "://" not in path else path


def _expanded(spec: str) -> list[str]:
    """``{000..127}`` written out, as WebDataset does it."""
    found = BRACES.search(spec)
    if found is None:
        return [spec]
    first, last = int(found[1]), int(found[2])
    if last - first >= MOST_FILES:
        raise ImagesError(f"{spec} names too many files")
    width = len(found[1]) if found[1].startswith("0") else 0
    return [
        name
        for number in range(first, last + 1)
        for name in _expanded(f"{spec[: found.start()]}{number:0{width}}{spec[found.end() :]}")
    ]


def _glob(filesystem: Any, path: str, spec: str) -> list[str]:
    try:
        if filesystem.isdir(path):
            files = sorted(filesystem.glob(f"{path}/*.parquet"))
        elif any(sign in path for sign in "*?["):
            files = sorted(filesystem.glob(path))
        else:
            files = [path] if filesystem.exists(path) else []
    except Exception as error:  # what a file system may raise
        raise ImagesError(f"{spec} cannot be listed: {unreadable_file(error)}") from error
    if not files:
        raise ImagesError(f"{spec} does not exist, or cannot be reached")
    return files


def _listed(filesystem: Any, path: str, spec: str) -> list[str]:
    found = _find(filesystem, path, spec)
    files = sorted(name for name in found if is_image(name[len(path) :]))
    if not files:
        raise ImagesError(f"{spec} has no images: no file with a suffix such as .jpg or .png")
    return files


def _find(filesystem: Any, path: str, spec: str) -> list[str]:
    try:
        return list(filesystem.find(path))
    except Exception as error:
        raise ImagesError(f"{spec} cannot be listed: {unreadable_file(error)}") from error


def _row_groups(filesystem: Any, path: str) -> int:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ImagesError(f"{path}: parquet needs pyarrow: pip install 'oodcli[parquet]'") from None
    try:
        with filesystem.open(path, "rb") as stream, ParquetFile(stream) as file:
            return int(file.num_row_groups)
    except Exception as error:  # pyarrow and file systems raise almost anything
        raise ImagesError(f"{path} is not parquet, or damaged: {unreadable_file(error)}") from error
