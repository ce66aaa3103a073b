"""Fitted detectors as safetensors: tensors, and metadata about their origin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from oodcli import detectors
from oodcli._version import __version__
from oodcli.detectors import serial
from oodcli.detectors.bank import Bank
from oodcli.detectors.base import Detector
from oodcli.detectors.calibration import Calibration
from oodcli.errors import FileError, OodcliError, first_line
from oodcli.networks.preprocessing import Preprocessing

FORMAT = "oodcli-detector"
VERSION = 1
CALIBRATION = "calibration/"
"""Prefix of the tensors that belong to calibrations."""

TENSORS_SHA256 = "tensors_sha256"

BLOCK_BYTES = 1 << 25


@dataclass(frozen=True)
class Artefact:
    """A detector and where it comes from. fitted_on: file, rows and the hash of their list, virtual
    or real, the classes without a row and with only one, and ``ood``, the OOD data that it has
    learnt from; empty when it needs no fitting. calibrations: ``plain`` and, for ``score
    --mirror``, ``mirror``. threshold: learnt from labelled rows. path: the file that it was read
    from. preprocessing: of the images that it was fitted or calibrated on; None in files of before.
    recorded: what else is known of how those rows were made (arch, seed, device, precision,
    averaged, command). command: the command line that made the artefact."""

    detector: Detector
    checkpoint_sha256: str
    fitted_on: dict[str, Any]
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    threshold: float | None = None
    path: Path | None = None
    preprocessing: Preprocessing | None = None
    recorded: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""

    @property
    def saw(self) -> str:
        """The OOD data that the detector has learnt from, as text; empty if none."""
        ood = self.fitted_on.get("ood")
        return f"OOD images ({ood})" if ood else ""

    @property
    def without_rows(self) -> tuple[int, ...]:
        """Classes without a fitting row."""
        return _numbers(self.fitted_on.get("classes_without_rows")) or ()

    @property
    def averaged(self) -> bool:
        """As of a Classifier: the one that those rows were recorded with."""
        return bool(self.recorded.get("averaged", False))


def write_artefact(artefact: Artefact, path: Path) -> None:
    """Write to a path from ``atomic``. Raises OSError if the disk refuses."""
    detector = artefact.detector
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "detector": detector.name,
        "hyperparameters": json.dumps(serial.settings(detector)),
        "checkpoint_sha256": artefact.checkpoint_sha256,
        "fitted_on": json.dumps(artefact.fitted_on),
        "recorded": json.dumps(artefact.recorded),
        "command": artefact.command,
        "oodcli_version": __version__,
        "torch_version": str(torch.__version__),
    }
    tensors = dict(serial.state(detector))
    about: dict[str, dict[str, Any]] = {}
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
        if calibration.without_rows is not None:
            about[view] |= {
                "classes": calibration.classes,
                "classes_without_rows": list(calibration.without_rows),
            }
    if about:
        metadata["calibration"] = json.dumps(about)
    if artefact.threshold is not None:
        metadata["threshold"] = repr(artefact.threshold)
    if artefact.preprocessing is not None:
        metadata["preprocessing"] = json.dumps(artefact.preprocessing.to_dict())
    _save(tensors, path, metadata)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Metadata, and the tensors' shapes. Raises FileError for a file that is missing, damaged, of a
    newer version or not an artefact."""
    if not path.is_file():
        raise FileError(f"{path} does not exist: 'oodcli fit' writes artefacts")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is damaged or not a safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise FileError(f"{path} is not a detector of oodcli: 'oodcli fit' writes these")
    if metadata.get("version") != str(VERSION):
        raise FileError(
            f"{path} has format version {metadata.get('version')}, this oodcli reads {VERSION}: "
            "use a newer oodcli, or fit again"
        )
    return metadata, shapes


def read_artefact(path: Path) -> Artefact:
    """Read a detector. Raises FileError as read_header does, and for contents that do not form a
    detector."""
    metadata, shapes = read_header(path)
    name = metadata.get("detector", "")
    if name and not detectors.is_known(name):
        raise FileError(
            f"{path} holds a '{name}', which this oodcli does not have: if it is your own "
            "detector, give its code in the same command with -d FILE.py:CLASS"
        )
    try:
        kind = detectors.get(metadata["detector"])
        banks = {
            name: Bank((shapes[name][0], shapes[name][1]), partial(_blocks, path, name)).settled()
            for name in serial.banks(kind) & shapes.keys()
        }
        with safe_open(path, framework="pt") as file:
            # Copies, for the last digit of a sum can depend on how a tensor is aligned, and in the
            # file the length of the command line before it would decide that.
            tensors = {name: file.get_tensor(name).clone() for name in shapes if name not in banks}
        calibrations = {
            view: Calibration(
                tensors.pop(f"{CALIBRATION}{view}/scores"),
                tensors.pop(f"{CALIBRATION}{view}/weights"),
                int(about["real"]),
                int(about["virtual"]),
                about["matched_accuracy"],
                int(about.get("classes", 0)),
                _numbers(about.get("classes_without_rows")),
            )
            for view, about in _object(metadata.get("calibration", "{}")).items()
        }
        fitted_on = _object(metadata["fitted_on"])
        _numbers(fitted_on.get("classes_without_rows"))
        return Artefact(
            serial.restore(kind, {**tensors, **banks}, _object(metadata["hyperparameters"])),
            metadata["checkpoint_sha256"],
            fitted_on,
            calibrations,
            float(metadata["threshold"]) if "threshold" in metadata else None,
            path,
            Preprocessing.from_dict(json.loads(metadata["preprocessing"]))
            if "preprocessing" in metadata
            else None,
            _object(metadata.get("recorded", "{}")),
            metadata.get("command", ""),
        )
    except (
        *(SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError),
        *(RuntimeError, OverflowError, OodcliError),
    ) as error:
        reason = first_line(error)
        raise FileError(f"{path} is damaged ({reason}): fit it again") from error


def _numbers(found: Any) -> tuple[int, ...] | None:
    """Raises ValueError or TypeError for anything but a list of numbers; None comes from older
    files."""
    return None if found is None else tuple(int(number) for number in found)


def _object(text: str) -> dict[str, Any]:
    """Raises ValueError for text that is not a JSON object."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, got {type(found).__name__}")
    return found


_DTYPES = {torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.bool: "BOOL"}


def _save(tensors: Mapping[str, Tensor | Bank], path: Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file, written here because the library wants all of it in memory, and a bank
    may be larger. Layout: https://github.com/huggingface/safetensors#format. The metadata get
    ``tensors_sha256``, which is of all bytes after the header. Raises FileError when a bank has
    other rows than it had."""
    digest = hashlib.sha256()
    # The header comes first, so a hash as long as the right one holds its place.
    header: dict[str, Any] = {"__metadata__": {**metadata, TENSORS_SHA256: digest.hexdigest()}}
    end = 0
    for name in sorted(tensors, key=lambda name: (-_width(tensors[name]), name)):  # all aligned
        value = tensors[name]
        header[name] = {
            "dtype": _DTYPES[torch.float32 if isinstance(value, Bank) else value.dtype],
            "shape": list(value.shape),
            "data_offsets": [end, end + value.nbytes],
        }
        end += value.nbytes
    head = _header_bytes(header)
    with path.open("wb") as file:
        file.write(head)
        for name in list(header)[1:]:
            value = tensors[name]
            for block in value.blocks() if isinstance(value, Bank) else [value]:
                data = block.detach().cpu().contiguous().numpy().tobytes()
                digest.update(data)
                file.write(data)
        if file.tell() != len(head) + end:
            raise FileError(f"{path} could not be written: the rows fitted on have changed")
        header["__metadata__"][TENSORS_SHA256] = digest.hexdigest()
        file.seek(0)
        file.write(_header_bytes(header))


def _header_bytes(header: Mapping[str, Any]) -> bytes:
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    return len(words).to_bytes(8, "little") + words


def tensors_sha256(path: Path) -> str:
    """SHA-256 of all bytes after the header, read in blocks."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


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
