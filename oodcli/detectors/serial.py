"""A detector as tensors and settings, which is what an artefact holds, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from oodcli.detectors.bank import Bank
from oodcli.detectors.base import Detector
from oodcli.errors import DetectorError

Kind = TypeVar("Kind", bound=Detector)

DTYPES = (torch.float64, torch.int64, torch.float32, torch.bool)
"""Of tensors that an artefact can hold."""


def banks(kind: type[Detector]) -> frozenset[str]:
    """The fitted state that may be too large for the memory."""
    return frozenset(name for name, hint in get_type_hints(kind).items() if hint is Bank)


def state(detector: Detector) -> dict[str, Tensor | Bank]:
    """The fitted tensors; those of a mapping or a detector are named ``field/key``."""
    tensors: dict[str, Tensor | Bank] = {}
    for field in fields(detector):  # type: ignore[arg-type]
        value = getattr(detector, field.name)
        if isinstance(value, Tensor | Bank):
            tensors[field.name] = value
        elif isinstance(value, Mapping | Detector):
            inside = state(value) if isinstance(value, Detector) else value
            tensors |= {f"{field.name}/{key}": tensor for key, tensor in inside.items()}
    return tensors


def settings(detector: Detector) -> dict[str, Any]:
    """The fields that are not tensors, as JSON can hold them; of a detector, its settings."""
    values = {field.name: getattr(detector, field.name) for field in fields(detector)}  # type: ignore[arg-type]
    return {
        name: settings(value) if isinstance(value, Detector) else value
        for name, value in values.items()
        if not isinstance(value, Tensor | Bank | Mapping)
    }


def restore(
    kind: type[Kind], tensors: Mapping[str, Tensor | Bank], settings: Mapping[str, Any]
) -> Kind:
    """The inverse of state and settings; a bank may come as a tensor. Raises DetectorError when
    something is missing or superfluous."""
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    left = set(tensors)
    for field in fields(kind):  # type: ignore[arg-type]
        hint = hints[field.name]
        if hint in (Tensor, Bank) and field.name in tensors:
            tensor = tensors[field.name]
            values[field.name] = (
                Bank.of(tensor) if hint is Bank and isinstance(tensor, Tensor) else tensor
            )
            left.discard(field.name)
        elif get_origin(hint) is Mapping:
            values[field.name] = inside = _inside(tensors, field.name)
            left -= {f"{field.name}/{key}" for key in inside}
        elif field.name in settings:
            value = settings[field.name]
            if isinstance(hint, type) and issubclass(hint, Detector):
                inside = _inside(tensors, field.name)
                left -= {f"{field.name}/{key}" for key in inside}
                value = restore(hint, inside, value if isinstance(value, Mapping) else {})
            elif not _is_kind(value, hint):
                raise DetectorError(f"{kind.name}: '{field.name}' is of the wrong type")
            values[field.name] = tuple(value) if isinstance(value, list) else value
        elif field.name in kind.later:
            values[field.name] = kind.later[field.name]
        else:
            raise DetectorError(f"{kind.name}: '{field.name}' is missing from the artefact")
    superfluous = sorted(left | (settings.keys() - {field.name for field in fields(kind)}))  # type: ignore[arg-type]
    if superfluous:
        raise DetectorError(f"{kind.name}: the artefact has an unknown '{superfluous[0]}'")
    return kind(**values)


def _inside(tensors: Mapping[str, Tensor | Bank], field: str) -> dict[str, Tensor | Bank]:
    """The tensors of a field that has several, named ``field/key``, by key."""
    start = f"{field}/"
    return {name[len(start) :]: tensors[name] for name in tensors if name.startswith(start)}


def _is_kind(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is what a field is declared as."""
    if get_origin(hint) in (Union, UnionType):
        return any(_is_kind(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return isinstance(value, list | tuple) and all(_is_kind(each, item) for each in value)
    if hint in (float, int, str, bool):
        kinds = (int, float) if hint is float else hint
        return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))
    return value is None if hint is type(None) else True


def fault_of_fields(kind: type[Detector]) -> str | None:
    """Which field of a class an artefact cannot hold, in words."""
    try:
        hints = get_type_hints(kind)
    except (NameError, AttributeError, TypeError) as error:
        return f"{error}, in an annotation of a field"
    for field in fields(kind):  # type: ignore[arg-type]
        hint = hints[field.name]
        state = hint in (Tensor, Bank) or hint == Mapping[str, Tensor]
        part = isinstance(hint, type) and issubclass(hint, Detector)
        if not (state or part or _is_setting(hint)):
            return (
                f"its field '{field.name}' cannot be stored: declare it as a Tensor, a "
                "Mapping[str, Tensor] of collections.abc, float, int, str, bool, a tuple of those, "
                "or a Detector"
            )
    return None


def _is_setting(hint: Any) -> bool:
    """Whether values of a field that is declared so can be stored as JSON and read back."""
    if get_origin(hint) in (Union, UnionType, tuple):
        return all(_is_setting(each) for each in get_args(hint) if each is not Ellipsis)
    return get_origin(hint) is Literal or hint in (float, int, str, bool, type(None))


def fault_of_values(detector: Detector) -> str | None:
    """Which field holds something else than it is declared as, or than an artefact can hold, in
    words."""
    kind = type(detector)
    hints = get_type_hints(kind)
    for field in fields(detector):  # type: ignore[arg-type]
        hint, value = hints[field.name], getattr(detector, field.name)
        tensors = list(value.values()) if isinstance(value, Mapping) else [value]
        if get_origin(hint) is Mapping:
            right = isinstance(value, Mapping) and all(isinstance(t, Tensor) for t in tensors)
        elif isinstance(hint, type) and issubclass(hint, Tensor | Bank | Detector):
            right = isinstance(value, hint)
        else:
            right = _is_kind(value, hint)
        whose = f"a {kind.__name__} whose field '{field.name}' is"
        if not right:
            declared = getattr(hint, "__name__", str(hint))
            return f"{whose} {type(value).__name__}, declared as {declared}"
        wrong = [t.dtype for t in tensors if isinstance(t, Tensor) and t.dtype not in DTYPES]
        if wrong:
            return f"{whose} of {wrong[0]}, expected one of {', '.join(map(str, DTYPES))}"
    return None
