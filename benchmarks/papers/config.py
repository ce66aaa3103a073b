"""The networks and image sets of the tables, named in a TOML file.

Paths are relative to the data folder. Images are anything that oodcli reads: a folder, an
``.npz``, ``torchvision:SVHN?root=.&split=test``, ``noise:…``. Unknown keys are an error.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ImageSet:
    """images: the images to score. learn: other images of the same kind, for detectors that learn
    from OOD images. Without it they learn from every other row of an .npz and score the rest."""

    images: str
    learn: str = ""


@dataclass(frozen=True)
class Network:
    """test, train: in-distribution images. stages: names of the layers that LSGM's figures choose
    from. tables: names of the tables to measure. sets: the OOD sets by name."""

    name: str
    checkpoint: str
    test: str
    train: str
    sets: Mapping[str, ImageSet]
    stages: tuple[str, ...]
    tables: tuple[str, ...]

    @property
    def folder(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Config:
    """networks: by name. per_class: virtual images a class. seeds: of the inversion. noise: images
    of each kind. precision: of the passes over images."""

    networks: Mapping[str, Network]
    per_class: int
    seeds: tuple[int, ...]
    noise: int
    resamples: int
    precision: str


def read_config(path: Path, tables: Collection[str]) -> Config:
    """tables: names of all tables, the default of a network's. Raises ValueError for a key that is
    missing or unknown, and for an unknown set or table."""
    with path.open("rb") as file:
        found = tomllib.load(file)
    usual = {"per_class": 50, "seeds": [0, 1], "noise": 2000, "resamples": 1000}
    usual["precision"] = "float32"
    _refuse_unknown(found, {*usual, "test", "train", "sets", "networks"}, str(path))
    sets = {name: _image_set(name, value) for name, value in found.get("sets", {}).items()}
    networks = {}
    for name, given in found.get("networks", {}).items():
        _refuse_unknown(given, {each.name for each in fields(Network)} - {"name"}, name)
        whole = {"test": found.get("test"), "train": found.get("train"), **given}
        absent = [key for key in ("checkpoint", "test", "train") if not whole.get(key)]
        if absent:
            raise ValueError(f"{path}: {name} has no {absent[0]}")
        networks[name] = Network(
            name=name,
            checkpoint=whole["checkpoint"],
            test=whole["test"],
            train=whole["train"],
            sets={_checked(each, sets, "set"): sets[each] for each in given.get("sets", sets)},
            stages=tuple(given.get("stages", ("layer1", "layer2", "layer3"))),
            tables=tuple(_checked(each, tables, "table") for each in given.get("tables", tables)),
        )
    if not networks:
        raise ValueError(f"{path} names no network: expected a table [networks.NAME]")
    settings = {key: found.get(key, value) for key, value in usual.items()}
    return Config(networks=networks, **{**settings, "seeds": tuple(settings["seeds"])})


def _image_set(name: str, value: Any) -> ImageSet:
    if isinstance(value, str):
        return ImageSet(value)
    _refuse_unknown(value, {"images", "learn"}, name)
    return ImageSet(**value)


def _checked(name: str, known: Collection[str], what: str) -> str:
    if name not in known:
        raise ValueError(f"no {what} '{name}': expected one of {', '.join(known)}")
    return name


def _refuse_unknown(found: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(found.keys() - known)
    if unknown:
        raise ValueError(
            f"{where}: unknown key '{unknown[0]}': expected {', '.join(sorted(known))}"
        )
