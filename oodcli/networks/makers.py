"""How to build the network that ``--arch`` names: built in, timm's, or your own."""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from oodcli.errors import CheckpointError, first_sentence
from oodcli.networks import architectures
from oodcli.networks.architectures import Inputs
from oodcli.networks.architectures.weightless import Weightless
from oodcli.networks.inputs import guess_inputs
from oodcli.networks.preprocessing import INTERPOLATIONS
from oodcli.notes import only_from


class Maker:
    """How to make a network that :mod:`oodcli.networks.architectures` knows."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def skeleton(self, num_classes: int) -> nn.Module:
        """The network for its names and shapes, without weights where that is possible."""
        return architectures.skeleton(self.arch, num_classes)

    def build(self, num_classes: int | None) -> nn.Module:
        return self.skeleton(num_classes or 1000)  # its weights come from the checkpoint

    def inputs(self, network: nn.Module) -> Inputs:
        return architectures.inputs(self.arch, network)


class TimmMaker(Maker):
    """A model of timm: ``timm:NAME``, or ``timm:NAME.TAG`` with the inputs of those weights of
    timm's; then ``?KEY=VALUE&…``, arguments of the model such as ``img_size=64``. cfg: timm's
    ``pretrained_cfg`` of a checkpoint, None for timm's own; inputs: of a training script, which
    win over that; source: what they were taken from."""

    def __init__(
        self,
        arch: str,
        cfg: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        source: str = "timm's for this model",
    ) -> None:
        super().__init__(arch)
        try:
            import timm
        except ImportError as error:
            raise CheckpointError(
                f"--arch {arch} needs timm, which is not installed: pip install 'oodcli[timm]'"
            ) from error
        self.timm: Any = timm
        self.source = source
        self.given = dict(inputs or {})
        self.name, _, query = arch.removeprefix("timm:").partition("?")
        self.arguments = dict(map(_argument, query.split("&"))) if query else {}
        refused = [key for key in self.arguments if not key or _LOADING.match(key)]
        if refused or not re.fullmatch(r"\w[\w.-]*", self.name):
            what = f"'{refused[0]}'" if refused else f"'{self.name}'"
            raise CheckpointError(
                f"--arch {arch}: {what} is not the name of a model of timm or of an argument of "
                "its layers: write timm:NAME, or timm:NAME?img_size=64&in_chans=1"
            )
        side = self.arguments.get("img_size")
        if (
            cfg is None
            and isinstance(side, int)
            and not {"img_size", "input_size"} & set(self.given)
        ):
            self.given["img_size"] = side
        self.configured = cfg is not None
        if cfg is not None:
            known = timm.models.PretrainedCfg.__dataclass_fields__.keys() - _FETCHED
            self.arguments["pretrained_cfg"] = {k: v for k, v in cfg.items() if k in known}

    def skeleton(self, num_classes: int) -> nn.Module:
        with Weightless():
            return self.build(num_classes)

    def build(self, num_classes: int | None) -> nn.Module:
        given = self.arguments | ({} if num_classes is None else {"num_classes": num_classes})
        try:
            with _quiet():
                network: nn.Module = self.timm.create_model(self.name, pretrained=False, **given)
        except CheckpointError:
            raise
        except Exception as error:  # timm raises RuntimeError, TypeError, …, by model
            what = f"{self.arch} {self.source}" if self.configured else f"--arch {self.arch}"
            raise CheckpointError(f"{what} cannot be made: {first_sentence(error)}") from error
        return network

    def inputs(self, network: nn.Module) -> Inputs:
        """What timm's ``create_transform`` does with this model's configuration when it evaluates.
        Resize, crop mode and interpolation that cannot be so are in ``cannot``."""
        try:
            with _quiet():
                config = self.timm.data.resolve_model_data_config(network, self.given)
            return self._inputs(config)
        except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the configuration of {self.arch} {self.source} makes no sense "
                f"({first_sentence(error)}): give the network with --arch timm:{self.name}"
            ) from error

    def _inputs(self, config: Mapping[str, Any]) -> Inputs:
        height, width = map(int, config["input_size"][1:])
        share, mode = float(config["crop_pct"]), config["crop_mode"]
        scaled = (math.floor(height / share), math.floor(width / share))
        cannot = {}
        if mode == "border":
            cannot["resize"] = (
                f"timm pads whole images with a border for {self.arch}, which oodcli cannot do: "
                "set how it was trained with --crop squash or --crop center"
            )
        elif mode != "squash" and height != width:
            cannot["resize"] = (
                f"timm resizes images for {self.arch} until they cover {height}x{width}, which "
                "oodcli cannot do: set how it was trained with --crop squash or --resize N"
            )
        kind = config["interpolation"]
        if kind not in INTERPOLATIONS:
            cannot["interpolation"] = (
                f"timm's interpolation for {self.arch} is '{kind}', which oodcli cannot do: give "
                f"--interpolation, one of {', '.join(INTERPOLATIONS)}"
            )
        found = Inputs(
            (height, width),
            tuple(map(float, config["mean"])),
            tuple(map(float, config["std"])),
            scaled[0] if mode != "squash" and height == width else scaled,
            kind,
            self.source,
            self.source,
            crop_share=share,
            cannot=cannot,
        )
        grey = self.arguments.get("in_chans") == 1 != len(found.mean)
        return architectures.grey(found) if grey else found


_LOADING = re.compile(r"pretrained|checkpoint|cache_dir|features_only|num_classes$")
"""Arguments of timm that read other weights, or return no classifier."""

_FETCHED = frozenset(("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"))
"""Where timm's configuration says that weights come from."""


def _quiet() -> AbstractContextManager[None]:
    """Within it, timm does not warn: what it warns of is in our own lines."""
    return only_from(logging.CRITICAL, "timm")


def timm_name(name: str, arguments: Mapping[str, Any]) -> str:
    """A model of timm with its arguments, as ``--arch`` takes it; those that are None left out."""
    words = (
        f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
        for key, value in arguments.items()
        if value is not None and key != "num_classes" and (key, value) != ("in_chans", 3)
    )
    query = "&".join(words)
    return f"timm:{name}?{query}" if query else f"timm:{name}"


def _argument(text: str) -> tuple[str, Any]:
    """``img_size=64`` → its name and the value, by JSON where it is any."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


class FactoryMaker(Maker):
    """``FILE.py:FACTORY``, called with num_classes where it takes that."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        file, _, name = arch.rpartition(":")
        if not Path(file).is_file():
            raise CheckpointError(f"--arch {arch}: no file {file} (in {Path.cwd().name}/)")
        spec = importlib.util.spec_from_file_location("oodcli_user_architecture", file)
        if spec is None or spec.loader is None:
            raise CheckpointError(f"--arch {arch}: {file} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(Path(file).resolve().parent))  # it may import its neighbours
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise CheckpointError(
                f"--arch {arch}: {file} raised {type(error).__name__}: {first_sentence(error)}"
            ) from error
        finally:
            sys.path.pop(0)
        self.factory = getattr(module, name, None)
        if not callable(self.factory):
            raise CheckpointError(f"--arch {arch}: {file} has no function or class '{name}'")
        self.takes_classes = "num_classes" in inspect.signature(self.factory).parameters

    def skeleton(self, num_classes: int) -> nn.Module:
        return self.build(num_classes)

    def build(self, num_classes: int | None) -> nn.Module:
        assert self.factory is not None
        count = {"num_classes": num_classes} if self.takes_classes and num_classes else {}
        try:
            network = self.factory(**count)
        except Exception as error:
            raise CheckpointError(
                f"--arch {self.arch} raised {type(error).__name__}: {first_sentence(error)}"
            ) from error
        if not isinstance(network, nn.Module):
            raise CheckpointError(
                f"--arch {self.arch} returned {type(network).__name__}, expected a torch.nn.Module"
            )
        return network

    def inputs(self, network: nn.Module) -> Inputs:
        return guess_inputs(network)


def maker_of(arch: str) -> Maker:
    if arch.startswith("timm:"):
        return TimmMaker(arch)
    return FactoryMaker(arch) if ".py:" in arch else Maker(arch)


@contextmanager
def no_larger_than(state: Mapping[str, Tensor], where: str) -> Iterator[None]:
    """Within it, networks of far more weights than a state dict has cannot be built. A
    configuration can ask for a million layers. Raises CheckpointError."""
    most = 4 * len(state) + 1000, 4 * sum(each.numel() for each in state.values()) + 10_000_000
    count = numbers = 0

    def add(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count, numbers
        count += 1
        numbers += 0 if parameter is None else parameter.numel()
        if count > most[0] or numbers > most[1]:
            raise CheckpointError(
                f"{where} describes a network far larger than the weights beside it: copy the "
                "folder again"
            )

    handle = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        handle.remove()
