"""IMAGES of the command line → batches of paths, labels and normalised tensors."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oodcli.images.opening import open_images
    from oodcli.images.reading import batches
    from oodcli.images.source import Batch, ImageSource

__all__ = ["Batch", "ImageSource", "batches", "open_images"]

_MODULES = {
    "Batch": "source",
    "ImageSource": "source",
    "batches": "reading",
    "open_images": "opening",
}

if not TYPE_CHECKING:  # or mypy would take any name for one of these

    def __getattr__(name: str) -> Any:
        """Imports what is asked for, when it is: the processes that decode images import
        ``oodcli.images.worker``, and to import torch would take each of them seconds."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
