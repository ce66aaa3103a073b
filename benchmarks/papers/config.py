"""The networks and image sets of the tables, named in a TOML file.

Paths are relative to the data folder. Images are anything that oodcli reads: a folder, an
``.npz``, ``torchvision:SVHN?root=.&split=test``, ``noise:…``. Unknown keys are an error.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ImageSet:
    """images: the images to score. learn: other images of the same kind, for detectors that learn
    from OOD images. Without it they learn from every other row of an .npz and score the rest.
    list: a text list of the images to score, with paths relative to a root; all are scored where
    there is no such file. group: name of the sets that are averaged with it, such as near."""

    images: str
    learn: str = ""
    list: str = ""
    group: str = ""


@dataclass(frozen=True)
class Network:
    """test, train: in-distribution images; without train only what needs none can be measured.
    stages: names of the layers that LSGM's figures choose from. tables: names of the tables to
    measure. sets: the OOD sets by name. accuracy: the published one, for ``prepare``. arch: as
    ``--arch``, where the checkpoint does not tell; code in a file is run."""

    name: str
    checkpoint: str
    test: ImageSet
    train: str
    accuracy: float | None
    arch: str
    sets: Mapping[str, ImageSet]
    stages: tuple[str, ...]
    tables: tuple[str, ...]

    @property
    def folder(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Config:
    """networks: by name. per_class: virtual images a class. seeds: of the inversion. noise: images
    of each kind. precision: of the passes over images. roots: folders in which images are looked
    for, in this order. without: detectors to leave out of ``benchmarks.fit_free``. every: detector
    → N, where it scores every N-th image of each set alone."""

    networks: Mapping[str, Network]
    per_class: int
    seeds: tuple[int, ...]
    noise: int
    resamples: int
    precision: str
    roots: tuple[str, ...]
    without: tuple[str, ...]
    every: Mapping[str, int]


def read_config(path: Path, tables: Collection[str]) -> Config:
    """tables: names of all tables, the default of a network's. Raises ValueError for a key that is
    missing or unknown, and for an unknown set or table."""
    with path.open("rb") as file:
        found = tomllib.load(file)
    usual: dict[str, Any] = {"per_class": 50, "seeds": [0, 1], "noise": 2000, "resamples": 1000}
    usual |= {"precision": "float32", "roots": ["."], "without": [], "every": {}}
    _refuse_unknown(found, {*usual, "test", "train", "sets", "networks"}, str(path))
    sets = {name: _image_set(name, value) for name, value in found.get("sets", {}).items()}
    networks = {}
    for name, given in found.get("networks", {}).items():
        _refuse_unknown(given, {each.name for each in fields(Network)} - {"name"}, name)
        whole = {"test": found.get("test"), "train": found.get("train"), **given}
        absent = [key for key in ("checkpoint", "test") if not whole.get(key)]
        if absent:
            raise ValueError(f"{path}: {name} has no {absent[0]}")
        networks[name] = Network(
            name=name,
            checkpoint=whole["checkpoint"],
            test=_image_set("test", whole["test"]),
            train=whole["train"] or "",
            accuracy=whole.get("accuracy"),
            arch=whole.get("arch", ""),
            sets={_checked(each, sets, "set"): sets[each] for each in given.get("sets", sets)},
            stages=tuple(given.get("stages", ("layer1", "layer2", "layer3"))),
            tables=tuple(_checked(each, tables, "table") for each in given.get("tables", tables)),
        )
    if not networks:
        raise ValueError(f"{path} names no network: expected a table [networks.NAME]")
    settings = {key: found.get(key, value) for key, value in usual.items()}
    settings |= {key: tuple(settings[key]) for key in ("seeds", "roots", "without")}
    return Config(networks=networks, **settings)


def located(network: Network, config: Config, data: Path, lists: Path) -> Network:
    """The same network with the place of every image set in the data folder, or its list with whole
    paths, which is written into ``lists``. Raises ValueError for what is not in the data folder."""
    if not (data / network.checkpoint).exists():
        raise ValueError(_absent(network.checkpoint, network, config, data))

    def place(name: str, given: ImageSet) -> ImageSet:
        if ":" in given.images:  # torchvision:… and noise:…
            return given
        roots = [each for each in config.roots if (data / each / given.images).exists()]
        if not roots:
            raise ValueError(_absent(given.images, network, config, data))
        if given.list and (data / given.list).exists():
            lines = (data / given.list).read_text("utf-8").splitlines()
            lists.mkdir(parents=True, exist_ok=True)
            target = lists / f"{name}.txt"
            root = (data / roots[0]).resolve()
            target.write_text("".join(f"{root}/{line}\n" for line in lines if line), "utf-8")
            return replace(given, images=str(target))
        return replace(given, images=str(Path(roots[0]) / given.images))

    sets = {name: place(name, each) for name, each in network.sets.items()}
    return replace(network, test=place("test", network.test), sets=sets)


def _absent(what: str, network: Network, config: Config, data: Path) -> str:
    images = [network.test.images, *(each.images for each in network.sets.values())]
    roots = [each for each in config.roots if each != "."]
    inside = f", which may be in {' or '.join(roots)}" if roots else ""
    return (
        f"{data} has no {what}: expected in it {network.checkpoint}, and the images "
        f"{', '.join(images)}{inside}; to measure fewer sets, remove them from the configuration"
    )


def _image_set(name: str, value: Any) -> ImageSet:
    if isinstance(value, str):
        return ImageSet(value)
    _refuse_unknown(value, {each.name for each in fields(ImageSet)}, name)
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
