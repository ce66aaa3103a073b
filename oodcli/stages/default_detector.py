"""The detector of ``score`` without ``-d``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from oodcli import detectors, notes
from oodcli.errors import OodcliError
from oodcli.files.artefact import read_artefact
from oodcli.files.hub import stem_of
from oodcli.stages.chosen import require_same_network
from oodcli.stages.opened import Opened

log = logging.getLogger(__name__)

WITHOUT_DATA = ("c2ir-peak", "trio", "duo")
"""Detectors that are fitted without real images, the strongest first."""


def default_detector(opened: Opened, checkpoint: Path | None) -> str:
    """An artefact that needs no data and is already there; otherwise a detector that needs nothing
    but the checkpoint, for a cache nothing but the logits. checkpoint: None for a cache.

    peak-energy is stronger than 1c-sum on residual networks, but no better than chance on the
    demo's, and nothing here can tell which it is (docs/protocol.md)."""
    for name, artefact in _artefacts(checkpoint):
        reason = _why_not(artefact, name, opened)
        if reason is None:
            notes.say(log, f"no -d, so {artefact}: the strongest that needs no real images")
            return str(artefact)
        notes.say(log, f"left aside: {reason}")
    possible = ("energy", "msp") if opened.fit_reference is None else ("1c-sum", "energy", "msp")
    name = next(each for each in possible if detectors.get(each).needs <= opened.available)
    notes.say(log, f"no -d, so {name}, which needs nothing but the checkpoint")
    return name


def _artefacts(checkpoint: Path | None) -> Iterator[tuple[str, Path]]:
    """Those that are in ``detectors`` of the working directory and beside the checkpoint, the
    strongest first."""
    for name in WITHOUT_DATA:
        places = [Path("detectors", f"{name}.safetensors")]
        if checkpoint is not None:
            beside = checkpoint.parent
            places += [beside / places[0], beside / f"{stem_of(checkpoint)}.{name}.safetensors"]
        yield from ((name, place) for place in dict.fromkeys(places) if place.is_file())


def _why_not(path: Path, name: str, opened: Opened) -> str | None:
    """Why an artefact cannot be the default for these rows, in words; None where it can."""
    try:
        artefact = read_artefact(path)
        made = opened.made
        require_same_network(artefact, made.checkpoint_sha256, made.preprocessing, made.averaged)
    except OodcliError as error:
        return error.text
    if artefact.detector.name != name:
        return f"{path} is an artefact of {artefact.detector.name}, not of {name}"
    lacking = sorted(artefact.detector.score_needs - opened.available)
    return f"{path} needs {', '.join(lacking)}, which is not there" if lacking else None
