"""Unpickling without code: tensors and plain values as they are, a stub for everything else.

``torch.load(weights_only=True)`` unpickles by names on a closed list and calls nothing else. Here
each other name stands for a stub, which only stores what the file says about the object. So a
number of numpy or an object of the author's own class is no reason to allow any code.
"""

from __future__ import annotations

import argparse
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from oodcli.errors import CheckpointError

MOST_STUBS = 256
"""Unknown classes that a file may name; torch searches its list of them once for each object."""

MOST_MODULES = 20_000
"""Submodules of a pickled network; a crafted file can hold one in itself."""


class Stub:
    """An object whose class is not loaded: its attributes as the file has them. name: of its class,
    with the module. args: that the class was called with."""

    name: ClassVar[str] = "an object"
    args: tuple[Any, ...]

    def __new__(cls, *args: Any) -> Stub:
        made = super().__new__(cls)
        made.args = args
        return made

    def __init__(self, *args: Any) -> None:
        """Accepts anything, and calls nothing."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _Attribute(Stub):
    """What ``getattr`` gives: a nested class, or a method."""


def _dictionary(*_: Any) -> dict[Any, Any]:
    return {}


class _Mapping:
    """In place of a class derived from dict: torch fills plain dictionaries only."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


class _List(list[Any]):
    """In place of a class with items, such as a deque."""

    def __init__(self, *_: Any) -> None:
        super().__init__()


_KNOWN: Mapping[str, Callable[..., Any]] = {
    "argparse.Namespace": argparse.Namespace,
    "collections.defaultdict": _dictionary,
    "builtins.getattr": lambda *_: _Attribute,
    "oodcli.networks.inert._Attribute": _Attribute,  # or torch would not call it
}

_UNKNOWN = re.compile(r"GLOBAL (\S+) was not an allowed")

_FILLED = re.compile(r"Can only (SETITEM|append).* but got <class '(.+)'>")


def load_inert(path: Path) -> Any:
    """What is in a file of ``torch.save``, with a ``Stub`` for each object of an unknown class.

    Raises ValueError for a file that names very many classes, pickle.UnpicklingError for names that
    torch blocks (of ``os`` and ``sys``) and for what its restricted unpickler does not do, and what
    torch.load raises for damaged files.
    """
    names: list[str] = []
    with suppress(ValueError):  # of a file of torch before 1.6: its names come one by one
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if any(name.endswith(".DTensor") for name in names):
        raise CheckpointError(
            f"{path} holds one part of weights that are spread over several processes (DTensor, of "
            "FSDP): save what get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True, cpu_offload=True)) of "
            "torch.distributed.checkpoint.state_dict returns"
        )
    stubs: dict[str, Callable[..., Any]] = {name: _stub(name) for name in names} | dict(_KNOWN)
    while len(stubs) <= MOST_STUBS:
        try:
            allowed = torch.serialization.safe_globals([(s, name) for name, s in stubs.items()])
            with allowed, open(path, "rb") as file:  # of a path torch would look at the suffix
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            text = str(error)
            if unknown := _UNKNOWN.search(text):
                both = unknown[1], f"builtins.{unknown[1]}"  # torch leaves "builtins" out
                added: dict[str, Callable[..., Any]] = {each: _stub(each) for each in both}
            elif filled := _FILLED.search(text):
                added = {filled[2]: _Mapping if filled[1] == "SETITEM" else _List}
            else:
                raise
            if stubs.items() >= added.items():
                raise
            stubs |= added
    raise ValueError(f"it names more than {MOST_STUBS} classes")


def _stub(name: str) -> type[Stub]:
    module, _, short = name.rpartition(".")
    return type(short, (Stub,), {"name": name, "__module__": module, "__qualname__": short})


def is_module(value: Any) -> bool:
    """Whether this stands for a pickled ``torch.nn.Module``."""
    found = vars(value) if isinstance(value, Stub) else {}
    return all(isinstance(found.get(key), dict) for key in ("_parameters", "_buffers", "_modules"))


def state_of(module: Stub) -> dict[str, Tensor]:
    """The state dict of a pickled module. Raises CheckpointError where it has no end."""
    found: dict[str, Tensor] = {}
    waiting = [("", module)]
    for _ in range(MOST_MODULES):
        if not waiting:
            return found
        prefix, each = waiting.pop()
        own = vars(each)
        skipped = own.get("_non_persistent_buffers_set")
        temporary = skipped if isinstance(skipped, set) else set()
        buffers = {k: v for k, v in own["_buffers"].items() if k not in temporary}
        for name, value in (own["_parameters"] | buffers).items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
        children = [(f"{prefix}{k}.", v) for k, v in own["_modules"].items() if is_module(v)]
        waiting += reversed(children)
    raise CheckpointError(
        f"the pickled {type(module).name} has more than {MOST_MODULES} submodules: save "
        "model.state_dict()"
    )
