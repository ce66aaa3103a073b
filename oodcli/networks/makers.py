"""How to build the network that ``--arch`` names: built in, timm's, or your own."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from pathlib import Path
from typing import Any

from torch import nn

from oodcli.errors import CheckpointError, first_sentence
from oodcli.networks import architectures
from oodcli.networks.architectures import Inputs
from oodcli.networks.architectures.weightless import Weightless
from oodcli.networks.inputs import guess_inputs
from oodcli.networks.preprocessing import INTERPOLATIONS


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
    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        try:
            import timm
        except ImportError as error:
            raise CheckpointError(
                f"--arch {arch} needs timm, which is not installed: pip install 'oodcli[timm]'"
            ) from error
        self.timm: Any = timm

    def skeleton(self, num_classes: int) -> nn.Module:
        with Weightless():
            return self.build(num_classes)

    def build(self, num_classes: int | None) -> nn.Module:
        name = self.arch.removeprefix("timm:")
        count = {} if num_classes is None else {"num_classes": num_classes}
        try:
            network: nn.Module = self.timm.create_model(name, pretrained=False, **count)
        except Exception as error:  # timm raises RuntimeError, TypeError, …, by model
            raise CheckpointError(f"--arch {self.arch}: {first_sentence(error)}") from error
        return network

    def inputs(self, network: nn.Module) -> Inputs:
        """What timm's ``create_transform`` does with this model's configuration when it evaluates.
        Resize, crop mode and interpolation that cannot be so are in ``cannot``."""
        config = self.timm.data.resolve_model_data_config(network)
        height, width = config["input_size"][1:]
        share, mode = config["crop_pct"], config["crop_mode"]
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
        return Inputs(
            (height, width),
            tuple(config["mean"]),
            tuple(config["std"]),
            scaled[0] if mode != "squash" and height == width else scaled,
            kind,
            "timm's for this model",
            "timm's for this model",
            crop_share=share,
            cannot=cannot,
        )


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
