"""Fitted detectors as safetensors: tensors, and metadata that say what they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from oodcli import __version__, detectors
from oodcli.calibration import Calibration
from oodcli.detectors.base import Detector
from oodcli.errors import DetectorError, FileError

FORMAT = "oodcli-detector"
VERSION = 1
CALIBRATION = "calibration/"
"""Prefix of the tensors that are not the detector's state."""


@dataclass(frozen=True)
class Artefact:
    """A detector and where it comes from. fitted_on: file, rows, virtual or real; empty when it
    needs no fitting. calibrations: ``plain`` and, for ``score --mirror``, ``mirror``. threshold:
    learnt from labelled rows. path: the file that it was read from."""

    detector: Detector
    checkpoint_sha256: str
    fitted_on: dict[str, Any]
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    threshold: float | None = None
    path: Path | None = None


def write_artefact(artefact: Artefact, path: Path) -> None:
    """Writes where ``atomic`` says. Raises OSError when the disk refuses."""
    detector = artefact.detector
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "detector": detector.name,
        "hyperparameters": json.dumps(detector.settings()),
        "checkpoint_sha256": artefact.checkpoint_sha256,
        "fitted_on": json.dumps(artefact.fitted_on),
        "oodcli_version": __version__,
    }
    tensors = dict(detector.state())
    about = {}
    for view, calibration in artefact.calibrations.items():
        tensors |= {
            f"{CALIBRATION}{view}/scores": calibration.scores,
            f"{CALIBRATION}{view}/weights": calibration.weights,
        }
        about[view] = {
            "real": calibration.real,
            "virtual": calibration.virtual,
            "matched_accuracy": calibration.matched_accuracy,
            "words": calibration.words,
        }
    if about:
        metadata["calibration"] = json.dumps(about)
    if artefact.threshold is not None:
        metadata["threshold"] = repr(artefact.threshold)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def read_artefact(path: Path) -> Artefact:
    """Raises FileError when the file is missing, damaged, of a newer version or no artefact."""
    if not path.is_file():
        raise FileError(f"{path} does not exist: 'oodcli fit' makes artefacts")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is damaged or no safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise FileError(f"{path} is no detector of oodcli: 'oodcli fit' makes them")
    if metadata.get("version") != str(VERSION):
        raise FileError(
            f"{path} has format version {metadata.get('version')}, this oodcli reads {VERSION}: "
            "use a newer oodcli, or fit again"
        )
    try:
        calibrations = {
            view: Calibration(
                tensors.pop(f"{CALIBRATION}{view}/scores"),
                tensors.pop(f"{CALIBRATION}{view}/weights"),
                int(about["real"]),
                int(about["virtual"]),
                about["matched_accuracy"],
            )
            for view, about in json.loads(metadata.get("calibration", "{}")).items()
        }
        kind = detectors.get(metadata["detector"])
        return Artefact(
            kind.restore(tensors, json.loads(metadata["hyperparameters"])),
            metadata["checkpoint_sha256"],
            json.loads(metadata["fitted_on"]),
            calibrations,
            float(metadata["threshold"]) if "threshold" in metadata else None,
            path,
        )
    except (KeyError, TypeError, ValueError, DetectorError) as error:
        raise FileError(f"{path} is damaged ({error}): fit it again") from error
