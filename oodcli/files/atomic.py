"""Files appear whole or not at all, and only one process at a time writes a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oodcli.errors import FileError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

JOB = "job.json"
"""Says, in the folder of an interrupted job, what that is."""

PREPARED = ("prepared.json", "steps.json")
"""Files of which a folder of prepare has one: when it is finished, and before."""

DEVICES = (Path("/dev"), Path("/dev/fd"))
"""/dev/stdout and /dev/fd/1 may lead to a regular file, which is not ours to replace."""


def refuse_existing(path: Path, *, force: bool = False) -> None:
    """Ask this before hours of work. Raises FileError when ``path`` exists, is a folder or a
    device, or its folder does not exist or cannot be written."""
    try:
        exists = path.exists()
    except OSError as error:  # a name that is too long
        raise FileError(f"{path} cannot be written: {error.strerror}") from error
    if path.is_dir():
        raise FileError(f"{path} is a folder, expected a file: choose another -o")
    if exists and (not path.is_file() or path.parent in DEVICES):
        raise FileError(f"{path} is not a regular file: choose another -o")
    if exists and not force:
        raise FileError(f"{path} exists: choose another -o, or overwrite it with --force")
    folder = path.parent
    if not folder.is_dir():
        raise FileError(f"{folder} is no folder: make it first, or choose another -o")
    if not os.access(folder, os.W_OK):
        raise FileError(f"{folder} cannot be written: choose another -o")


def refuse_suffix(path: Path, *known: str) -> None:
    """Raises FileError when an output would not be recognised for what it is."""
    if path.suffix not in known:
        raise FileError(f"-o {path}: expected a name that ends in {known[0]}")


@contextmanager
def claimed(path: Path, output: Path) -> Iterator[int]:
    """A descriptor of the file at ``path``, made where there is none, for reading and writing. The
    file is locked: the lock goes when the process does, however it ends. Raises FileError when
    another process has it, which is writing ``output`` then; OSError when it cannot be opened."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if not _lock(handle):
                raise FileError(
                    f"{output} is being written by another process: wait for that, or choose "
                    "another -o"
                )
            if _is_at(handle, path):
                yield handle
                return
            # Whoever had it has moved or removed it since: this is no longer the file at path.
        finally:
            os.close(handle)


def _lock(handle: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems know no locks
        return True
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def atomic(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, which no other process gets; moves it into place
    when the block ends well, once the disk has it, and removes it when anything is raised. What a
    killed process leaves of it, the next one writes over. A symbolic link stays, what it points to
    is replaced. Raises FileError as refuse_existing does, when another process is writing ``path``,
    and when the disk refuses."""
    refuse_existing(path, force=force)
    target = path.resolve()
    unfinished = target.with_name(f".{target.stem}.new{target.suffix}")
    try:
        with claimed(unfinished, path) as handle:
            try:
                yield unfinished
                if path.exists() and not force:
                    raise FileError(
                        f"{path} appeared in the meantime: choose another -o, or use --force"
                    )
                os.fsync(handle)
                unfinished.replace(target)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
        _sync_folder(target.parent)
    except OSError as error:
        raise FileError(f"{path} could not be written: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    """What was renamed in it is so after a power failure, too."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:  # some file systems cannot
            pass
        finally:
            os.close(handle)


@contextmanager
def make_folder(path: Path) -> Iterator[None]:
    """Makes a folder for what the block writes, and takes it away again when the block fails and
    it was not there before. Raises FileError when it cannot be made."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{path} cannot be made: {error.strerror or error}") from error
    try:
        yield
    except BaseException:
        for folder in made:
            try:
                folder.rmdir()
            except OSError:  # something else is in it
                break
        raise
