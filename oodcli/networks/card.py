"""Facts about a checkpoint from the command line and from the model card beside it."""

from __future__ import annotations

import json
import math
import reprlib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oodcli.errors import CheckpointError, first_sentence
from oodcli.files.hub import card_path
from oodcli.networks import architectures, heads
from oodcli.networks.classifier import Classifier
from oodcli.networks.preprocessing import Resize

LARGEST_CARD = 1 << 22
"""Bytes of a model card; the names of 20,000 classes take a fifth of it."""


@dataclass(frozen=True)
class Overrides:
    """Values from the command line; None = not given. names_file: the file that class_names were
    read from."""

    arch: str | None = None
    num_classes: int | None = None
    input_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: Resize = None
    interpolation: str | None = None
    crop: str | None = None
    exif: str | None = None
    image_range: tuple[float, float] | None = None
    decode: str | None = None
    class_names: tuple[str, ...] | None = None
    layers: str | None = None
    card: Path | None = None
    state_key: str | None = None
    multi_label: bool = False
    names_file: Path | None = None


NOTHING = Overrides()


def read_card(path: Path) -> dict[str, Any]:
    """The keys of a model card, with tuples for lists. Raises CheckpointError when the file is not
    TOML, or has an unknown key or a value of the wrong kind."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_CARD + 1)
        if len(content) > LARGEST_CARD:
            raise CheckpointError(
                f"{path} is larger than {LARGEST_CARD >> 20} MB, so it is not a model card: "
                "remove it, or name the right one with --card"
            )
        card = tomllib.loads(content.decode("utf-8").replace("\r\n", "\n"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    # ValueError: not TOML, not UTF-8, or a number of more than 4300 digits.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid TOML: {first_sentence(error)}") from error
    kinds = {
        "arch": (_is_text, "a string"),
        "num_classes": (_is_count, "a positive integer"),
        "class_names": (lambda v: _is_list(v, _is_text), "a list of strings"),
        "input_size": (lambda v: _is_list(v, _is_count) and len(v) == 2, "[height, width]"),
        "mean": (lambda v: _is_list(v, _is_number), "a list of numbers"),
        "std": (lambda v: _is_list(v, _is_number), "a list of numbers"),
        "resize": (_is_resize, "a positive integer, or [height, width]"),
        "interpolation": (_is_text, "a string"),
        "crop": (_is_text, "a string"),
        "exif": (_is_text, "a string"),
        "image_range": (lambda v: _is_list(v, _is_number) and len(v) == 2, "[low, high]"),
        "decode": (_is_text, "a string"),
    }
    for key, value in card.items():
        if key not in kinds:
            raise CheckpointError(
                f"{path}: '{key}' is not a key of a model card: use {', '.join(kinds)}"
            )
        fits, kind = kinds[key]
        if not fits(value):
            raise CheckpointError(f"{path}: {key} must be {kind}, but is {_shown(value)}")
    names, classes = card.get("class_names"), card.get("num_classes")
    if names is not None and classes is not None and len(names) != classes:
        raise CheckpointError(f"{path}: {len(names)} class_names, but num_classes = {classes}")
    for key in ("mean", "std", "image_range"):
        if key in card:
            card[key] = [float(number) for number in card[key]]
    return {key: tuple(v) if isinstance(v, list) else v for key, v in card.items()}


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not write integers of more than 4300 digits
        return "a number of thousands of digits"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _is_resize(value: Any) -> bool:
    return _is_count(value) or (_is_list(value, _is_count) and len(value) == 2)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 31


def _is_list(value: Any, fits: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(fits(item) for item in value)


def write_card(classifier: Classifier, path: Path) -> None:
    """Write the model card with which the same checkpoint gives the same classifier, where
    ``atomic`` says. Raises OSError when the disk refuses."""
    prep = classifier.preprocessing
    card: dict[str, Any] = {}
    if _is_arch(classifier.arch):
        card["arch"] = classifier.arch
    card["num_classes"] = classifier.num_classes
    if classifier.class_names != tuple(str(index) for index in range(classifier.num_classes)):
        card["class_names"] = list(classifier.class_names)
    card["input_size"] = list(prep.input_size)
    card["mean"], card["std"] = list(prep.mean), list(prep.std)
    if prep.resize is not None:
        card["resize"] = prep.resize
    card["interpolation"] = prep.interpolation
    if prep.exif != "turn":
        card["exif"] = prep.exif
    if prep.image_range is not None:
        card["image_range"] = prep.image_range
    if prep.decode != "full":
        card["decode"] = prep.decode
    # A JSON string, number or list is TOML as well, but for the one control character that JSON
    # leaves as it is.
    lines = (
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n".replace("\x7f", "\\u007f")
        for key, value in card.items()
    )
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def _is_arch(name: str) -> bool:
    """Whether ``--arch`` accepts the name. (Names of pickled modules and programs are not
    accepted.)"""
    base = heads.split(name)[0] or ""
    return base.startswith("timm:") or ".py:" in base or architectures.known(base)


def card_of(path: Path, overrides: Overrides, *, trust: bool) -> dict[str, Any]:
    """The keys of a checkpoint's model card; empty without a card. trust: run code that the card
    names. It comes with the checkpoint, and the user has not asked for it."""
    where = overrides.card or card_path(path)
    card = read_card(where) if overrides.card is not None or where.is_file() else {}
    if ".py:" in card.get("arch", "") and overrides.arch is None and not trust:
        raise CheckpointError(
            f"{where} names code, arch = {_shown(card['arch'])}, which can do anything when it "
            "runs: read it, then give it yourself with --arch, or add --trust-pickle"
        )
    return card
