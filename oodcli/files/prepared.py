"""The folder of ``oodcli prepare``: what ``score`` uses of it, and the steps that made it.

``prepared.json`` is written last: a folder without it is unfinished. Until then, ``steps.json``
lists the steps that are done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from oodcli._version import __version__
from oodcli.errors import FileError, OodcliError
from oodcli.files.atomic import PREPARED, atomic
from oodcli.files.json_object import read_object
from oodcli.files.origin import Origin
from oodcli.networks.preprocessing import Preprocessing

FORMAT = "oodcli-prepared"
VERSION = 1
NAME, STEPS = PREPARED


@dataclass(frozen=True)
class DoneStep:
    """A step that is done. name: also of its first output, without the suffix. command: the command
    line that does the same. outputs: file name → bytes. key: changes with everything that decides
    the outputs. seconds: how long it ran. facts: what its summary says that is needed later."""

    name: str
    command: str
    outputs: Mapping[str, int]
    key: str
    seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)

    def is_in(self, folder: Path) -> bool:
        """Whether all outputs are there, as long as they were."""
        return all(_size(folder / name) == size for name, size in self.outputs.items())


@dataclass(frozen=True)
class PreparedFolder:
    """A finished folder. default: the detector that ``score`` uses without ``-d``. detectors: name
    → file in the folder; None for one that needs no artefact. accuracy: as ``--accuracy``.
    oodcli_version: of the version that wrote it; empty if unknown. ignored: keys that a later
    version wrote and this one does not read."""

    path: Path
    default: str
    detectors: Mapping[str, str | None]
    checkpoint_sha256: str
    averaged: bool
    preprocessing: Preprocessing
    accuracy: float | None
    steps: Sequence[DoneStep]
    command: str = ""
    oodcli_version: str = field(default=__version__, compare=False)
    ignored: Sequence[str] = field(default=(), compare=False)

    @property
    def origin(self) -> Origin:
        return Origin(self.checkpoint_sha256, self.averaged, self.preprocessing)

    def word(self, detector: str) -> str:
        """The detector as ``-d`` accepts it: the path of its artefact, otherwise its name."""
        file = self.detectors[detector]
        return detector if file is None else str(self.path / file)


def folder_beside(checkpoint: Path) -> Path:
    """The usual folder: ``ckpt.pt`` → ``ckpt.pt.oodcli``, ``FOLDER`` → ``FOLDER.oodcli``."""
    named = checkpoint if checkpoint.name not in ("", "..") else checkpoint.resolve()
    return named.with_name(f"{named.name}.oodcli")


def write_prepared(prepared: PreparedFolder) -> None:
    """Raises FileError if the disk refuses."""
    about = {
        "command": prepared.command,
        "oodcli_version": prepared.oodcli_version,
        "default": prepared.default,
        "detectors": dict(prepared.detectors),
        "checkpoint_sha256": prepared.checkpoint_sha256,
        "averaged": prepared.averaged,
        "preprocessing": prepared.preprocessing.to_dict(),
        "accuracy": prepared.accuracy,
        "steps": [asdict(step) for step in prepared.steps],
    }
    _write(prepared.path / NAME, about)


def write_steps(folder: Path, steps: Mapping[str, DoneStep]) -> None:
    """Write the steps done so far. Raises FileError if the disk refuses."""
    _write(folder / STEPS, {"steps": [asdict(step) for step in steps.values()]})


_KEYS = {
    *("format", "version", "command", "oodcli_version", "default", "detectors", "steps"),
    *("checkpoint_sha256", "averaged", "preprocessing", "accuracy"),
}


def _ignored(found: Mapping[str, Any]) -> list[str]:
    """Keys that ``read_prepared`` does not read."""
    known = {each.name for each in fields(Preprocessing)}
    inner = found["preprocessing"].keys() - known
    return sorted(found.keys() - _KEYS) + sorted(f"preprocessing.{name}" for name in inner)


def _write(path: Path, about: Mapping[str, Any]) -> None:
    whole = {"format": FORMAT, "version": VERSION, **about}
    with atomic(path, force=True) as unfinished:
        unfinished.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read_prepared(folder: Path) -> PreparedFolder | None:
    """A finished folder; None for an unfinished one. Raises FileError for a damaged or newer
    one."""
    found = _read(folder / NAME)
    if found is None:
        return None
    try:
        detectors = {
            str(name): None if file is None else _plain(file)
            for name, file in found["detectors"].items()
        }
        accuracy = found.get("accuracy")
        prepared = PreparedFolder(
            folder,
            str(found["default"]),
            detectors,
            str(found["checkpoint_sha256"]),
            bool(found.get("averaged", False)),
            Preprocessing.from_dict(found["preprocessing"]),
            None if accuracy is None else float(accuracy),
            _steps(found),
            str(found.get("command", "")),
            str(found.get("oodcli_version", "")),
            _ignored(found),
        )
        prepared.word(prepared.default)
    except (LookupError, TypeError, ValueError, AttributeError, OodcliError) as error:
        raise _damaged(folder / NAME) from error
    return prepared


def read_steps(folder: Path) -> dict[str, DoneStep] | None:
    """Steps that are done, by name; None for a folder that prepare has not begun. Raises FileError
    as read_prepared does."""
    for name in (STEPS, NAME):
        found = _read(folder / name)
        if found is not None:
            try:
                return {step.name: step for step in _steps(found)}
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise _damaged(folder / name) from error
    return None


def _steps(found: Mapping[str, Any]) -> list[DoneStep]:
    return [
        DoneStep(
            str(step["name"]),
            str(step["command"]),
            {_plain(name): int(size) for name, size in step["outputs"].items()},
            str(step["key"]),
            float(step["seconds"]),
            dict(step.get("facts", {})),
        )
        for step in found["steps"]
    ]


def _plain(name: Any) -> str:
    """Raises ValueError for what is not the name of a file in the folder."""
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"{name!r} is not a file name")
    return name


def _read(path: Path) -> dict[str, Any] | None:
    again = "prepare again with --force"
    return read_object(path, FORMAT, VERSION, damaged=_damaged(path).text, again=again)


def _damaged(path: Path) -> FileError:
    return FileError(f"{path} is damaged: run 'oodcli prepare' again with --force")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
