"""Names of the classes: in a file, or beside the weights in a checkpoint."""

from __future__ import annotations

import codecs
import json
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
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
    "vocab",
    "classes_",
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
    "label_encoder",
)
"""Keys of what holds such a key."""

MOST_VISITED = 2000
"""Objects in a fastai learner's ``dls`` among which its vocabulary is sought."""

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
    value = _without_stubs(value)
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


def _without_stubs(value: Any) -> Any:
    """Lists in place of arrays and of fastai's lists of names, which were read without their code;
    anything else as it is."""
    for _ in range(4):
        if isinstance(value, Stub) and isinstance(vars(value).get("items"), list | Stub):
            value = vars(value)["items"]  # of fastai's CategoryMap, and of its list
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {_number(key): _number(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_number(each) for each in value]
    state = vars(value).get("state") if isinstance(value, Stub) else None
    if type(value).__name__ != "_reconstruct" or not isinstance(state, tuple):
        return value
    _, shape, kind, _, content = state if len(state) == 5 else (None,) * 5
    if not isinstance(shape, tuple) or len(shape) != 1:
        return value
    return _array(kind, content)


def _array(kind: Any, content: Any) -> Any:
    """The elements of an array of numpy, of texts or of numbers. kind: its dtype."""
    if isinstance(content, list):
        return content
    name = str(kind.args[0]) if isinstance(kind, Stub) and kind.args else ""
    if not isinstance(content, bytes) or not re.fullmatch(r"U\d{1,5}|[iu][1248]", name):
        return None
    about = vars(kind).get("state")
    order = ">" if isinstance(about, tuple) and about[1:2] == (">",) else "<"
    try:
        return np.frombuffer(content, np.dtype(order + name)).tolist()
    except ValueError:
        return None


def _number(value: Any) -> Any:
    """A number or a text of numpy as Python's; anything else as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Stub) and type(value).__name__ == "scalar" and len(value.args) == 2:
        found = _array(*value.args)
        return found[0] if found and len(found) == 1 else value
    return value


def names_in(content: Any, levels: int = 3) -> tuple[str, tuple[str, ...]] | None:
    """Class names in what a training script saved, after the key under which they are."""
    parts = vars(content) if isinstance(content, Stub | Namespace | nn.Module) else content
    if not isinstance(parts, Mapping) or not levels:
        return None
    for key in NAMED:
        if names := names_of(parts.get(key)):
            return key, names
    if names := _vocabulary(parts.get("dls")):
        return "dls.vocab", names
    found = (names_in(parts.get(key), levels - 1) for key in AROUND)
    return next(filter(None, found), None)


def _vocabulary(dls: Any) -> tuple[str, ...] | None:
    """The names in a fastai learner's data loaders, where a transform of the labels has them."""
    waiting, seen = [dls], set[int]()
    while waiting and len(seen) < MOST_VISITED:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        parts = vars(each) if isinstance(each, Stub) else each
        if isinstance(parts, Mapping):
            if names := names_of(parts.get("vocab")):
                return names
            waiting += parts.values()
        elif isinstance(parts, list | tuple):
            waiting += parts[:100]
    return None
