"""Virtual images in HDF5, as ``invert`` writes and ``extract`` reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor

from oodcli.files.hdf5 import Provenance, damage, reading

FORMAT = "oodcli-virtual"
MADE_BY = "oodcli invert"


class VirtualWriter:
    """Datasets ``/images`` (N, C, H, W) float16 in normalised space, ``/label`` (N,) int64,
    ``/layers/<name>/sensitivity`` (N, C) float32; batches are appended in turn."""

    def __init__(
        self, file: h5py.File, provenance: Provenance, count: int, settings: Mapping[str, Any]
    ) -> None:
        provenance.write(file, FORMAT)
        file.attrs["settings"] = json.dumps(settings)
        channels = provenance.preprocessing.channels
        height, width = provenance.preprocessing.input_size
        self._file = file
        self._row = 0
        self._images = file.create_dataset(
            "images",
            (count, channels, height, width),
            "float16",
            chunks=(1 if height * width > 10_000 else min(count, 64), channels, height, width),
        )
        self._label = file.create_dataset("label", (count,), "int64")

    def append(self, images: Tensor, label: Tensor, sensitivity: Mapping[str, Tensor]) -> None:
        start, stop = self._row, self._row + len(images)
        self._images[start:stop] = images.numpy()
        self._label[start:stop] = label.numpy()
        for order, (name, rows) in enumerate(sensitivity.items()):
            where = f"layers/{name}/sensitivity"
            if where not in self._file:
                self._file.create_dataset(where, (len(self._label), rows.shape[1]), "float32")
                self._file[f"layers/{name}"].attrs["order"] = order
            self._file[where][start:stop] = rows.numpy()
        self._row = stop

    def finish(self, quality: Mapping[str, Any]) -> None:
        self._file.attrs["quality"] = json.dumps(quality)


def read_provenance(path: Path) -> Provenance:
    """Raises FileError when path is no file of virtual images."""
    with reading(path, FORMAT, MADE_BY) as file, damage(path):
        return Provenance.read(file)


def read_sensitivity(path: Path, start: int, stop: int) -> dict[str, Tensor]:
    """Layer → (stop − start, C) float32. Raises FileError when the file is damaged."""
    with reading(path, FORMAT, MADE_BY) as file, damage(path):
        layers = file.get("layers", {})
        return {
            name: torch.from_numpy(group["sensitivity"][start:stop])
            for name, group in layers.items()
            if "sensitivity" in group
        }
