"""Virtual images in HDF5, as ``invert`` writes and ``extract`` reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodcli.files.hdf5 import (
    ROWS_SHA256,
    Provenance,
    checked,
    damage,
    dataset,
    group_of,
    reading,
    write_constant,
)

BLOCK_ROWS = 256
FORMAT = "oodcli-virtual"
MADE_BY = "oodcli invert"


def listed(images: NDArray[np.float16], labels: NDArray[np.int64]) -> Iterator[bytes]:
    """The input of ``rows_sha256``: the bytes of each image, followed by its label's."""
    for image, label in zip(images, labels, strict=True):
        yield image.tobytes() + label.tobytes()


class VirtualWriter:
    """Datasets ``/images`` (N, C, H, W) float16 in normalised space, ``/label`` (N,) int64,
    ``/layers/<name>/sensitivity`` (N, C) float32; batches are appended in turn. The
    checksum of the list is taken as they pass; ``finish`` writes it."""

    def __init__(
        self, file: h5py.File, provenance: Provenance, count: int, settings: Mapping[str, Any]
    ) -> None:
        provenance.write(file, FORMAT)
        file.attrs["settings"] = json.dumps(settings)
        channels = provenance.preprocessing.channels
        height, width = provenance.preprocessing.input_size
        self._file = file
        self._row = 0
        shape = (count, channels, height, width)
        self._images = file.create_dataset("images", shape, "float16", **checked(shape, 2))
        self._label = file.create_dataset("label", (count,), "int64", **checked((count,), 8))
        self._list = hashlib.sha256()

    def append(self, images: Tensor, label: Tensor, sensitivity: Mapping[str, Tensor]) -> None:
        start, stop = self._row, self._row + len(images)
        pixels, labels = images.half().numpy(), label.long().numpy()
        self._images[start:stop] = pixels
        self._label[start:stop] = labels
        for row in listed(pixels, labels):
            self._list.update(row)
        for order, (name, rows) in enumerate(sensitivity.items()):
            where = f"layers/{name}/sensitivity"
            if where not in self._file:
                shape = (len(self._label), rows.shape[1])
                self._file.create_dataset(where, shape, "float32", **checked(shape, 4))
                self._file[f"layers/{name}"].attrs["order"] = order
            self._file[where][start:stop] = rows.float().numpy()
        self._row = stop

    def finish(
        self, quality: Mapping[str, Any], sums: Mapping[str, NDArray[np.float64]] | None = None
    ) -> None:
        """sums: sums behind the quality of a shard, for the quality of the whole. Raises ValueError
        if images are missing."""
        if self._row != len(self._label):
            raise ValueError(f"{self._row} of {len(self._label)} images were made")
        self._file.attrs["quality"] = json.dumps(quality)
        for name, numbers in (sums or {}).items():
            write_constant(self._file, f"quality/{name}", numbers)
        self._file.attrs[ROWS_SHA256] = self._list.hexdigest()


class VirtualFile:
    """An open file of virtual images. count: their number. sums: sums behind the quality of a
    shard; otherwise empty."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file
        with damage(path):
            self.provenance = Provenance.read(file)
            self.settings: dict[str, Any] = json.loads(file.attrs.get("settings", "{}"))
            self._images = dataset(file, "images", "f", by_rows=True)
            self._label = dataset(file, "label", "iu")
            self._layers = dict(
                sorted(sensitivities(file).items(), key=lambda item: _order(file, item[0]))
            )
            self.count = len(self._images)
            lengths = {len(self._label), *map(len, self._layers.values())}
            if lengths != {self.count}:
                raise ValueError(f"{self.count} images, but {sorted(lengths)} rows of the rest")
            self.sums = self._read_sums()

    def _read_sums(self) -> dict[str, NDArray[np.float64]]:
        found = group_of(self._file, "quality")
        names = ["counts"] if "counts" in found else []
        for kind in ("moments", "memory"):
            layers = group_of(self._file, f"quality/{kind}")
            ordered = sorted(layers, key=lambda name: _order(self._file, name))
            names += [f"{kind}/{name}" for name in ordered]
        return {name: dataset(self._file, f"quality/{name}", "f")[()] for name in names}

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """Images (n, C, H, W) float16, labels (n,) and sensitivities, as ``VirtualWriter`` takes
        them."""
        for start in range(0, self.count, size):
            part = slice(start, start + size)
            with damage(self.path):
                images = torch.from_numpy(self._images[part].astype(np.float16, copy=False))
                label = torch.from_numpy(self._label[part].astype(np.int64, copy=False))
                layers = {
                    name: torch.from_numpy(rows[part].astype(np.float32, copy=False))
                    for name, rows in self._layers.items()
                }
            yield images, label, layers


def _order(file: h5py.File, layer: str) -> int:
    return int(group_of(file, "layers").get(layer, file).attrs.get("order", 0))


@contextmanager
def open_virtual(path: Path) -> Iterator[VirtualFile]:
    """Open virtual images. Raises FileError for a file that is damaged or does not hold any."""
    with reading(path, FORMAT, MADE_BY) as file:
        yield VirtualFile(path, file)


def read_provenance(path: Path) -> Provenance:
    """Raises FileError for a file without virtual images."""
    with reading(path, FORMAT, MADE_BY) as file, damage(path):
        return Provenance.read(file)


def sensitivities(file: h5py.File) -> dict[str, h5py.Dataset]:
    """Layer → (N, C) float32. Raises TypeError or ValueError, so it goes into a ``damage``."""
    found = {}
    for name in group_of(file, "layers"):
        group = group_of(file, f"layers/{name}")
        if "sensitivity" in group:
            rows = dataset(file, f"layers/{name}/sensitivity", "f", by_rows=True)
            if rows.ndim != 2:
                raise ValueError(f"/layers/{name}/sensitivity has shape {rows.shape}")
            found[name] = rows
    return found


def has_sensitivity(path: Path) -> bool:
    """Whether the file has sensitivities. Raises FileError when the file is damaged."""
    with reading(path, FORMAT, MADE_BY) as file, damage(path):
        return bool(sensitivities(file))


def read_sensitivity(path: Path, start: int, stop: int) -> dict[str, Tensor]:
    """Layer → (stop − start, C) float32. Raises FileError when the file is damaged."""
    with reading(path, FORMAT, MADE_BY) as file, damage(path):
        found = {}
        for name, sensitivity in sensitivities(file).items():
            rows = sensitivity[start:stop]
            if len(rows) != stop - start:
                raise ValueError(f"/layers/{name}/sensitivity has {len(sensitivity)} rows")
            found[name] = torch.from_numpy(rows.astype(np.float32, copy=False))
        return found
