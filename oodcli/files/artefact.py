"""Fitted detectors as safetensors: tensors, and metadata that say what they belong to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from oodcli import __version__, detectors
from oodcli.detectors.base import Detector
from oodcli.errors import DetectorError, FileError

FORMAT = "oodcli-detector"
VERSION = 1


@dataclass(frozen=True)
class Artefact:
    """A fitted detector and where it comes from. fitted_on: file, rows, virtual or real."""

    detector: Detector
    checkpoint_sha256: str
    fitted_on: dict[str, Any]


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
    tensors = {name: tensor.contiguous() for name, tensor in detector.state().items()}
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
        kind = detectors.get(metadata["detector"])
        detector = kind.restore(tensors, json.loads(metadata["hyperparameters"]))
        return Artefact(detector, metadata["checkpoint_sha256"], json.loads(metadata["fitted_on"]))
    except (KeyError, TypeError, ValueError, DetectorError) as error:
        raise FileError(f"{path} is damaged ({error}): fit it again") from error
