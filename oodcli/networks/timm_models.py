"""Checkpoints of timm's models that come without ``config.json``: what its training script saved
beside the weights, and which of its models fit a bare state dict."""

from __future__ import annotations

import argparse
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from oodcli.errors import CheckpointError
from oodcli.networks import architectures
from oodcli.networks.architectures.weightless import Weightless
from oodcli.networks.card import Overrides
from oodcli.networks.makers import TimmMaker, no_larger_than, timm_name
from oodcli.networks.network import Network, named
from oodcli.networks.state_dict import layouts_of

SOURCE = "from the training script's args"

SECONDS = 6.0
"""For which timm's models are compared with a state dict."""

FAMILIAR = 0.3
"""Share of the words of a state dict's names that are in the source of one of timm's modules at
least; its blocks may be those of another module."""

FAR = 12
"""Tensors of other shapes with which a model is no longer tried."""


def network_of_script(
    content: Any, state: dict[str, Tensor], given: Overrides, path: Path
) -> Network | None:
    """The network that a training script names in the arguments it saved (``args.model``), with
    the inputs that they give; None where there are none, or the weights are another network's."""
    args = content.get("args") if isinstance(content, Mapping) else None
    said = vars(args) if isinstance(args, argparse.Namespace) else args
    name = said.get("model") if isinstance(said, Mapping) else None
    if not isinstance(said, Mapping) or not isinstance(name, str):
        return None
    layouts = layouts_of(state)
    by_timm = {"arch", "state_dict"} <= content.keys()
    if not by_timm and any(architectures.recognise(layout) for layout, _ in layouts):
        return None  # torchvision's script saves args, too
    inputs = {key: said[key] for key in INPUTS if said.get(key)}
    size = inputs.get("input_size")
    if isinstance(size, int):  # of DeiT's script and its descendants
        inputs["img_size"] = inputs.pop("input_size")
    fixed = {"in_chans": said.get("in_chans"), "global_pool": said.get("gp")}
    more = said.get("model_kwargs")
    fixed |= dict(more) if isinstance(more, Mapping) else {}
    side = inputs.get("img_size") or (size[-1] if isinstance(size, list | tuple) else None)
    for arguments in (fixed, {**fixed, "img_size": side}):
        try:
            arch = timm_name(name, arguments)
            with no_larger_than(state, f"{path} (args.model)"):
                maker = TimmMaker(arch, inputs=inputs, source=SOURCE)
                found = named(arch, layouts, given, path, maker=maker)
        except CheckpointError:  # no timm, not a model of it, or not this one
            continue
        note = f"architecture {arch} {SOURCE} (override: --arch)"
        return replace(found, assumptions=(note, *found.assumptions))
    return None


INPUTS = (
    *("input_size", "img_size", "in_chans", "mean", "std"),
    *("interpolation", "crop_pct", "crop_mode"),
)
"""Arguments of timm's training script that say how images are prepared."""


class TooFarError(Exception):
    """A model is unlike a state dict."""


def likely(state: Mapping[str, Tensor], hint: str = "") -> tuple[list[str], list[str]]:
    """timm's models with the same names and shapes as a state dict; where there are none, the
    nearest one, and what differs. Both empty where timm is missing, or nothing is near. hint: the
    name of the file, by which models are tried first. Takes a few seconds, so for error messages
    only."""
    try:
        import timm
    except ImportError:
        return [], []
    end = time.monotonic() + SECONDS
    arguments = _arguments(state)
    sized = ""  # a vision transformer for images of another size
    best: tuple[list[str], list[str]] = ([], ["nothing in common"] * min(FAR, len(state) // 2))
    for name in _ordered(timm, state, hint):
        if time.monotonic() > end:
            break
        try:
            with Weightless(), _near(state):
                network: nn.Module = timm.create_model(name, pretrained=False, **arguments)
        except Exception:  # too far, or a model that has no such argument
            continue
        differing = architectures.compare(network.state_dict(), state)
        more = {"in_chans": arguments["in_chans"]} if "in_chans" in arguments else {}
        side = _side(network, state)
        if side and [line.split(" is ")[0] for line in differing] == ["pos_embed"]:
            sized = sized or timm_name(name, more | {"img_size": side})
        if len(differing) < len(best[1]):
            best = [timm_name(name, more)], differing
        elif not differing and best[0]:
            best[0].append(timm_name(name, more))
    if sized and best[1]:
        return [sized], []
    return best if best[0] else ([], [])


def _side(network: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """The side of the images of a vision transformer, by the number of its positions; None where
    that is the network's own, or nothing tells."""
    own, theirs = network.state_dict().get("pos_embed"), state.get("pos_embed")
    patch: Any = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if own is None or theirs is None or theirs.ndim != 3 or not patch or own.shape == theirs.shape:
        return None
    special = getattr(network, "num_prefix_tokens", 0)
    special = 0 if getattr(network, "no_embed_class", False) else special
    side = math.isqrt(max(theirs.shape[1] - special, 0))
    return side * patch[0] if side * side + special == theirs.shape[1] else None


def _arguments(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of classes and of channels, by the last matrix and the first convolution."""
    heads = [len(tensor) for tensor in state.values() if tensor.ndim in (2, 4)]
    stems = [tensor.shape[1] for tensor in state.values() if tensor.ndim == 4]
    found = {"num_classes": heads[-1]} if heads else {}
    return found | ({"in_chans": 1} if stems and stems[0] == 1 else {})


def _without_numbers(words: Iterable[str]) -> set[str]:
    return {re.sub(r"\d+", "", word) for word in words} - {""}


@cache
def _known(timm: Any) -> dict[str, set[str]]:
    """The words in the source of each module, and in those that it imports."""
    own, imported = {}, {}
    for file in Path(timm.models.__file__).parent.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        pairs = re.findall(r"self\.(\w+)\b|['\"](\w+)['\"]", text)
        own[file.stem] = _without_numbers(word for pair in pairs for word in pair)
        imported[file.stem] = re.findall(r"^from (?:\.|timm\.models\.)(\w+) import", text, re.M)
    return {
        module: words.union(*(own[each] for each in imported[module] if each in own))
        for module, words in own.items()
    }


def _ordered(timm: Any, state: Mapping[str, Tensor], hint: str) -> list[str]:
    """Names of timm's models: those in the hint, then those in whose source most words of the state
    dict's names are. Empty where no module has enough of them."""
    words = _without_numbers(word for key in state for word in key.split(".")[:-1])
    sources = {module: len(words & known) for module, known in _known(timm).items()}
    most = max(sources.values())
    if most < FAMILIAR * len(words):
        return []
    ranked = [
        (share, name)
        for module, share in sources.items()
        if share > most / 2
        for name in timm.list_models(module=module)
    ]
    simple = re.sub(r"\W", "", hint.lower())
    return [
        name
        for _, name in sorted(ranked, key=lambda each: (each[1] not in simple, -each[0], each[1]))
    ]


@contextmanager
def _near(state: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, making a network ends as soon as FAR of its weights have shapes that a state dict
    has not, or not as often."""
    shapes = Counter(tuple(tensor.shape) for tensor in state.values())
    left = FAR

    def take(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        if parameter is None:
            return
        shapes[tuple(parameter.shape)] -= 1
        left -= shapes[tuple(parameter.shape)] < 0
        if left < 0:
            raise TooFarError

    handle = register_module_parameter_registration_hook(take)
    try:
        yield
    finally:
        handle.remove()
