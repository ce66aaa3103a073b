"""Metadata of a scores file, in ``SCORES.json`` beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, cast

from oodcli.errors import FileError
from oodcli.files.hashes import file_sha256
from oodcli.files.json_object import read_object
from oodcli.files.origin import Words, require_same_weights

FORMAT = "oodcli-scores"
VERSION = 1
SHA256 = "scores_sha256"


def made_path(scores: Path) -> Path:
    """``s.csv`` → ``s.csv.json``, beside the file that a symbolic link points to."""
    target = scores.resolve() if scores.is_symlink() else scores
    return target.with_name(f"{target.name}.json")


def write_made(made: Mapping[str, Any], scores: Path, path: Path) -> None:
    """Write to a path from ``atomic``. made: metadata that JSON can hold. scores: the finished
    file, whose SHA-256 is added. Raises OSError if the disk refuses."""
    about = {"format": FORMAT, "version": VERSION, **made, SHA256: file_sha256(scores)}
    path.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_made(scores: Path) -> dict[str, Any] | None:
    """Metadata of a scores file; None without a file beside it. Raises FileError if that file is
    damaged, or of a newer version."""
    path = made_path(scores)
    damaged = f"{path} does not describe {scores.name}: move it away"
    found = read_object(path, FORMAT, VERSION, damaged=damaged, again="score again")
    if found is None:
        return None
    found.setdefault("calibration", {})
    wrong = [name for name, kind in _KINDS.items() if not isinstance(found.get(name), kind)]
    if not wrong and not _is_preprocessing(found["preprocessing"]):
        wrong = ["preprocessing"]
    if not wrong and not all(map(_is_distribution, found["calibration"].values())):
        wrong = ["calibration"]
    if wrong:
        raise FileError(f"{path} is damaged ({wrong[0]}): score again, or remove it")
    found["preprocessing"] = {**_ADDED_LATER, **found["preprocessing"]}
    return found


_ADDED_LATER = {"exif": "turn", "image_range": None, "crop_rounding": "even", "decode": "full"}
"""Keys of a preprocessing that older files lack, and the behaviour at the time."""


_KINDS: Mapping[str, type | UnionType] = {
    **dict.fromkeys(
        (
            *("command", "oodcli_version", "torch_version", "checkpoint_sha256", "arch", "source"),
            *("device", "precision", "paths_sha256", SHA256),
        ),
        str,
    ),
    **dict.fromkeys(("seed", "rows"), int),
    **dict.fromkeys(("detectors", "verdicts", "preprocessing", "calibration"), dict),
    "averaged": bool | NoneType,
    "extracted_by": str | NoneType,
    "shard": dict | NoneType,
}


def _is_preprocessing(found: Mapping[str, Any]) -> bool:
    resize, limits = found.get("resize"), found.get("image_range")
    return (
        {"resize", "interpolation"} <= found.keys()
        and _are_numbers(found.get("input_size"), 2)
        and all(_are_numbers(found.get(name)) for name in ("mean", "std"))
        and (isinstance(resize, int | NoneType) or _are_numbers(resize, 2))
        and (limits is None or _are_numbers(limits, 2))
    )


def _is_distribution(found: object) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("images"), str):
        return False
    try:
        threshold = float(found["threshold"])
        rising = [float(found["rate"]), 1.0], [-math.inf, *map(float, found["quantiles"])]
    except (KeyError, TypeError, ValueError):
        return False
    return threshold == threshold and all(a <= b for each in rising for a, b in pairwise(each))


def json_number(value: float) -> float | str:
    """A number with the 9 significant digits of a scores file; an infinite one as a string, which
    ``float`` reads."""
    return float(f"{value:.9g}") if math.isfinite(value) else str(value)


def _are_numbers(found: object, count: int | None = None) -> bool:
    numbers = isinstance(found, list) and all(isinstance(each, int | float) for each in found)
    return numbers and count in (None, len(cast(list[float], found)))


def require_same_origin(made: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Raises FileError when of files that are compared, by their names, two come from different
    checkpoints, weights or preprocessing, or a detector that both have is not the same; what has
    nothing beside it may be anything."""
    known = {name: about for name, about in made.items() if about is not None}
    for (one, first), (other, second) in _pairs(known):
        for key, words in (("checkpoint_sha256", "checkpoint"), ("preprocessing", "preprocessing")):
            if first.get(key) != second.get(key):
                raise FileError(
                    f"{one} was scored with the {words} {_shown(first.get(key))}, but {other} with "
                    f"{_shown(second.get(key))}: score both alike"
                )
        require_same_weights(
            bool(first.get("averaged")),
            bool(second.get("averaged")),
            Words(f"{one} was scored with", f"{other} with"),
        )
        for detector in first["detectors"].keys() & second["detectors"].keys():
            mine, theirs = first["detectors"][detector], second["detectors"][detector]
            if mine != theirs:
                raise FileError(
                    f"{one} was scored with {detector} {_shown(mine)}, but {other} with "
                    f"{_shown(theirs)}: score both with the same artefact and parameters"
                )


def _pairs(
    known: Mapping[str, Mapping[str, Any]],
) -> list[tuple[tuple[str, Mapping[str, Any]], tuple[str, Mapping[str, Any]]]]:
    """The first item with each of the others."""
    items = list(known.items())
    return [(items[0], each) for each in items[1:]]


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"
