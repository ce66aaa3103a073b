"""Hyper-parameters: the arguments of ``fit``, or the fields of a detector that needs no fitting."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from oodcli.errors import DetectorError

if TYPE_CHECKING:
    from oodcli.detectors.base import Detector


class Setting(NamedTuple):
    """A hyper-parameter. meaning: from ``Annotated[TYPE, "meaning"]``, else empty."""

    type: Any
    default: Any
    meaning: str


def hyperparameters(kind: type[Detector]) -> dict[str, Setting]:
    """Everything that ``-p NAME.KEY=VALUE`` may set, by its key. Where no type is declared, it is
    that of the default."""
    maker = kind.fit if kind.fitted else kind.__init__
    hints = get_type_hints(maker, include_extras=True)
    return {
        name: _setting(hints.get(name, type(parameter.default)), parameter.default)
        for name, parameter in inspect.signature(maker).parameters.items()
        if name not in ("self", "train", "ood") and parameter.default is not inspect.Parameter.empty
    }


def _setting(hint: Any, default: Any) -> Setting:
    if get_origin(hint) is not Annotated:
        return Setting(hint, default, "")
    declared, *notes = get_args(hint)
    return Setting(declared, default, next((note for note in notes if isinstance(note, str)), ""))


def parse(kind: type[Detector], given: Mapping[str, str]) -> dict[str, Any]:
    """Hyper-parameters from the command line's strings. Raises DetectorError for an unknown key or
    a value of the wrong type."""
    known = hyperparameters(kind)
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise DetectorError(
            f"{kind.name} has no hyper-parameter '{unknown[0]}': known are "
            f"{', '.join(known) or 'none'}"
        )
    return {key: _convert(kind.name, key, value, known[key].type) for key, value in given.items()}


def _convert(detector: str, key: str, value: str, kind: Any) -> Any:
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    words = [word for each in options if get_origin(each) is Literal for word in get_args(each)]
    if value in words or str in options:
        return value
    number = next((each for each in options if each in (bool, int, float)), None)
    if number is None:
        raise DetectorError(f"{detector}.{key}={value}: expected one of {', '.join(words)}")
    truth = {"true": True, "false": False}
    try:
        return truth[value.lower()] if number is bool else number(value)
    except (KeyError, ValueError) as error:
        expected = " or ".join([number.__name__, *words])
        raise DetectorError(f"{detector}.{key}={value}: expected {expected}") from error


def require_positive(detector: str, **values: float) -> None:
    """Raises DetectorError for a hyper-parameter that is not a positive number."""
    for key, value in values.items():
        if not value > 0:
            raise DetectorError(f"{detector}.{key}={value:g} must be positive")


def require_between(detector: str, low: float, high: float, **values: float) -> None:
    """Raises DetectorError for a hyper-parameter outside low … high."""
    for key, value in values.items():
        if not low <= value <= high:
            raise DetectorError(f"{detector}.{key}={value:g} must be in {low:g} … {high:g}")


def require_fraction(detector: str, **values: float) -> None:
    """Raises DetectorError for a hyper-parameter that is not a fraction, which a percentage may
    have been taken for."""
    for key, value in values.items():
        if not 0 <= value <= 1:
            raise DetectorError(
                f"{detector}.{key}={value:g} must be in 0 … 1, a fraction and not a percentage"
            )


def require_percent(detector: str, ends: tuple[float, float] = (1, 99), /, **values: float) -> None:
    """Raises DetectorError for a percentile that is not in percent, between two ends."""
    low, high = ends
    for key, value in values.items():
        if not low <= value <= high:
            raise DetectorError(
                f"{detector}.{key}={value:g} must be in {low:g} … {high:g}: a percentage, not a "
                "fraction"
            )
