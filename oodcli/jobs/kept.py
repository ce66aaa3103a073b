"""The finished batches of a job, stored beside its output so that the same command can resume.

``OUTPUT.partial`` is a folder. ``job.json`` in it says what the job is; each finished batch is a
file, ``000012.safetensors``, named for its number. ``atomic`` writes all of them, so a batch is
there or not. Batches may come in any order, from several processes and more than once: the output
is made from them by number.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from oodcli.errors import FileError, OodcliError
from oodcli.files.atomic import JOB, atomic, claimed, refuse_existing
from oodcli.jobs.torchrun import Team

log = logging.getLogger(__name__)

FORMAT = "oodcli-partial 2"
_OLDER = b"oodcli-partial 1"
"""First bytes of the one file that was here before there was a folder."""
_LOCK = "lock"
_BATCH = re.compile(r"([0-9]{6,})(?:-([0-9]{6,}))?\.safetensors")
_OURS = re.compile(r"\.?(job|[0-9-]+)(\.new)?\.(json|safetensors)")
"""Files of a job, finished or not."""

_SEE = (
    "processes on several hosts need an output where all of them see it, or --shard and 'oodcli "
    "merge'"
)

Number = tuple[int, ...]
"""A batch's place in the whole job: its number, or those of a cluster's piece and of the batch in
it."""

Block = TypeVar("Block")


class Stored(NamedTuple):
    """A batch as it is stored. arrays: any, by name. words: what JSON can hold."""

    rows: int
    arrays: Mapping[str, NDArray[Any]]
    words: Mapping[str, Any]


class About(NamedTuple):
    """What a job is. command: the line that started it. job: settings by the names that users know
    them by. decided: what the job found out at its start, such as a batch size that fits. complete:
    the output was about to be moved into place."""

    command: str
    job: dict[str, Any]
    decided: dict[str, Any]
    complete: bool = False


class Kept:
    """The stored batches of an output; ``kept_work`` opens them.

    about: the job, as it was started. ``about.decided`` may be filled until a batch is stored.
    numbers: of the batches that are stored. leads: this process writes ``job.json``.
    """

    def __init__(self, path: Path, about: About, *, leads: bool) -> None:
        self.path = path
        self.about = about
        self.numbers = _numbers(path)
        self._leads = leads

    def rows(self, number: Number) -> int:
        """How many rows a stored batch has. Raises FileError as ``read`` does."""
        return _read(self._batch(number), _rows)

    def read(self, number: Number, restore: Callable[[Stored], Block]) -> Block:
        """A batch, as ``restore`` makes it of what was stored. Raises FileError when it is missing
        or damaged."""
        return _read(self._batch(number), lambda file: restore(_stored(file)))

    def write(self, number: Number, batch: Stored) -> None:
        """Stores a batch. Raises FileError when the disk refuses; earlier batches stay."""
        if self._leads and not self.numbers:
            self._describe()
        arrays = {name: np.ascontiguousarray(array) for name, array in batch.arrays.items()}
        metadata = {"rows": str(batch.rows), "words": json.dumps(batch.words)}
        with atomic(self._batch(number), force=True) as unfinished:
            unfinished.write_bytes(safetensors.numpy.save(arrays, metadata))
        self.numbers.add(number)

    def finish(self, *outputs: Path, force: bool) -> None:
        """The outputs are written and will be moved into place: from here on, the same command may
        overwrite them. Raises FileError as ``refuse_existing`` does."""
        for output in outputs:
            refuse_existing(output, force=force)
        if self.numbers:
            self.about = self.about._replace(complete=True)
            self._describe()

    def clear(self) -> None:
        """Discards all batches, then what the job was. Raises FileError when the disk refuses."""
        try:
            ours = [path for path in self.path.iterdir() if _OURS.fullmatch(path.name)]
            for path in sorted(ours, key=lambda path: path.name == JOB):
                path.unlink()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self.numbers.clear()

    def close(self, *, done: bool) -> None:
        """Removes the folder when the job is done, or when nothing is stored."""
        self.numbers = _numbers(self.path)  # other processes of a team have stored some
        if self.numbers and not done:
            if not (self.path / JOB).exists():
                self._describe()
            rows = sum(map(self.rows, self.numbers))
            log.info("%d images saved in %s; re-run the same command to resume", rows, self.path)
            return
        try:
            self.clear()
            (self.path / _LOCK).unlink()
            self.path.rmdir()
        except (FileError, OSError) as error:
            log.info("%s can be deleted: oodcli failed to (%s)", self.path, error)

    def _batch(self, number: Number) -> Path:
        return self.path / _name(number)

    def _describe(self) -> None:
        text = json.dumps({"format": FORMAT, **self.about._asdict()}, indent=1)
        with atomic(self.path / JOB, force=True) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


@contextmanager
def kept_work(
    output: Path,
    job: Mapping[str, Any],
    command: str,
    *,
    restart: bool = False,
    team: Team | None = None,
) -> Iterator[Kept]:
    """The stored batches of an output. When the block ends well, they are removed; when anything is
    raised, they stay for the next time.

    job: everything that decides what will be in the output, by the names that users know it by.
    restart: discards what is stored. team: processes that do the job together; the first one owns
    the folder. Raises FileError when another process is writing the output, and when the batches
    are of another job, naming the difference; OodcliError when a process of the team has another
    job than the first one.
    """
    path = partial_path(output)
    mine = About(command, json.loads(json.dumps(job)), {})
    if team is not None and not team.leads:
        _require_alike(team.hear("job"), mine.job)
        _require_shared(path)
        yield Kept(path, mine, leads=False)
        return
    with ExitStack() as stack:
        try:
            _make(path, restart=restart)
            stack.enter_context(claimed(path / _LOCK, output))
        except OSError as error:
            raise _unwritable(path, error) from error
        about = None if restart else _about(path)
        kept = Kept(path, about or mine, leads=True)
        if about is None:
            kept.clear()
        else:
            _require_same(path, about.job, mine.job)
        if kept.numbers:
            log.info("resuming: %d images saved in %s", sum(map(kept.rows, kept.numbers)), path)
        if team is not None:
            team.say("job", mine.job)
        done = False
        try:
            yield kept
            done = True
        finally:
            kept.close(done=done)


def partial_path(output: Path) -> Path:
    """The folder of an output's batches: beside the file that a symbolic link points to."""
    target = output.resolve() if output.is_symlink() else output
    return target.with_name(f"{target.name}.partial")


def refuse_output(output: Path, *, force: bool = False) -> None:
    """As ``refuse_existing``, but an output may be there that its own job has completed: that was
    killed before it could remove the batches."""
    refuse_existing(output, force=force or is_complete(output))


def is_complete(output: Path) -> bool:
    """Whether an output is, or was about to be, in place, while its batches are still there."""
    try:
        about = _about(partial_path(output))
    except FileError:
        return False
    return about is not None and about.complete


def read_about(path: Path) -> tuple[About, int]:
    """What the job of a folder is, and how many rows are stored. Raises FileError when that is no
    folder of batches, or damaged."""
    about = _about(path)
    if about is None:
        raise FileError(f"{path} has no {JOB}: nothing can be resumed from it, so delete it")
    return about, sum(_read(path / _name(number), _rows) for number in _numbers(path))


def _make(path: Path, *, restart: bool) -> None:
    """Makes the folder. Raises FileError when something else is in its place, or in it."""
    if path.is_file():
        with path.open("rb") as file:
            older = file.read(len(_OLDER)) == _OLDER
        if older and not restart:
            raise FileError(
                f"{path} was written by an older version of oodcli: resume with that version, or "
                "discard it with --restart"
            )
        if not older:
            raise FileError(f"{path} was not written by oodcli: move it away first")
        path.unlink()
    path.mkdir(exist_ok=True)
    for each in path.iterdir():
        if each.name != _LOCK and not _OURS.fullmatch(each.name):
            raise FileError(f"{each} was not written by oodcli: move it away first")


def _require_shared(path: Path) -> None:
    """Raises FileError where the first process of the team has made the folder on another disk."""
    path.mkdir(exist_ok=True)
    if not (path / _LOCK).exists():
        path.rmdir()
        raise FileError(f"{path} is not the folder of the first process: {_SEE}")


def _numbers(path: Path) -> set[Number]:
    """Of the batches in a folder; none where there is no folder."""
    found = map(_BATCH.fullmatch, (each.name for each in path.iterdir()) if path.exists() else ())
    return {tuple(int(part) for part in match.groups() if part) for match in found if match}


def _name(number: Number) -> str:
    return "-".join(f"{part:06d}" for part in number) + ".safetensors"


def _about(path: Path) -> About | None:
    """What the job of a folder is; None where nothing says it."""
    try:
        found = json.loads((path / JOB).read_text(encoding="utf-8"))
        if found.pop("format") != FORMAT:
            raise FileError(
                f"{path} was written by another version of oodcli: resume with that version, or "
                "discard it with --restart"
            )
        about = About(**found)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise _damaged(path / JOB) from error
    if not isinstance(about.job, dict) or not isinstance(about.decided, dict):
        raise _damaged(path / JOB)
    return about


def _read(path: Path, look: Callable[[Any], Block]) -> Block:
    """What ``look`` finds in a batch's file."""
    try:
        with safe_open(path, "np") as file:
            return look(file)
    except FileNotFoundError as error:
        raise FileError(f"{path} is missing: {_SEE}") from error
    except (
        *(SafetensorError, LookupError, ValueError, TypeError, AttributeError),
        *(RuntimeError, OverflowError),
    ) as error:
        raise _damaged(path) from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error


def _rows(file: Any) -> int:
    return int(file.metadata()["rows"])


def _stored(file: Any) -> Stored:
    names = file.keys()
    arrays = {name: file.get_tensor(name) for name in names}
    return Stored(_rows(file), arrays, json.loads(file.metadata()["words"]))


def _require_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, was, is_now in _differences(before, now):
        raise FileError(
            f"{path} was started with {name} {was}, but now it is {is_now}: re-run the command "
            "that started it to resume, use --restart to discard it, or choose another -o"
        )


def _require_alike(first: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Of two processes of a team, whose devices may differ."""
    device = {"--device": None}
    for name, theirs, ours in _differences({**first, **device}, {**mine, **device}):
        raise OodcliError(
            f"the first process of torchrun has {name} {theirs}, but this one {ours}: give all of "
            "them the same files and options"
        )


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            yield name, _shown(before.get(name)), _shown(now.get(name))


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _unwritable(path: Path, error: OSError) -> FileError:
    return FileError(f"{path} could not be written: {error.strerror or error}")


def _damaged(path: Path) -> FileError:
    return FileError(
        f"{path} is damaged: delete it to redo its part, or use --restart to discard everything"
    )
