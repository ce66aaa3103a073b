"""Files appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oodcli.errors import FileError


def refuse_existing(path: Path, *, force: bool = False) -> None:
    """Ask this before hours of work. Raises FileError when ``path`` exists, is a folder or a
    device, or its folder does not exist or cannot be written."""
    try:
        exists = path.exists()
    except OSError as error:  # a name that is too long
        raise FileError(f"{path} cannot be written: {error.strerror}") from error
    if path.is_dir():
        raise FileError(f"{path} is a folder, expected a file: choose another -o")
    if exists and not path.is_file():
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
def atomic(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; moves it into place when the block ends well and
    removes it when anything is raised. A symbolic link stays, what it points to is replaced. Raises
    FileError as refuse_existing does, and when the disk refuses."""
    refuse_existing(path, force=force)
    target = path.resolve()
    try:
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.stem[:40]}.partial-", suffix=target.suffix
        )
    except OSError as error:
        raise FileError(f"{path} could not be written: {error.strerror or error}") from error
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        if path.exists() and not force:
            raise FileError(f"{path} appeared in the meantime: choose another -o, or use --force")
        partial.chmod(0o666 & ~_umask())
        partial.replace(target)
    except OSError as error:
        raise FileError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
