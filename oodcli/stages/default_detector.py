"""The default detector of ``score``."""

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
"""Detectors fitted without real images, the strongest first."""


def default_detector(opened: Opened, checkpoint: Path | None) -> str:
    """An existing artefact that needs no real images; otherwise a detector that needs only the
    checkpoint, or for a cache only its rows. checkpoint: None for a cache.

    peak-energy is stronger than 1c-sum on residual networks, but no better than chance on the
    demo's network, and nothing here can tell which case holds (docs/research/protocol.md). Without
    BatchNorm there is no 1c-sum, and peak-energy was better than energy on every network
    (docs/research/without-batchnorm.md).
    """
    if "multi-label" in opened.available:
        notes.say(log, "no -d: using joint-energy, which is for networks with several labels")
        return "joint-energy"
    for name, artefact in _artefacts(checkpoint):
        reason = _why_not(artefact, name, opened)
        if reason is None:
            notes.say(log, f"no -d: using {artefact}, the strongest detector without real images")
            return str(artefact)
        notes.say(log, f"not used: {reason}")
    if "batchnorm.running" not in opened.available:
        strongest = "peak-energy"
    else:
        strongest = "energy" if opened.fit_reference is None else "1c-sum"
    possible = (strongest, "energy", "msp")
    name = next(each for each in possible if detectors.get(each).needs <= opened.available)
    notes.say(log, f"no -d: using {name}, which needs only the checkpoint")
    return name


def _artefacts(checkpoint: Path | None) -> Iterator[tuple[str, Path]]:
    """Artefacts in ``detectors`` of the working directory and beside the checkpoint, the strongest
    first."""
    for name in WITHOUT_DATA:
        places = [Path("detectors", f"{name}.safetensors")]
        if checkpoint is not None:
            beside = checkpoint.parent
            places += [beside / places[0], beside / f"{stem_of(checkpoint)}.{name}.safetensors"]
        yield from ((name, place) for place in dict.fromkeys(places) if place.is_file())


def _why_not(path: Path, name: str, opened: Opened) -> str | None:
    """Reason why an artefact cannot be the default for these rows; None if it can."""
    try:
        artefact = read_artefact(path)
        made = opened.made
        require_same_network(artefact, made.checkpoint_sha256, made.preprocessing, made.averaged)
    except OodcliError as error:
        return error.text
    if artefact.detector.name != name:
        return f"{path} is an artefact of {artefact.detector.name}, not of {name}"
    lacking = sorted(artefact.detector.score_needs - opened.available)
    return f"{path} needs {', '.join(lacking)}, which is missing" if lacking else None
