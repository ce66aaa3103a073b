"""What is done of a job, beside its output, so that the same command can go on after anything.

``OUTPUT.partial`` begins with a line for people; then come records, each with its length, the
number of its rows and a checksum before it: first what the job is, as JSON, then what was made, in
safetensors, with the words to it as JSON. Records are only ever appended. One that was cut off (the
process was killed, the disk was full) is dropped, with all that may follow it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from oodcli.errors import FileError
from oodcli.files.atomic import PARTIAL, claimed, refuse_existing
from oodcli.jobs.shards import WHOLE, Share

log = logging.getLogger(__name__)

_LINE = PARTIAL + (
    b"1: what is done of the file whose name is this one's without .partial. The command that "
    b"began it goes on from here; with --restart, or without this file, it begins again.\n"
)
_FRAME = struct.Struct("<QII")
"""Before each record: its bytes, its rows, and the CRC-32 of those two and of the bytes."""
_COMPLETE = b"complete"
_WORDS = "words"
_SHARE = "the share of this process"


class Record(NamedTuple):
    """A block of rows. arrays: any, by name. words: what JSON can hold."""

    rows: int
    arrays: Mapping[str, NDArray[Any]]
    words: Mapping[str, Any]


Block = TypeVar("Block")


class About(NamedTuple):
    """What a job is. command: the line that began it. job: settings by the names that users know
    them by. decided: what was found out at its beginning, such as a batch size that fits."""

    command: str
    job: dict[str, Any]
    decided: dict[str, Any]


class Journal:
    """The journal of an output, open, and locked for this process; ``journal`` gives it.

    about: of this job, as it was begun. rows, records: how much is kept. complete: the output was
    about to be moved into place. ``about.decided`` may be filled until something is kept.
    """

    def __init__(
        self, output: Path, path: Path, handle: int, about: About, *, restart: bool
    ) -> None:
        self._output = output
        self.path = path
        self.about = about
        self.rows = self.records = 0
        self.complete = False
        self._handle = handle
        self._start = self._end = 0
        self._handed_over = False
        with open(handle, "rb", closefd=False) as file:
            begun = _begun(path, file, restart=restart)
            if begun is not None:
                _require_same(path, begun.job, about.job)
                self.about = begun
                self._start = self._end = file.tell()
                for rows, payload in _records(file):
                    self.complete = payload == _COMPLETE
                    if self.complete:
                        break
                    self._end = file.tell()
                    self.rows, self.records = self.rows + rows, self.records + 1
        mark = len(_framed(_COMPLETE, 0)) if self.complete else 0
        self._truncate(self._end + mark)  # without what was cut off

    def kept(self, restore: Callable[[Record], Block]) -> Iterator[Block]:
        """What was kept before this, in order, as ``restore`` makes it of the records. Read all of
        it before anything is appended. Raises FileError when that is not possible."""
        with open(self._handle, "rb", closefd=False) as file:
            file.seek(self._start)
            for rows, payload in _records(file):
                if payload == _COMPLETE:
                    return
                yield _restored(self.path, rows, payload, restore)

    def kept_by(
        self, place: Callable[[Record], Any], restore: Callable[[Record], Block]
    ) -> Iterator[Block]:
        """What was kept, ordered by place; of records of one place, the first. Raises FileError as
        ``kept`` does."""
        offsets: dict[Any, int] = {}
        with open(self._handle, "rb", closefd=False) as file:
            file.seek(self._start)
            at = self._start
            for rows, payload in _records(file):
                if payload == _COMPLETE:
                    break
                offsets.setdefault(_restored(self.path, rows, payload, place), at)
                at = file.tell()
            for _, at in sorted(offsets.items()):
                file.seek(at)
                rows, payload = next(_records(file))
                yield _restored(self.path, rows, payload, restore)

    def append(self, record: Record) -> None:
        """Keeps a block. Raises FileError when the disk refuses; what was kept before stays."""
        head = self._head()
        words = np.frombuffer(json.dumps(record.words).encode(), dtype=np.uint8)
        arrays = {name: np.ascontiguousarray(array) for name, array in record.arrays.items()}
        payload = safetensors.numpy.save({**arrays, _WORDS: words})
        start = self._start or len(head)
        self._end = self._written(head + _framed(payload, record.rows))
        self._start = start
        self.rows, self.records = self.rows + record.rows, self.records + 1

    def finish(self, *outputs: Path, force: bool) -> None:
        """The outputs are written, and will be moved into place now: should that fail, whatever is
        there the next time is ours. Raises FileError as ``refuse_existing`` does."""
        for output in outputs:
            refuse_existing(output, force=force)
        if self.records:
            self._written(_framed(_COMPLETE, 0))
            self.complete = True

    def hand_over(self) -> None:
        """This is all of a share, which stays for ``of_share`` to read in another process."""
        self._written(self._head() + _framed(_COMPLETE, 0))
        self._handed_over = True

    def of_share(self, share: Share, restore: Callable[[Record], Block]) -> Iterator[Block]:
        """What another process of the same job has handed over. Raises FileError when that is not
        here, not all, or of another job."""
        path = partial_path(self._output, share)
        try:
            file = path.open("rb")
        except OSError as error:
            raise FileError(
                f"{path} cannot be read ({error.strerror or error}): processes on several hosts "
                "need an output where all of them see it, or --shard and 'oodcli merge'"
            ) from error
        with file:
            begun = _begun(path, file)
            if begun is None:
                raise _damaged(path)
            _require_same(path, _comparable(begun.job), _comparable(self.about.job))
            for rows, payload in _records(file):
                if payload == _COMPLETE:
                    return
                yield _restored(path, rows, payload, restore)
        raise _damaged(path)

    def _head(self) -> bytes:
        """What comes before the first record."""
        if self._end:
            return b""
        return _LINE + _framed(json.dumps(self.about._asdict()).encode(), 0)

    def clear(self) -> None:
        """Forgets what was kept."""
        self._truncate(0)
        self._start = self._end = self.rows = self.records = 0
        self.complete = False

    def close(self, *, done: bool) -> None:
        """Removes the journal of what is done, with those of its shares, or has not begun."""
        if self._handed_over:
            return
        if done or not self.records:
            for path in (*(_shares(self._output) if done else ()), self.path):
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    log.info("%s can be removed (%s)", path, error.strerror or error)
            return
        log.info("%s keeps %d images: the same command goes on from there", self.path, self.rows)

    def _written(self, data: bytes) -> int:
        """Writes after what is kept; where that ends."""
        try:
            os.lseek(self._handle, self._end, os.SEEK_SET)
            left = memoryview(data)
            while left:
                left = left[os.write(self._handle, left) :]
        except OSError as error:
            self._truncate(self._end)
            raise _unwritable(self.path, error) from error
        return self._end + len(data)

    def _truncate(self, size: int) -> None:
        try:
            os.ftruncate(self._handle, size)
        except OSError as error:
            raise _unwritable(self.path, error) from error


@contextmanager
def journal(
    output: Path,
    job: Mapping[str, Any],
    command: str,
    *,
    restart: bool = False,
    share: Share = WHOLE,
) -> Iterator[Journal]:
    """The journal of an output, for this process alone. When the block ends well it is removed;
    when anything is raised, what it keeps stays for the next time.

    job: everything that decides what will be in the output, by the names that users know it by.
    restart: forgets what was kept. share: of the job, that this process does. Raises FileError when
    another process is writing the output, and when what is kept is of another job, naming the
    difference.
    """
    path = partial_path(output, share)
    with _claimed(path, output) as handle:
        of = {} if share.whole else {_SHARE: str(share)}
        about = About(command, json.loads(json.dumps({**job, **of})), {})
        kept = Journal(output, path, handle, about, restart=restart)
        if kept.rows:
            log.info("going on after the %d images that %s keeps", kept.rows, path)
        done = False
        try:
            yield kept
            done = True
        finally:
            kept.close(done=done)


def partial_path(output: Path, share: Share = WHOLE) -> Path:
    """Where the journal of an output is: beside the file that a symbolic link points to. The first
    share of it has that of the whole."""
    target = output.resolve() if output.is_symlink() else output
    number = f".{share.number}-of-{share.of}" if share.number > 1 else ""
    return target.with_name(f"{target.name}{number}.partial")


def _shares(output: Path) -> list[Path]:
    """The journals of all shares of an output but the first."""
    path = partial_path(output)
    form = re.compile(re.escape(path.stem) + r"\.[0-9]+-of-[0-9]+\.partial")
    return [each for each in path.parent.iterdir() if form.fullmatch(each.name)]


def _comparable(job: Mapping[str, Any]) -> dict[str, Any]:
    """What the shares of a job have in common."""
    return {name: value for name, value in job.items() if name not in (_SHARE, "--device")}


def refuse_output(output: Path, *, force: bool = False) -> None:
    """As ``refuse_existing``, but an output whose journal says that it is complete may be there:
    the process was killed before it could remove the journal."""
    refuse_existing(output, force=force or is_complete(output))


def is_complete(output: Path) -> bool:
    """Whether the journal of an output says that it is, or was about to be, in its place."""
    mark = _framed(_COMPLETE, 0)
    try:
        with partial_path(output).open("rb") as file:
            file.seek(-len(mark), os.SEEK_END)
            return file.read() == mark
    except OSError:
        return False


def read_about(path: Path) -> tuple[About, int, bool]:
    """What the job of a journal is, how many rows it keeps, and whether it is complete. Raises
    FileError when the file is no journal, or damaged."""
    with path.open("rb") as file:
        about = _begun(path, file)
        if about is None:
            raise FileError(f"{path} keeps nothing: it was cut off, and can be removed")
        rows, complete = 0, False
        for count, payload in _records(file):
            rows, complete = rows + count, payload == _COMPLETE
    return about, rows, complete


@contextmanager
def _claimed(path: Path, output: Path) -> Iterator[int]:
    with ExitStack() as stack:
        try:
            handle = stack.enter_context(claimed(path, output))
        except OSError as error:
            raise _unwritable(output, error) from error
        yield handle


def _begun(path: Path, file: BinaryIO, *, restart: bool = False) -> About | None:
    """Reads up to the first record; None where not even that is whole, or it shall be forgotten."""
    line = file.read(len(_LINE))
    if not _LINE.startswith(line):
        if not line.startswith(PARTIAL):
            raise FileError(f"{path} is no partial file of oodcli: move it away first")
        if not restart:
            raise FileError(
                f"{path} is of another version of oodcli: go on with that, or begin again with "
                "--restart"
            )
    first = next(_records(file), None)
    if restart or first is None:
        return None
    try:
        about = About(**json.loads(first[1]))
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(path) from error
    if not isinstance(about.job, dict) or not isinstance(about.decided, dict):
        raise _damaged(path)
    return about


def _records(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Rows and bytes of the records that follow, as far as they are whole."""
    size = os.fstat(file.fileno()).st_size
    while len(frame := file.read(_FRAME.size)) == _FRAME.size:
        length, rows, checksum = _FRAME.unpack(frame)
        if not 0 < length <= size - file.tell():
            return
        payload = file.read(length)
        if _checksum(payload, rows) != checksum:
            return
        yield rows, payload


def _framed(payload: bytes, rows: int) -> bytes:
    return _FRAME.pack(len(payload), rows, _checksum(payload, rows)) + payload


def _checksum(payload: bytes, rows: int) -> int:
    return zlib.crc32(payload, zlib.crc32(struct.pack("<QI", len(payload), rows)))


def _restored(path: Path, rows: int, payload: bytes, restore: Callable[[Record], Block]) -> Block:
    try:
        arrays = safetensors.numpy.load(payload)
        words = json.loads(arrays.pop(_WORDS).tobytes())
        return restore(Record(rows, arrays, words))
    except (
        *(SafetensorError, LookupError, ValueError, TypeError, AttributeError),
        *(RuntimeError, OverflowError),
    ) as error:
        raise _damaged(path) from error


def _require_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            raise FileError(
                f"{path} was begun with {name} {_shown(before.get(name))}, but now it is "
                f"{_shown(now.get(name))}: give the command that began it to go on, --restart to "
                "begin again, or another -o"
            )


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _damaged(path: Path) -> FileError:
    return FileError(f"{path} is damaged: begin again with --restart")


def _unwritable(path: Path, error: OSError) -> FileError:
    return FileError(f"{path} could not be written: {error.strerror or error}")
