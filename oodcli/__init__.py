"""Find the images that an image classifier should not be trusted on, using its checkpoint."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from oodcli._version import __version__
from oodcli.errors import OodcliError

if TYPE_CHECKING:
    from oodcli.api import (
        demo,
        evaluate,
        extract,
        fit,
        inspect,
        invert,
        limit_pixels,
        load_classifier,
        load_detector,
        merge,
        prepare,
        record,
        score,
        show,
    )
    from oodcli.detectors.base import Detector
    from oodcli.features import Features

__all__ = [
    "Detector",
    "Features",
    "OodcliError",
    "__version__",
    "demo",
    "evaluate",
    "extract",
    "fit",
    "inspect",
    "invert",
    "limit_pixels",
    "load_classifier",
    "load_detector",
    "merge",
    "prepare",
    "record",
    "score",
    "show",
]

_WHERE = {"Detector": "oodcli.detectors.base", "Features": "oodcli.features"}
"""Modules of the names that do not live in oodcli.api."""

if not TYPE_CHECKING:  # or mypy would take any name for one of these

    def __getattr__(name: str) -> Any:
        """Import a name on first use: importing torch takes a second, which ``--help`` avoids."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_WHERE.get(name, "oodcli.api")), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
