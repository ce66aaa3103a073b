"""Image files: in folders, in lists, in archives. Nothing is ever unpacked to disk."""

from __future__ import annotations

import csv
import io
import os
import re
import stat
import tarfile
import zipfile
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from tarfile import ReadError, TarFile
from typing import IO, NamedTuple, Self, TextIO, cast

from oodcli.errors import ImagesError
from oodcli.images.decoding import Encoded
from oodcli.images.labels import Labels, by_folder, unknown, written
from oodcli.images.pixels import (
    SUFFIXES,
    UNREADABLE,
    Load,
    UnreadableError,
    is_picture,
    kind_of_left_out,
    load_bytes,
    load_file,
    refuse,
    refuse_suffix,
)
from oodcli.images.source import Fetch, ImageSource
from oodcli.images.words import printable, unreadable_file

LARGEST_MEMBER = 1 << 28
"""Bytes of one image in an archive; it is read whole, and more is no image but a bomb."""

MAC_SHADOWS = "__MACOSX"
"""A folder that macOS adds to archives, with files named as the images."""

PREPARED = ".oodcli"
"""End of the name of a folder that prepare makes: its contact sheet is no image to score."""

LONGEST_NAME = 1 << 20
"""Bytes of an entry of a tar that holds a name or other words about the next one."""


class FileList(ImageSource):
    """Files, one a row."""

    def __init__(
        self,
        name: str,
        files: Sequence[str],
        labels: Labels | None = None,
        left_out: Mapping[str, int] | None = None,
    ) -> None:
        self.name = name
        self._files = files
        self.read_as(unknown(len(files)) if labels is None else labels)
        self.left_out = left_out or {}

    def __len__(self) -> int:
        return len(self._files)

    def paths(self, start: int, stop: int) -> list[str]:
        return [printable(path) for path in self._files[start:stop]]

    def sizes(self, start: int, stop: int) -> list[int]:
        return [_size(path) for path in self._files[start:stop]]

    @contextmanager
    def reading(self) -> Iterator[Fetch]:
        yield lambda start, stop: Encoded(
            cast(Labels, self.known).values[start:stop],
            [partial(load_file, path) for path in self._files[start:stop]],
        )


def _size(path: str) -> int:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def folder(root: Path, class_names: Sequence[str]) -> FileList:
    """The images in a folder and all below it, sorted by path; classes by sub-folder.

    Hidden files and folders are left out, and so are files without an image's suffix, which are
    counted. Links to folders are followed, except back to a folder that they are in. A folder that
    cannot be listed is a row, whose error says why. Raises ImagesError when there is no image.
    """
    left_out: Counter[str] = Counter()
    found = sorted(_walk(str(root), "", (), left_out))
    if not found:
        raise ImagesError(
            f"{root} has no images: no file with a suffix such as .jpg or .png, nor in its "
            f"sub-folders{_instead(left_out)}"
        )
    labels = by_folder([PurePosixPath(path).parts[:-1] for path in found], class_names)
    files = [(root / path).as_posix() for path in found]
    return FileList(str(root), files, labels, left_out)


def _instead(left_out: Mapping[str, int]) -> str:
    return f" (only {listed(left_out)})" if left_out else ""


def listed(left_out: Mapping[str, int]) -> str:
    """``.txt 3, no suffix 1``: the most frequent first, five at most."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{printable(kind)} {count}" for kind, count in ordered[:5])
    return shown + (f", {len(ordered) - 5} other suffixes" if ordered[5:] else "")


def _walk(
    root: str, below: str, above: tuple[tuple[int, int], ...], left_out: Counter[str]
) -> Iterator[str]:
    """Paths of images relative to ``root``, with / between the parts. above: device and number of
    each folder on the way here. left_out: counts the other files."""
    here = os.path.join(root, below)
    try:
        status = os.stat(here)
        identity = (status.st_dev, status.st_ino)
        if identity in above:  # a link to a folder that it is in
            return
        with os.scandir(here) as listing:
            # Not entry.is_dir(), which raises for a link to itself.
            entries = [(entry.name, os.path.isdir(entry.path)) for entry in listing]
    except OSError as error:
        if not below:
            raise ImagesError(f"{root} cannot be listed: {unreadable_file(error)}") from error
        yield below.removesuffix("/")  # reading it as a file gives its row the reason
        return
    for name, is_folder in entries:
        if name.startswith("."):
            continue
        if is_folder:
            if name != MAC_SHADOWS and not name.endswith(PREPARED):
                yield from _walk(root, f"{below}{name}/", (*above, identity), left_out)
        elif is_picture(name):
            yield below + name
        elif kind := kind_of_left_out(name):
            left_out[kind] += 1


# The path ends with the last image suffix that is followed by a separator; the rest is the label.
_LABELLED = re.compile(
    rf"(?P<path>.*(?:{'|'.join(re.escape(suffix) for suffix in sorted({*SUFFIXES, *UNREADABLE}))}))"
    r"\s*[\s,]\s*(?P<label>\S.*)",
    re.IGNORECASE,
)


def list_from_text(path: Path, class_names: Sequence[str]) -> FileList:
    """A text file with one path a line; see ``parse_list``. Raises ImagesError."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ImagesError(f"{path} cannot be read: {unreadable_file(error)}") from error
    # A pipe such as <(find …) of the shell lies in no folder that a path could be relative to.
    beside = path.parent if path.is_file() else Path()
    return parse_list(str(path), text, beside, class_names)


def list_from_stream(stream: TextIO, class_names: Sequence[str]) -> FileList:
    """A list on standard input, relative to the working directory. Raises ImagesError."""
    binary = getattr(stream, "buffer", None)  # names need not be UTF-8; a test's StringIO has none
    text = stream.read().encode("utf-8", "surrogateescape") if binary is None else binary.read()
    return parse_list("-", text, Path(), class_names)


def parse_list(name: str, text: bytes, beside: Path, class_names: Sequence[str]) -> FileList:
    """One path a line, relative to ``beside``, optionally a label after a tab, comma or space; or
    a CSV with a header that names a column ``path`` and perhaps one ``label``.

    A line that ends in an image's suffix is a path as a whole, whatever spaces and commas it has.
    Where something follows an image's suffix and a separator, that is the label: a class's name
    or number. In a line without any image's suffix, the last word is the label if it follows a
    tab, or if it is a number or a class of the network and no file has the whole line as its
    name. Empty lines are left out. The order is the list's own. Raises ImagesError when there is
    no path, or the file is not text.
    """
    what = "standard input" if name == "-" else name
    if b"\0" in text:
        raise ImagesError(f"{what} is not a text list: give one path per line")
    lines = text.decode("utf-8-sig", "surrogateescape").split("\n")
    rows = _parse_table(what, lines)
    if rows is None:
        quoted = '"' if name.lower().endswith(".csv") else None
        lines = [line.strip() for line in lines]
        rows = [_parse_line(line, beside, class_names, quoted) for line in lines if line]
    if not rows:
        raise ImagesError(f"{what} lists no images: give one path per line")
    labels = written([label for _, label in rows], class_names, "labels of the list")
    files = [(beside / path).as_posix() for path, _ in rows]
    return FileList(name, files, labels)


PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABEL_COLUMNS = ("label", "class", "class_name", "target")
"""What a table of images calls its columns."""

LONGEST_HEADER = 1 << 16
"""Characters in the first line of such a table."""


def _parse_table(what: str, lines: Sequence[str]) -> list[tuple[str, str | None]] | None:
    """Paths and labels of a CSV whose header names its columns; None where there is no such
    header. Raises ImagesError."""
    for delimiter in ",;\t":
        names = [cell.strip().lower() for cell in _cells(lines[0], delimiter)]
        path = _column(names, PATH_COLUMNS)
        if path is not None and (len(names) > 1 or names == ["path"]):
            break
    else:
        return None
    label = _column(names, LABEL_COLUMNS)
    rows: list[tuple[str, str | None]] = []
    try:
        for cells in csv.reader((f"{line}\n" for line in lines[1:]), delimiter=delimiter):
            if any(cells):
                rows.append((cells[path], None if label is None else cells[label] or None))
    except (csv.Error, IndexError) as error:
        raise ImagesError(
            f"{what}: row {len(rows) + 1} does not have the {len(names)} columns of the header: "
            "write the list with a library for CSV"
        ) from error
    return rows


def _cells(line: str, delimiter: str = ",") -> list[str]:
    """The cells of one line of a CSV; none where it is no such line, or a long one."""
    try:
        return next(csv.reader([line.strip("\r\n")[:LONGEST_HEADER]], delimiter=delimiter), [])
    except csv.Error:
        return []


def _column(names: Sequence[str], known: Sequence[str]) -> int | None:
    return next((names.index(name) for name in known if name in names), None)


def _parse_line(
    line: str, beside: Path, class_names: Sequence[str], quote: str | None = None
) -> tuple[str, str | None]:
    """quote: what a path is in that has a comma, where the list is a CSV."""
    if quote and line.startswith(quote) and (cells := _cells(line)):
        return cells[0], (cells[1] or None) if cells[1:] else None
    if is_picture(line):
        return line, None
    if match := _LABELLED.fullmatch(line):
        return match["path"], match["label"]
    path, tab, label = line.rpartition("\t")
    if tab:
        return path.rstrip(), label.lstrip()
    separator = max(line.rfind(","), line.rfind(" "))
    path, label = line[:separator].rstrip(" ,"), line[separator + 1 :].strip()
    if separator > 0 and path and (label in class_names or label.isdecimal()):
        return (line, None) if os.path.exists(beside / line) else (path, label)
    return line, None


class Member(NamedTuple):
    """One image in an archive: where it is, or why it cannot be read."""

    name: str
    offset: int
    size: int
    error: str | None = None


class _Archive(ImageSource):
    """Images in an archive, classes by sub-folder. A row's path is ARCHIVE/MEMBER."""

    def __init__(self, path: Path, class_names: Sequence[str]) -> None:
        self.name = str(path)
        self._path = path
        self.left_out = self._others = Counter[str]()
        try:
            self._members, self.order_note = self._index()
        except Exception as error:  # zipfile and tarfile raise almost anything
            raise ImagesError(
                f"{path} is damaged or not such an archive: {unreadable_file(error)}"
            ) from error
        if not self._members:
            raise ImagesError(
                f"{path} has no images: no file with a suffix such as .jpg or .png"
                f"{_instead(self.left_out)}"
            )
        parents = [_parts(member.name)[:-1] for member in self._members]
        self.read_as(by_folder(parents, class_names))

    @abstractmethod
    def _index(self) -> tuple[list[Member], str | None]:
        """The images in the order in which they are read, and a note on that order. Counts the
        other files in ``left_out``."""

    def _is_row(self, name: str) -> bool:
        """Whether a file is an image; one that is not, and is not hidden, is counted."""
        if is_image(name):
            return True
        if not is_hidden(name) and (kind := kind_of_left_out(name)):
            self._others[kind] += 1
        return False

    def __len__(self) -> int:
        return len(self._members)

    def paths(self, start: int, stop: int) -> list[str]:
        members = self._members[start:stop]
        return [printable(f"{self._path.as_posix()}/{member.name}") for member in members]

    def weight(self, start: int, stop: int) -> int:
        return sum(
            member.size for member in self._members[start:stop] if member.size <= LARGEST_MEMBER
        )

    def _fetcher(self, read: Callable[[Member], bytes]) -> Fetch:
        return lambda start, stop: Encoded(
            cast(Labels, self.known).values[start:stop],
            [_load_member(read, member) for member in self._members[start:stop]],
        )


def _load_member(read: Callable[[Member], bytes], member: Member) -> Load:
    """Read the bytes now, by the fetching thread; decode them later."""
    if member.error is not None:
        return partial(refuse, member.error)
    try:
        refuse_suffix(member.name)
    except UnreadableError as error:
        return partial(refuse, str(error))
    if member.size > LARGEST_MEMBER:
        return partial(refuse, f"{member.size} bytes are too many for an image")
    try:
        return partial(load_bytes, read(member))
    except Exception as error:
        return partial(refuse, f"cannot be unpacked: {_reason(error, member)}")


def _reason(error: Exception, member: Member) -> str:
    if "encrypted" in str(error):
        return "it is encrypted"
    return unreadable_file(error)


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(name).parts if part not in (".", ".."))


def is_image(name: str) -> bool:
    """Whether a member of an archive is an image: by suffix, not hidden, not macOS's shadow."""
    return is_picture(name) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a member of an archive is hidden, or in a hidden folder."""
    return any(part.startswith(".") or part == MAC_SHADOWS for part in _parts(name))


class ZipOfImages(_Archive):
    """Images in a .zip, sorted by path."""

    def _index(self) -> tuple[list[Member], str | None]:
        with zipfile.ZipFile(self._path) as archive:
            members = [
                Member(info.filename, info.header_offset, info.file_size)
                for info in archive.infolist()
                if not info.is_dir() and self._is_row(info.filename)
            ]
        unique = {member.name: member for member in members}  # the last of a name counts
        return [unique[name] for name in sorted(unique)], None

    @contextmanager
    def reading(self) -> Iterator[Fetch]:
        with zipfile.ZipFile(self._path) as archive:
            yield self._fetcher(lambda member: archive.read(member.name))


class StrictHeader(tarfile.TarInfo):
    """tarfile takes a damaged header for the end of the archive; rows would be missing unseen. And
    it reads the whole of an entry that holds a long name."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except _DAMAGED_HEADERS as error:
            raise ReadError(f"damaged header at byte {tarfile.offset}") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        found = super().frombuf(buf, encoding, errors)
        if found.type in _NAMES and not 0 <= found.size <= LONGEST_NAME:
            raise ReadError(f"an entry of type {found.type!r} of {found.size} bytes")
        return found


_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, b"x", b"g", b"X")

_DAMAGED_HEADERS = (
    tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
    tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
)


class TarOfImages(_Archive):
    """Images in a .tar, sorted by path; in a compressed one in the archive's order, because
    sorted reading would unpack it again for every image."""

    def _index(self) -> tuple[list[Member], str | None]:
        found: dict[str, Member] = {}
        links: list[tuple[str, str]] = []
        with tarfile.open(self._path, tarinfo=StrictHeader) as archive:
            compressed = not isinstance(archive.fileobj, io.BufferedReader)
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it keeps a kilobyte a member
                if info.isreg() and not info.issparse():
                    found.pop(info.name, None)  # the last of a name counts
                    found[info.name] = Member(info.name, info.offset_data, info.size)
                elif info.islnk():
                    links.append((info.name, info.linkname))
                elif info.issym():
                    target = os.path.join(os.path.dirname(info.name), info.linkname)
                    links.append((info.name, os.path.normpath(target).replace(os.sep, "/")))
                elif is_image(info.name) and not info.isdir():
                    error = f"an entry of type {info.type!r}, not a file"
                    found[info.name] = Member(info.name, 0, 0, error)
        for name, target in links:
            missing = Member(name, 0, 0, "a link to what is not a file of the archive")
            found[name] = found.get(target, missing)._replace(name=name)
        members = [member for name, member in found.items() if self._is_row(name)]
        in_order = sorted(members, key=lambda member: member.name)
        if compressed and [m.name for m in members] != [m.name for m in in_order]:
            return members, "rows follow the order of the compressed archive, not of their paths"
        return in_order, None

    @contextmanager
    def reading(self) -> Iterator[Fetch]:
        with tarfile.open(self._path) as archive:
            yield self._fetcher(partial(_read_at, cast(IO[bytes], archive.fileobj)))


def _read_at(stream: IO[bytes], member: Member) -> bytes:
    stream.seek(member.offset)
    return stream.read(member.size)
