"""What a file is, by its content, how it was made and what is in it."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from oodcli.errors import FileError
from oodcli.files.atomic import JOB, PREPARED
from oodcli.files.foreign import foreign

if TYPE_CHECKING:
    from oodcli.files.hdf5 import Provenance

Kind: TypeAlias = Literal[
    "checkpoint",
    "virtual",
    "features",
    "detector",
    "scores.csv",
    "scores.jsonl",
    "scores.parquet",
    "metrics.csv",
    "metrics.json",
    "partial",
    "prepared",
]

CHECKPOINTS = (".pt", ".pth", ".th", ".bin", ".safetensors", ".pt2", ".onnx")

HDF5 = b"\x89HDF\r\n\x1a\n"
START_BYTES = 1 << 16
"""As much of a file as must be seen to know it; the header of a safetensors file may be longer."""
HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""


def kind_of(path: Path) -> Kind:
    """What a file is. A checkpoint needs nothing imported for that. Raises FileError when it is
    none of these, or cannot be read."""
    if (path / JOB).is_file():
        return "partial"
    if any((path / name).is_file() for name in PREPARED):
        return "prepared"
    if path.is_dir():
        return "checkpoint"  # of a model hub, or its loader says what is missing
    try:
        with path.open("rb") as file:
            start = file.read(START_BYTES)
            size = file.seek(0, 2)
            length = int.from_bytes(start[:8], "little")
            header = b""
            if start[8:9] == b"{" and 8 + length <= min(size, HEADER_BYTES):  # safetensors
                file.seek(8)
                header = file.read(length)
    except OSError as error:
        if path.suffix in CHECKPOINTS:
            return "checkpoint"  # whose loader says what is wrong
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    found: Kind | None = (
        _of_hdf5(path)
        if start.startswith(HDF5)
        else _of_safetensors(header)
        if header
        else _of_text(path, start)
    )
    if not size and path.suffix == ".jsonl":  # no row
        found = "scores.jsonl"
    if found is None and start.startswith(b"PAR1"):
        found = "scores.parquet"
    # A zip archive or a pickle is for the loader of checkpoints to judge, as is a damaged file
    # whose name says that it was one.
    if found is None and (start.startswith((b"PK", b"\x80")) or path.suffix in CHECKPOINTS):
        found = "checkpoint"
    if found is None and (what := foreign(path)):
        raise FileError(f"{path} is {what}")
    if found is None:
        raise FileError(
            f"{path} is no checkpoint, virtual images, feature cache, detector, scores, metrics or "
            "partial file: oodcli can tell nothing about it"
        )
    return found


def _of_hdf5(path: Path) -> Kind | None:
    from oodcli.files import cache, virtual
    from oodcli.files.hdf5 import format_of

    found = format_of(path)
    if found is None:
        raise FileError(f"{path} is a truncated or damaged HDF5 file: make it again")
    kinds: dict[str, Kind] = {virtual.FORMAT: "virtual", cache.FORMAT: "features"}
    return kinds.get(found)


def _of_safetensors(header: bytes) -> Kind | None:
    try:
        metadata = json.loads(header).get("__metadata__")
    except (ValueError, AttributeError, RecursionError):
        return None
    from oodcli.files.artefact import FORMAT

    ours = isinstance(metadata, dict) and metadata.get("format") == FORMAT
    return "detector" if ours else "checkpoint"


def _of_text(path: Path, start: bytes) -> Kind | None:
    try:
        text = start.decode("utf-8-sig", "ignore" if len(start) == START_BYTES else "strict")
    except UnicodeDecodeError:
        return None
    first = text.partition("\n")[0]
    if text.startswith("{"):
        if '"format": "oodcli-metrics"' in text:
            return "metrics.json"
        if '"format": "oodcli-scores"' in text:
            raise FileError(
                f"{path} says how {path.stem} was made: 'oodcli inspect {path.with_suffix('')}'"
            )
        try:
            return "scores.jsonl" if json.loads(first).keys() >= _LEADING else None
        except (ValueError, RecursionError):
            return None
    try:
        header = set(next(csv.reader([first]), ()))
    except csv.Error:  # a zip archive may look like text to this point
        return None
    if header >= {"detector", "set", "metric", "value"}:
        return "metrics.csv"
    return "scores.csv" if header >= _LEADING else None


_LEADING = {"path", "label", "predicted", "confidence"}


def describe_file(path: Path, kind: Kind) -> dict[str, Any]:
    """How a file other than a checkpoint was made and what is in it, as JSON can hold it. Raises
    FileError when it is damaged."""
    what, _, suffix = kind.partition(".")
    about = {
        "virtual": _virtual,
        "features": _features,
        "detector": _detector,
        "scores": _scores,
        "metrics": _metrics,
        "partial": _partial,
        "prepared": _prepared,
    }[what]
    return {"file": str(path), "kind": kind, **about(path, suffix)}


def _made(provenance: Provenance, rows_sha256: str | None) -> dict[str, Any]:
    found = asdict(provenance)
    found["preprocessing"] = provenance.preprocessing.to_dict()
    return {**found, "rows_sha256": rows_sha256}


def _virtual(path: Path, _: str) -> dict[str, Any]:
    from oodcli.files import hdf5, virtual

    with hdf5.reading(path, virtual.FORMAT, virtual.MADE_BY) as file, hdf5.damage(path):
        images = hdf5.dataset(file, "images", "f", by_rows=True)
        labels = hdf5.dataset(file, "label", "iu")[()]
        return {
            "made": _made(hdf5.Provenance.read(file), file.attrs.get(hdf5.ROWS_SHA256)),
            "rows": len(images),
            "unreadable": 0,
            "labelled": int((labels >= 0).sum()),
            "image": list(images.shape[1:]),
            "records": {
                f"layers/{name}/sensitivity": rows.shape[1]
                for name, rows in virtual.sensitivities(file).items()
            },
            "settings": json.loads(file.attrs.get("settings", "{}")),
            "quality": json.loads(file.attrs.get("quality", "{}")),
        }


def _features(path: Path, _: str) -> dict[str, Any]:
    from oodcli.files.cache import open_cache

    unreadable = labelled = 0
    with open_cache(path) as cache:
        for _paths, labels, errors in cache.listing():
            unreadable += sum(map(bool, errors))
            labelled += int((labels >= 0).sum())
        return {
            "made": _made(cache.provenance, cache.rows_sha256),
            "rows": cache.count,
            "unreadable": unreadable,
            "labelled": labelled,
            "recorded": sorted(cache.recorded),
            "records": cache.widths,
        }


def _detector(path: Path, _: str) -> dict[str, Any]:
    from oodcli.files.artefact import CALIBRATION, TENSORS_SHA256, read_header

    metadata, shapes = read_header(path)
    try:
        recorded = json.loads(metadata.get("recorded", "{}"))
        return {
            "detector": metadata["detector"],
            "hyperparameters": json.loads(metadata["hyperparameters"]),
            "made": {
                "command": metadata.get("command"),
                "oodcli_version": metadata.get("oodcli_version"),
                "torch_version": metadata.get("torch_version"),
                "checkpoint_sha256": metadata["checkpoint_sha256"],
                "arch": recorded.get("arch"),
                "averaged": bool(recorded.get("averaged", False)),
                "preprocessing": json.loads(metadata.get("preprocessing", "null")),
                "tensors_sha256": metadata.get(TENSORS_SHA256),
            },
            "recorded": recorded,
            "fitted_on": json.loads(metadata["fitted_on"]),
            "calibration": json.loads(metadata.get("calibration", "{}")),
            "threshold": float(metadata["threshold"]) if "threshold" in metadata else None,
            "tensors": {
                name: shape for name, shape in shapes.items() if not name.startswith(CALIBRATION)
            },
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FileError(f"{path} is damaged ({error}): fit it again") from error


def _scores(path: Path, suffix: str) -> dict[str, Any]:
    from oodcli.files.scores import Format, read_scores

    kind: Format = next(each for each in get_args(Format) if each == suffix)
    scores = read_scores(path, kind)
    return {
        "made": scores.made,
        "rows": len(scores.paths),
        "unreadable": scores.unreadable,
        "labelled": sum(map(bool, scores.labels)),
        "columns": list(scores.columns),
        "detectors": list(scores.detectors),
        "verdicts": {
            name: {"ood": count, "basis": basis} for name, (count, basis) in scores.verdicts.items()
        },
        "unjudged": {name: int(rows.sum()) for name, rows in scores.unjudged.items()},
        "saw_ood": dict(scores.saw),
    }


def _metrics(path: Path, suffix: str) -> dict[str, Any]:
    try:
        if suffix == "csv":
            with path.open(encoding="utf-8-sig", newline="") as stream:
                rows = list(csv.DictReader(stream, strict=True))
            return {"rows": len(rows), **_named(rows)}
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            "made": {name: found.get(name) for name in ("command", "oodcli_version")}
            | {"seed": found["interval"]["seed"]},
            "rows": len(found["metrics"]),
            **_named(found["metrics"]),
            "resamples": found["interval"]["resamples"],
            "counts": found["counts"],
            "notes": found["notes"],
        }
    except (OSError, KeyError, TypeError, ValueError, RecursionError, csv.Error) as error:
        raise FileError(f"{path} is damaged ({error}): evaluate again") from error


def _partial(path: Path, _: str) -> dict[str, Any]:
    from oodcli.jobs.kept import read_about

    about, rows = read_about(path)
    return {**about._asdict(), "rows": rows}


def _prepared(path: Path, _: str) -> dict[str, Any]:
    from oodcli.files.prepared import read_prepared, read_steps

    found = read_prepared(path)
    steps = found.steps if found else (read_steps(path) or {}).values()
    about: dict[str, Any] = {"finished": found is not None}
    if found is not None:
        about |= {
            "made": {
                "command": found.command,
                "oodcli_version": found.oodcli_version,
                "checkpoint_sha256": found.checkpoint_sha256,
                "averaged": found.averaged,
                "preprocessing": found.preprocessing.to_dict(),
            },
            "detector": found.default,
            "detectors": dict(found.detectors),
            "accuracy": found.accuracy,
        }
    return about | {"steps": [asdict(step) for step in steps]}


def _named(rows: list[dict[str, str]]) -> dict[str, Any]:
    """The detectors, sets and metrics of a table, each once, in order."""
    return {
        f"{key}s": list(dict.fromkeys(row[key] for row in rows))
        for key in ("detector", "set", "metric")
    }
