"""What the two HDF5 formats share: provenance in the root attributes, and clear refusals."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
from numpy.typing import NDArray

from oodcli.errors import FileError, OodcliError, first_line
from oodcli.files.origin import Origin
from oodcli.jobs.shards import Shard
from oodcli.networks.preprocessing import Preprocessing

if TYPE_CHECKING:
    from typing_extensions import Buffer

VERSION = 1

ROWS_SHA256 = "rows_sha256"
"""Root attribute: SHA-256 of the list of images, once every row is there. Older files lack it."""

SHA256 = "sha256"
"""Attribute of a dataset: SHA-256 of its bytes, row after row. Of one number only, and of every
dataset in older files; all others have a checksum for each chunk, which HDF5 checks whenever it
reads one (``fletcher32``)."""

CHUNK_BYTES = 1 << 18
CHUNK_CACHE = 1 << 19
"""Bytes for each dataset, two chunks of a feature cache: rows are written and read in order. HDF5
2.0 takes 8 MiB unasked, which are 2 GB for the 250 datasets of a ResNet-50."""


@dataclass(frozen=True)
class Provenance:
    """How a file was made. source: what the user named as input. command: the command line.
    precision: float32 or bfloat16. averaged: as of a Classifier; no older file has it. virtual:
    whether the rows are virtual images; matched_accuracy: to which they were degraded, None where
    they were not. shard: which part of a whole the file is, None where it is all. left_out:
    suffix → files among the images that are no rows."""

    checkpoint_sha256: str
    arch: str
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    source: str
    command: str
    oodcli_version: str
    torch_version: str
    seed: int
    device: str = "cpu"
    precision: str = "float32"
    averaged: bool = False
    virtual: bool = False
    matched_accuracy: float | None = None
    shard: Shard | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def origin(self) -> Origin:
        """The network that the rows tell of."""
        return Origin(self.checkpoint_sha256, self.averaged, self.preprocessing)

    def write(self, file: h5py.File, format_name: str) -> None:
        file.attrs["format"] = format_name
        file.attrs["version"] = VERSION
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Preprocessing):
                value = json.dumps(value.to_dict())
            elif isinstance(value, Shard):
                value = json.dumps(asdict(value))
            elif value is None or value == {}:
                continue
            elif isinstance(value, Mapping):
                value = json.dumps(value)
            elif isinstance(value, tuple):
                # As a dataset where it is long: attributes are limited to 64 KiB.
                value = json.dumps(value, ensure_ascii=False)
                if len(value.encode()) > 60_000:
                    file.create_dataset(each.name, data=value)
                    continue
            file.attrs[each.name] = value

    @classmethod
    def read(cls, file: h5py.File) -> Provenance:
        """Raises KeyError or ValueError when something is missing."""
        values = {
            each.name: file.attrs[each.name]
            for each in fields(cls)
            if each.name in file.attrs
            or each.name not in ("averaged", "class_names", "left_out", "matched_accuracy", "shard")
        }
        matched, shard = values.get("matched_accuracy"), values.get("shard")
        names = values.get("class_names") or dataset(file, "class_names", "OS")[()].decode()
        names = json.loads(names)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("class_names is not a list of names")
        return cls(
            checkpoint_sha256=str(values["checkpoint_sha256"]),
            arch=str(values["arch"]),
            preprocessing=Preprocessing.from_dict(json.loads(values["preprocessing"])),
            class_names=tuple(names),
            source=str(values["source"]),
            command=str(values["command"]),
            oodcli_version=str(values["oodcli_version"]),
            torch_version=str(values["torch_version"]),
            seed=int(values["seed"]),
            device=str(values["device"]),
            precision=str(values["precision"]),
            averaged=bool(values.get("averaged", False)),
            virtual=bool(values["virtual"]),
            matched_accuracy=None if matched is None else float(matched),
            shard=None if shard is None else Shard.from_dict(json.loads(shard)),
            left_out={str(k): int(n) for k, n in json.loads(values.get("left_out", "{}")).items()},
        )


def format_of(path: Path) -> str | None:
    """The ``format`` attribute of an HDF5 file, None for anything else."""
    try:
        with opened(path) as file:
            return str(file.attrs.get("format", ""))
    except Exception:  # on damaged files h5py raises almost anything
        return None


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file, open for reading. Raises OSError where h5py cannot open it, so it goes into a
    ``damage``."""
    with (
        io.FileIO(path) as raw,
        h5py.File(_Source(raw), "r", rdcc_nbytes=CHUNK_CACHE) as file,
    ):
        if file.id.get_create_plist().get_sizes() != (8, 8):
            raise OSError("addresses of another size than h5py's")
        yield file


class _Source:
    """The file object that HDF5 reads from. Texts are in heaps; HDF5 2.0 never returns from some
    damaged ones, so it gets zeros in the place of their signature, and refuses them."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw
        self.seek, self.tell, self.read, self.flush = raw.seek, raw.tell, raw.read, raw.flush

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        start, found = self._raw.tell(), 0
        while read := self._raw.readinto(view[found:]):
            found += read
        view[found:] = bytes(len(view) - found)
        if bytes(view[:8]) == b"GCOL\1\0\0\0" and not self._ends(start):
            view[:8] = bytes(8)
        return len(view)

    def _ends(self, start: int) -> bool:
        """Whether the objects of the heap there follow each other to its end (section III.E of
        HDF5's file format)."""
        self._raw.seek(start + 8)
        end = int.from_bytes(self._raw.read(8), "little")
        if start + end > os.fstat(self._raw.fileno()).st_size:
            return False
        self._raw.seek(start)
        heap, place = self._raw.read(end), 16
        while place + _HEAP_OBJECT.size <= end:
            index, size = _HEAP_OBJECT.unpack_from(heap, place)
            step = 16 + -(-size // 8) * 8 if index else size  # free space counts its header
            if not 0 < step <= end - place:
                return False
            place += step
        return True


_HEAP_OBJECT = struct.Struct("<H6xQ")
"""The index of an object in a heap, 0 for free space, and its bytes."""


def dataset(file: h5py.Group, name: str, kinds: str, *, by_rows: bool = False) -> h5py.Dataset:
    """A dataset of one of numpy's ``kinds`` of numbers or text, of which the file holds at least
    some: reading it, or with ``by_rows`` a row or a chunk of it, takes no more memory than the file
    has bytes. A header alone can claim any size. Raises KeyError, TypeError or ValueError, so it
    goes into a ``damage``."""
    found = file[name]
    if not isinstance(found, h5py.Dataset) or found.shape is None:
        raise TypeError(f"/{name} is not an array")
    if found.dtype.kind not in kinds:
        raise TypeError(f"/{name} is of the wrong type, {found.dtype}")
    if found.is_virtual or found.external:
        raise ValueError(f"/{name} has its values in another file")
    shape = found.shape
    claimed = math.prod(shape)
    if by_rows:
        claimed = max(math.prod(shape[1:]), math.prod(found.chunks or (0,)))
    if claimed * found.dtype.itemsize > max(found.file.id.get_filesize(), 1 << 20):
        raise ValueError(f"/{name} claims the shape {shape}, which is more than the file has")
    return found


def group_of(file: h5py.Group, name: str) -> Mapping[str, Any]:
    """A group, empty where there is none. Raises TypeError for a dataset, whose rows would be
    taken for the names in it."""
    found: Mapping[str, Any] = file.get(name, {})
    if isinstance(found, h5py.Dataset):
        raise TypeError(f"/{name} is not a group")
    return found


def checked(shape: tuple[int, ...], itemsize: int) -> dict[str, Any]:
    """Arguments of ``create_dataset`` for chunks of whole rows with a checksum each. A dataset of
    one number or none has no chunks."""
    if not shape or not all(shape):
        return {}
    rows = max(1, CHUNK_BYTES // (itemsize * math.prod(shape[1:])))
    return {"chunks": (min(shape[0], rows), *shape[1:]), "fletcher32": True}


def write_constant(file: h5py.Group, name: str, values: NDArray[Any]) -> None:
    """A dataset that is written at once, with its checksum."""
    # By assignment, HDF5 would write the time into the group that it makes on the way.
    made = file.create_dataset(name, data=values, **checked(values.shape, values.itemsize))
    if not values.shape:
        made.attrs[SHA256] = hashlib.sha256(values.tobytes()).hexdigest()


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """While something is read from an HDF5 file: what its damage raises becomes FileError. Nothing
    but reading belongs in it, or faults of ours would be blamed on the file."""
    try:
        yield
    except FileError:
        raise
    except (
        *(OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError),
        *(OverflowError, MemoryError, OodcliError),
    ) as error:
        reason = first_line(error)
        if "filter returned failure" in reason:  # fletcher32, the only one that we use
            raise FileError(
                f"{path}: a checksum does not match: the file is damaged, create it again"
            ) from error
        raise FileError(
            f"{path} is truncated, damaged or not an HDF5 file ({reason}): create it again"
        ) from error


@contextmanager
def reading(path: Path, format_name: str, made_by: str) -> Iterator[h5py.File]:
    """An open file of the right format and version. Raises FileError for anything else. What is
    read from it goes into a ``damage``."""
    if not path.is_file():
        raise FileError(f"{path} does not exist: '{made_by}' writes such files")
    with ExitStack() as stack:
        with damage(path):
            file = stack.enter_context(opened(path))
            found = file.attrs.get("format")
            if found != format_name:
                raise FileError(
                    f"{path} has format '{found}', expected '{format_name}': '{made_by}' writes "
                    "such files"
                )
            if int(file.attrs["version"]) != VERSION:
                raise FileError(
                    f"{path} has format version {file.attrs['version']}, this oodcli reads "
                    f"{VERSION}: use a newer oodcli, or create the file again"
                )
        yield file


class _Sink:
    """The file object that HDF5 writes into. When the disk refuses, the HDF5 library can neither
    flush nor close, and may end the process with a segmentation fault; so it never hears of it: the
    fault is kept, and what is written afterwards (a batch at most) stays in memory."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw
        self._position = 0
        self._extent = 0
        self._fault: OSError | None = None
        self._unwritten: list[tuple[int, bytes]] = []

    def check(self) -> None:
        """Raises the first OSError."""
        if self._fault is not None:
            raise self._fault

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._extent}
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def write(self, data: Buffer) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        if self._fault is None:
            try:
                self._raw.seek(self._position)
                while left:
                    left = left[self._raw.write(left) or 0 :]
            except OSError as fault:
                self._fault = fault
        if left:
            self._unwritten.append((self._position + size - len(left), bytes(left)))
        self._position += size
        self._extent = max(self._extent, self._position)
        return size

    def read(self, size: int) -> bytes:
        data = bytearray(size)
        self.readinto(data)
        return bytes(data)

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        self._raw.seek(self._position)
        found = self._raw.readinto(view) or 0
        view[found:] = bytes(len(view) - found)
        for start, data in self._unwritten:
            low = max(start, self._position)
            high = min(start + len(data), self._position + len(view))
            if low < high:
                part = data[low - start : high - start]
                view[low - self._position : high - self._position] = part
        self._position += len(view)
        return len(view)

    def truncate(self, size: int) -> int:
        try:
            self._raw.truncate(size)
        except OSError as fault:
            self._fault = self._fault or fault
        self._extent = size
        return size

    def flush(self) -> None:
        """Nothing is buffered here."""


@dataclass(frozen=True)
class NewFile:
    """A file being written. check: raises OSError when the disk has refused something; call it
    after each batch, to stop early."""

    file: h5py.File
    check: Callable[[], None]


@contextmanager
def writing(path: Path) -> Iterator[NewFile]:
    """A new file at a path that ``atomic`` gave. Raises OSError when the disk refuses."""
    with io.FileIO(path, "w+") as raw:
        sink = _Sink(raw)
        with h5py.File(sink, "w", libver=("v110", "v114"), rdcc_nbytes=CHUNK_CACHE) as file:
            yield NewFile(file, sink.check)
        sink.check()
