"""What ``score`` uses of a folder that ``oodcli prepare`` made."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

from oodcli import detectors, notes
from oodcli._version import __version__
from oodcli.errors import FileError, OodcliError
from oodcli.files.artefact import read_header
from oodcli.files.origin import Words
from oodcli.files.prepared import PreparedFolder, folder_beside, read_prepared
from oodcli.stages.chosen import is_artefact
from oodcli.stages.opened import Opened

log = logging.getLogger(__name__)

AGAIN = "run 'oodcli prepare' again, or choose detectors with -d"


def with_prepared(
    wanted: Sequence[str], given: Collection[str], opened: Opened, checkpoint: Path | None
) -> list[str]:
    """The words of ``-d`` with artefacts of the prepared folder: its default for none and for the
    folder itself, the artefact of a name, and all of them for ``all``. Empty if none is wanted and
    nothing is prepared. given: detectors with hyper-parameters, which stay names. checkpoint: None
    for a cache.

    Raises FileError for a folder of another network, and for one that is given but not finished.
    """
    folders = {word: _given(Path(word), opened) for word in wanted if _is_folder(word)}
    if folders:
        *_, prepared = folders.values()
    else:
        found = _beside(checkpoint, opened, required=not wanted)
        if found is None:
            return list(wanted)
        prepared = found
    if not wanted:
        word = prepared.word(prepared.default)
        notes.say(log, f"no -d: using {word}, as {prepared.path} is prepared")
        return [word]
    words: list[str] = []
    named: list[str] = []
    for word in wanted:
        if word in folders:
            words.append(folders[word].word(folders[word].default))
        elif word == "all":
            words += [*_others(prepared, wanted, words, given), word]
        elif word in given or prepared.detectors.get(word) is None:
            words.append(word)
        else:
            words.append(prepared.word(word))
            named.append(word)
    if named:
        notes.say(log, f"{', '.join(named)}: as prepared in {prepared.path}")
    return list(dict.fromkeys(words))


def _is_folder(word: str) -> bool:
    return word not in (*detectors.names(), "all") and not is_artefact(word) and Path(word).is_dir()


def _given(folder: Path, opened: Opened) -> PreparedFolder:
    prepared = _read(folder)
    if prepared is None:
        raise FileError(
            f"{folder} is not a prepared folder: run 'oodcli prepare' to make or finish one"
        )
    _require_same(prepared, opened)
    return prepared


def _beside(checkpoint: Path | None, opened: Opened, *, required: bool) -> PreparedFolder | None:
    """The folder beside a checkpoint. required: raise an error for one of another network, instead
    of a note."""
    folder = None if checkpoint is None else folder_beside(checkpoint)
    if folder is None or not folder.is_dir():
        return None
    try:
        prepared = _read(folder)
        if prepared is None:
            notes.say(log, f"not used: {folder} is unfinished: 'oodcli prepare' resumes it")
            return None
        _require_same(prepared, opened)
    except OodcliError as error:
        if required:
            raise
        notes.say(log, f"not used: {error.text}")
        return None
    return prepared


def _read(folder: Path) -> PreparedFolder | None:
    prepared = read_prepared(folder)
    if prepared is not None and prepared.ignored:
        notes.say(
            log,
            f"{folder} was prepared by oodcli {prepared.oodcli_version or 'of another version'}; "
            f"this is {__version__}, which ignores the keys {', '.join(prepared.ignored)}",
        )
    return prepared


def _require_same(prepared: PreparedFolder, opened: Opened) -> None:
    """Raises FileError for a folder of another checkpoint, weights or preprocessing."""
    words = Words(
        f"{prepared.path} was prepared for",
        "this is",
        weights="these are",
        inputs=(f"{prepared.path} was prepared for images with", "here with"),
        hint=AGAIN,
        inputs_hint=AGAIN,
    )
    prepared.origin.require_same(opened.made.origin, words)


def _others(
    prepared: PreparedFolder, wanted: Sequence[str], words: Sequence[str], given: Collection[str]
) -> list[str]:
    """All artefacts of the folder but those of detectors that are given in another way."""
    other = {read_header(Path(word))[0].get("detector") for word in wanted if is_artefact(word)}
    return [
        prepared.word(name)
        for name, file in prepared.detectors.items()
        if file is not None and name not in other and name not in given
    ]
