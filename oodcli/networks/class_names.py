"""Names of the classes: in a file, or beside the weights in a checkpoint."""

from __future__ import annotations

import codecs
import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from oodcli.errors import CheckpointError
from oodcli.networks.inert import Stub

LARGEST_FILE = 1 << 22
"""Bytes of a file of names; those of 20,000 classes take a fifth of it."""

NAMED = (
    "class_to_idx",
    "idx_to_class",
    "class_names",
    "classes",
    "CLASSES",
    "label_names",
    "id2label",
    "names",
)
"""Keys under which training scripts store the names, in the order in which they are tried."""

AROUND = (
    "meta",
    "dataset_meta",
    "hyper_parameters",
    "hparams",
    "args",
    "train_args",
    "config",
    "model",
    "ema",
)
"""Keys of what holds such a key."""

_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_class_names(path: Path) -> tuple[str, ...]:
    """One name a line, without the empty lines at the end, or JSON: a list, names by number, or
    numbers by name. UTF-8 or UTF-16. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > LARGEST_FILE:
        raise CheckpointError(f"{path} has more than {LARGEST_FILE >> 20} MB: no list of classes")
    encoding = next((e for bom, e in _BOMS.items() if content.startswith(bom)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is neither UTF-8 nor UTF-16: convert it to UTF-8") from error
    if text.lstrip()[:1] in ("{", "["):
        names = _from_json(text)
        if names is None:
            raise CheckpointError(
                f"{path} is no JSON with class names: expected a list of names, or an object of "
                "names by number or numbers by name, from 0"
            )
        return names
    lines = [line.strip() for line in text.strip().splitlines()]
    if not lines or not all(lines):
        where = f"line {lines.index('') + 1} is empty" if lines else "the file is empty"
        raise CheckpointError(
            f"{path}: {where}: write one class name a line, in the outputs' order"
        )
    return tuple(lines)


def _from_json(text: str) -> tuple[str, ...] | None:
    try:
        return names_of(json.loads(text))
    except (ValueError, RecursionError):
        return None


def names_of(value: Any) -> tuple[str, ...] | None:
    """Class names in the order of the outputs, from a list of them, from names by number or from
    numbers by name; of ImageNet's ``[wnid, name]`` the name. None where it is none of these."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str | int) for key in value):
            return None
        if all(type(number) is int for number in value.values()):
            value = {number: name for name, number in value.items()}
        numbered = {str(key): name for key, name in value.items()}
        value = [numbered.get(str(index)) for index in range(len(value))]
    if not isinstance(value, list | tuple) or not value:
        return None
    names = [each[1] if isinstance(each, list) and len(each) == 2 else each for each in value]
    return tuple(names) if all(isinstance(name, str) for name in names) else None


def names_in(content: Any, levels: int = 3) -> tuple[str, tuple[str, ...]] | None:
    """Class names in what a training script saved, after the key under which they are."""
    parts = vars(content) if isinstance(content, Stub | Namespace | nn.Module) else content
    if not isinstance(parts, Mapping) or not levels:
        return None
    for key in NAMED:
        if names := names_of(parts.get(key)):
            return key, names
    found = (names_in(parts.get(key), levels - 1) for key in AROUND)
    return next(filter(None, found), None)
