"""A folder of a model hub → its network, with what ``config.json`` says of it. No code that comes
with it is run, and nothing is fetched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from oodcli.errors import CheckpointError
from oodcli.files.hub import CONFIG, LARGEST_NUMBER, folder_of, read_json
from oodcli.networks.card import Overrides
from oodcli.networks.huggingface import network_of_transformers
from oodcli.networks.makers import TimmMaker, no_larger_than, timm_name
from oodcli.networks.network import Network, named
from oodcli.networks.state_dict import layouts_of

SOURCE = "from config.json"


def config_of(path: Path) -> dict[str, Any] | None:
    """The configuration of a checkpoint that belongs to a folder of a hub; None where it names no
    network. Raises CheckpointError where it is damaged, or asks for code of its own."""
    folder = folder_of(path)
    if folder is None or not (folder / CONFIG).is_file():
        return None
    where = folder / CONFIG
    config = read_json(where, LARGEST_NUMBER)
    if is_timm(config):
        return config
    if not config.get("architectures") and "model_type" not in config:
        return None
    if "auto_map" in config:
        raise CheckpointError(
            f"{where} asks for Python code that comes with the checkpoint (auto_map), which oodcli "
            "does not run: write a factory, and name it with --arch FILE.py:FACTORY"
        )
    if "quantization_config" in config:
        raise CheckpointError(
            f"{where} describes quantised weights (quantization_config): use the floating-point "
            "checkpoint"
        )
    return config


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of timm, or of timm's network within transformers."""
    return isinstance(config.get("architecture"), str)


def arch_of(config: Mapping[str, Any], path: Path) -> str:
    """What a classifier's ``arch`` says of the network that a configuration describes."""
    if is_timm(config):
        return timm_arch(config, str((folder_of(path) or path) / CONFIG))
    return f"transformers:{head_of(config)}"


def head_of(config: Mapping[str, Any]) -> str:
    """The class of transformers that a configuration names; empty where it names none."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else ""
    return first if isinstance(first, str) and first.isidentifier() else ""


def timm_arch(config: Mapping[str, Any], where: str) -> str:
    """The network of timm that a configuration names, as ``--arch`` takes it. Raises
    CheckpointError for arguments that make no sense."""
    name, arguments = config["architecture"], config.get("model_args") or {}
    if not re.fullmatch(r"\w[\w.-]*", name) or not isinstance(arguments, dict):
        raise CheckpointError(f"{where} names no network of timm: copy the folder again")
    return timm_name(name, arguments)


def timm_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """timm's ``pretrained_cfg``: of its own, or in old files the configuration itself."""
    found = config.get("pretrained_cfg", config)
    return dict(found) if isinstance(found, dict) else {}


def class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of the classes, one an output; None where there are none, or only numbers."""
    names: Any = config.get("label_names") or timm_cfg(config).get("label_names")
    names = names or config.get("labels")  # in files of old versions of timm
    about = config.get("label_descriptions") or timm_cfg(config).get("label_descriptions")
    if not names and isinstance(config.get("id2label"), dict):
        found = {str(key): value for key, value in config["id2label"].items()}
        names = [found.get(str(number)) for number in range(len(found))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    if isinstance(about, dict) and all(re.fullmatch(r"n\d{8}", name) for name in names):
        names = [str(about.get(name, name)) for name in names]  # WordNet ids say nothing
    if all(name == f"LABEL_{number}" for number, name in enumerate(names)):
        return None
    return tuple(names) or None


def hub_network(
    config: Mapping[str, Any], state: dict[str, Tensor], given: Overrides, path: Path
) -> Network:
    """The network that a configuration describes, with the weights of its folder. Raises
    CheckpointError."""
    where = str((folder_of(path) or path) / CONFIG)
    with no_larger_than(state, where):
        if is_timm(config):
            arch = timm_arch(config, where)
            cfg = timm_cfg(config)
            # Within transformers timm's network is not made for the size in pretrained_cfg.
            wrapped = head_of(config).startswith("TimmWrapper")
            used = {"inputs": cfg} if wrapped else {"cfg": cfg}
            maker = TimmMaker(arch, **used, source=SOURCE)
            found = named(arch, layouts_of(state), given, path, maker=maker)
        else:
            folder = folder_of(path) or path
            found = network_of_transformers(config, head_of(config), state, folder)
    notes = [f"architecture {found.arch} {SOURCE} (override: --arch)"]
    several = config.get("problem_type") == "multi_label_classification"
    if several:
        notes.append(f"several labels an image (problem_type, {SOURCE})")
    return replace(
        found,
        assumptions=(*notes, *found.assumptions),
        class_names=class_names(config),
        names_source=SOURCE,
        multi_label=several,
    )
