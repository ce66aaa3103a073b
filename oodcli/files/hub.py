"""Checkpoints that are a folder, as on a model hub: their weights, their configuration, their card.

Nothing heavy is imported here.
"""

from __future__ import annotations

import json
import re
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from oodcli.errors import CheckpointError, first_sentence
from oodcli.files.hashes import file_sha256

CONFIG = "config.json"

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Where transformers writes how images are prepared."""

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Usual names of the weights, the preferred one first; ``NAME.index.json`` lists their parts."""

ONNX_DATA = (".data", "_data")
"""What torch and Hugging Face append to the name of an ONNX file for that of its weights."""

CARD = "oodcli.toml"

LARGEST_JSON = 1 << 25
"""Bytes of a configuration or an index; the index of 10,000 tensors takes a megabyte."""

LARGEST_NUMBER = 1 << 20
"""The largest integer of a configuration; the vocabulary of a text encoder has 250,000 words."""

_PART = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|bin)$")


def folder_of(path: Path) -> Path | None:
    """The folder of a model hub that a checkpoint is, or whose weights it is; None for others."""
    if path.is_dir():
        return path
    return path.parent if path.name in WEIGHTS and (path.parent / CONFIG).is_file() else None


def weights_of(path: Path) -> tuple[Path, ...]:
    """The files that hold a checkpoint's weights, in order: one, or the parts that an index lists.
    Raises CheckpointError when a folder has none, or its index is damaged."""
    if not path.is_dir():
        if _PART.search(path.name):
            raise CheckpointError(
                f"{path} is one part of several: give the folder {path.parent}, with the index in "
                "it"
            )
        return (path,)
    for name in WEIGHTS:
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return (path / name,)
        if index.is_file():
            return _parts(index)
    try:
        others = sorted(each.name for each in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    found = f"only {', '.join(others[:5])}{', …' * (len(others) > 5)}" if others else "nothing"
    raise CheckpointError(
        f"{path} is a folder without {' or '.join(WEIGHTS)} ({found}): give the checkpoint file"
    )


def _parts(index: Path) -> tuple[Path, ...]:
    """The files that an index lists, which must lie beside it."""
    listed = read_json(index).get("weight_map")
    names = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else []
    if not names:
        raise CheckpointError(f"{index} lists no weights: copy it again")
    for name in names:
        if Path(name).name != name or not _PART.search(name):
            raise CheckpointError(
                f"{index} lists {name[:80]!r}, which is not the name of a part of the weights "
                "beside it: copy the folder again"
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name} is missing: copy the folder again")
    return tuple(index.parent / name for name in names)


def onnx_data(path: Path) -> tuple[Path, ...]:
    """The file beside an ONNX file that has its weights, under the names that torch and Hugging
    Face give it, if the ONNX file names it. Raises OSError when a file cannot be read."""
    if path.suffix != ".onnx" or not path.is_file() or not path.stat().st_size:
        return ()
    beside = [path.with_name(path.name + ending) for ending in ONNX_DATA]
    with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        found = [e for e in beside if e.is_file() and content.find(e.name.encode()) >= 0]
    return tuple(found)


def checkpoint_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a checkpoint's weights, file after file. Raises CheckpointError as
    ``weights_of`` does, OSError when a file cannot be read."""
    return file_sha256(*weights_of(path), *onnx_data(path))


def card_path(path: Path) -> Path:
    """Where a checkpoint's model card is, or should be written: beside a file, or in the folder."""
    folder = folder_of(path)
    if folder is None:
        return path.with_suffix(".toml")
    real = folder.resolve()
    beside = path.with_suffix(".toml") if folder != path else real.with_name(f"{real.name}.toml")
    inside = folder / CARD
    return beside if beside.is_file() and not inside.is_file() else inside


def stem_of(path: Path) -> str:
    """The name of a checkpoint without its suffix; a folder has none."""
    return path.resolve().name if path.is_dir() else path.stem


def shipped_as(path: Path) -> str:
    """The name of a checkpoint among its ``companions``."""
    folder = folder_of(path)
    if folder is None:
        return path.name
    return stem_of(folder) if folder == path else str(Path(stem_of(folder), path.name))


def companions(path: Path) -> dict[str, Path]:
    """The files that a checkpoint is made of, by their names relative to what it lies in."""
    folder = folder_of(path)
    if folder is None:
        return {each.name: each for each in (path, *onnx_data(path))}
    configs = [folder / name for name in (CONFIG, *PROCESSORS)]
    indices = [folder / f"{name}.index.json" for name in WEIGHTS] if folder == path else []
    files = (*weights_of(path), *(each for each in (*configs, *indices) if each.is_file()))
    return {str(Path(stem_of(folder), each.name)): each for each in files}


def read_json(path: Path, largest: int | None = None) -> dict[str, Any]:
    """The object in a JSON file. largest: of its integers. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise CheckpointError(f"{path} is larger than {LARGEST_JSON >> 20} MB: copy it again")
        found = json.loads(content)
        too_large = largest and _too_large(found, largest)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {first_sentence(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} is a {type(found).__name__}, expected an object: copy it again"
        )
    if too_large:
        raise CheckpointError(
            f"{path}: {too_large} is larger than {largest}, which no image classifier needs: copy "
            "it again"
        )
    return found


def _too_large(value: Any, largest: int, name: str = "a number") -> str:
    """The key of an integer beyond ``largest``; empty where there is none."""
    if isinstance(value, dict):
        found = (_too_large(each, largest, str(key)[:40]) for key, each in value.items())
    elif isinstance(value, list):
        found = (_too_large(each, largest, name) for each in value)
    else:
        return name if isinstance(value, int) and abs(value) > largest else ""
    return next(filter(None, found), "")
