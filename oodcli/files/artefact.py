"""Fitted detectors as safetensors: tensors, and metadata that say what they belong to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from oodcli import __version__, detectors
from oodcli.calibration import Calibration
from oodcli.detectors.bank import Bank
from oodcli.detectors.base import Detector
from oodcli.errors import DetectorError, FileError

FORMAT = "oodcli-detector"
VERSION = 1
CALIBRATION = "calibration/"
"""Prefix of the tensors that are not the detector's state."""

BLOCK_BYTES = 1 << 25


@dataclass(frozen=True)
class Artefact:
    """A detector and where it comes from. fitted_on: file, rows, virtual or real, and ``ood``, the
    OOD data that it has learnt from; empty when it needs no fitting. calibrations: ``plain`` and,
    for ``score --mirror``, ``mirror``. threshold: learnt from labelled rows. path: the file that it
    was read from."""

    detector: Detector
    checkpoint_sha256: str
    fitted_on: dict[str, Any]
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    threshold: float | None = None
    path: Path | None = None

    @property
    def saw(self) -> str:
        """The OOD data that the detector has learnt from, in words; empty where there are none."""
        ood = self.fitted_on.get("ood")
        return f"OOD images ({ood})" if ood else ""


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
    _save(tensors, path, metadata)


def read_artefact(path: Path) -> Artefact:
    """Raises FileError when the file is missing, damaged, of a newer version or no artefact."""
    if not path.is_file():
        raise FileError(f"{path} does not exist: 'oodcli fit' makes artefacts")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
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
        banks = {
            name: Bank((shapes[name][0], shapes[name][1]), partial(_blocks, path, name)).settled()
            for name in kind.banks() & shapes.keys()
        }
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in shapes if name not in banks}
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
        return Artefact(
            kind.restore({**tensors, **banks}, json.loads(metadata["hyperparameters"])),
            metadata["checkpoint_sha256"],
            json.loads(metadata["fitted_on"]),
            calibrations,
            float(metadata["threshold"]) if "threshold" in metadata else None,
            path,
        )
    except (KeyError, IndexError, TypeError, ValueError, DetectorError) as error:
        raise FileError(f"{path} is damaged ({error}): fit it again") from error


_DTYPES = {torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.bool: "BOOL"}


def _save(tensors: Mapping[str, Tensor | Bank], path: Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file, written here because the library wants all of it in memory, and a bank
    may be larger. Layout: https://github.com/huggingface/safetensors#format. Raises FileError when
    a bank has other rows than it had."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(tensors, key=lambda name: (-_width(tensors[name]), name)):  # all aligned
        value = tensors[name]
        header[name] = {
            "dtype": _DTYPES[torch.float32 if isinstance(value, Bank) else value.dtype],
            "shape": list(value.shape),
            "data_offsets": [end, end + value.nbytes],
        }
        end += value.nbytes
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with path.open("wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for name in list(header)[1:]:
            value = tensors[name]
            for block in value.blocks() if isinstance(value, Bank) else [value]:
                file.write(block.detach().cpu().contiguous().numpy().tobytes())
        if file.tell() != 8 + len(words) + end:
            raise FileError(f"{path} could not be written: the rows fitted on have changed")


def _width(value: Tensor | Bank) -> int:
    return 4 if isinstance(value, Bank) else value.itemsize


def _blocks(path: Path, name: str) -> Iterator[Tensor]:
    """Rows of a tensor in a file, which is opened anew for each block: while it is open, all that
    was read of it counts as memory in use."""
    with safe_open(path, framework="pt") as file:
        rows, width = file.get_slice(name).get_shape()
    step = max(1, BLOCK_BYTES // (4 * max(width, 1)))
    for start in range(0, rows, step):
        with safe_open(path, framework="pt") as file:
            block = file.get_slice(name)[start : start + step]
        yield block
