"""Every detector, by name. One file per method; nothing is imported before it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from oodcli.errors import DetectorError

if TYPE_CHECKING:
    from oodcli.detectors.base import Detector

_WHERE = {
    "msp": "msp:MSP",
    "energy": "energy:Energy",
    "odin": "odin:ODIN",
    "c2ir": "c2ir:C2IR",
    "c2ir-z": "c2ir_z:C2IRZ",
}
"""Name → module and class. A new detector is one new file and one line here."""


def names() -> tuple[str, ...]:
    """Every detector's name, in the order of the listings. Imports nothing."""
    return tuple(_WHERE)


def get(name: str) -> type[Detector]:
    """The class of a detector. Raises DetectorError for an unknown name."""
    if name not in _WHERE:
        raise DetectorError(
            f"no detector is called '{name}': known are {', '.join(_WHERE)} "
            "(a fitted one is given by the path of its .safetensors file)"
        )
    module, attribute = _WHERE[name].split(":")
    found: type[Detector] = getattr(import_module(f"oodcli.detectors.{module}"), attribute)
    return found
