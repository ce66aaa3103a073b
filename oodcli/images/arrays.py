"""Images that are arrays already: .npz files, and the virtual images of ``oodcli invert``."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from lzma import LZMAError
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from oodcli.errors import CheckpointError, ImagesError
from oodcli.images.decoding import decode_rows
from oodcli.images.labels import UNKNOWN, Labels, match, numbered, unknown, written
from oodcli.images.source import Fetch, ImageSource, Rows
from oodcli.images.words import printable, unreadable_file
from oodcli.networks.preprocessing import Preprocessing

MOST_ROWS = 1 << 28
MOST_CLASSES = 1 << 20
LARGEST_WHOLE = 1 << 30
BLOCK_BYTES = 1 << 24
"""Images are read so many bytes at a time, or one at a time."""

DAMAGE = (zlib.error, LZMAError, RuntimeError, NotImplementedError, OverflowError, MemoryError)
"""What reading on in an archive can raise besides; RuntimeError: it is encrypted."""

VIRTUAL_FORMAT = "oodcli-virtual"
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, Pillow's weights of RGB → grey


class ArchiveOfArrays(ImageSource):
    """An .npz: ``images`` uint8 (N, H, W, C) or (N, H, W), C = 1, 3 or 4 (alpha is dropped);
    ``labels`` (N,), class numbers or names; ``classes``, the names that the numbers stand for.

    The images are read from front to back as they are asked for, never as a whole.
    """

    grain = 256

    def __init__(self, path: Path, class_names: Sequence[str]) -> None:
        self.name = str(path)
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                if "images.npy" not in archive.namelist():
                    held = ", ".join(printable(name) for name in archive.namelist()) or "nothing"
                    raise ImagesError(
                        f"{path} has no array 'images' (it holds {held}): save it with "
                        "numpy.savez(FILE, images=…, labels=…)"
                    )
                with archive.open("images.npy") as member:
                    self._shape, self._columns_first, kind = _header(member)
                self._check(kind)
                labels = _small_array(archive, "labels", len(self))
                classes = _small_array(archive, "classes", MOST_CLASSES)
        except ImagesError:
            raise
        except Exception as error:  # zipfile, zlib and numpy raise almost anything
            raise ImagesError(
                f"{path} is damaged or not an .npz file: {unreadable_file(error)}"
            ) from error
        self.grain = max(1, min(self.grain, BLOCK_BYTES // self._row_bytes))
        self.read_as(self._read_labels(labels, classes, class_names))

    def _check(self, kind: np.dtype[Any]) -> None:
        shape = self._shape
        if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3, 4)):
            hint = "transpose it" if len(shape) == 4 and shape[1] in (1, 3) else "reshape it"
            raise ImagesError(
                f"{self.name}: 'images' has shape {shape}, expected (N, height, width, 3) or "
                f"(N, height, width): {hint}"
            )
        if kind != np.uint8:
            raise ImagesError(
                f"{self.name}: 'images' is {kind}, expected uint8: save pixels of 0 to 255"
            )
        if 0 in shape:
            raise ImagesError(f"{self.name}: 'images' is empty, its shape is {shape}")
        limit = Image.MAX_IMAGE_PIXELS
        too_many = limit is not None and shape[1] * shape[2] > limit
        if min(shape) < 0 or shape[0] > MOST_ROWS or too_many:
            raise ImagesError(
                f"{self.name}: 'images' claims the shape {shape}, too large for an array of images "
                "(a decompression bomb?)"
            )
        if self._columns_first and math.prod(shape) > LARGEST_WHOLE:
            raise ImagesError(
                f"{self.name}: 'images' is in Fortran order, which must be read as a whole, and "
                "too large for that: save numpy.ascontiguousarray(images)"
            )

    def _read_labels(
        self,
        labels: NDArray[Any] | None,
        classes: NDArray[Any] | None,
        class_names: Sequence[str],
    ) -> Labels:
        if labels is None:
            return unknown(len(self))
        if labels.size != len(self) or labels.dtype.kind not in "iuUS":
            raise ImagesError(
                f"{self.name}: 'labels' is {labels.dtype} of shape {labels.shape}, expected "
                f"{len(self)} class numbers or names"
            )
        if labels.dtype.kind in "US":
            return written(_texts(labels), class_names, "labels")
        numbers = torch.from_numpy(labels.reshape(-1).astype(np.int64))
        if classes is None:
            return numbered(numbers, len(class_names), "labels")
        names = _texts(classes)
        if int(numbers.min()) < UNKNOWN or int(numbers.max()) >= len(names):
            raise ImagesError(
                f"{self.name}: 'labels' go from {int(numbers.min())} to {int(numbers.max())}, but "
                f"'classes' has {len(names)} names"
            )
        return match(names, class_names, "classes of the file", own=True).at(numbers)

    @property
    def _values(self) -> Tensor:
        return cast(Labels, self.known).values

    def __len__(self) -> int:
        return self._shape[0]

    def weight(self, start: int, stop: int) -> int:
        return (stop - start) * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return math.prod(self._shape[1:])

    def paths(self, start: int, stop: int) -> list[str]:
        name = printable(self._path.as_posix())
        return [f"{name}[{row}]" for row in range(start, stop)]

    @contextmanager
    def reading(self) -> Iterator[Fetch]:
        if self._columns_first:  # rows are scattered all over such a file: there is no other way
            try:
                with np.load(self._path, allow_pickle=False) as arrays:
                    whole = arrays["images"]
            except Exception as error:
                raise ImagesError(f"{self.name} is damaged: {unreadable_file(error)}") from error
            yield lambda start, stop: partial(
                _decode_array, self._values[start:stop], whole[start:stop]
            )
            return
        with zipfile.ZipFile(self._path) as archive, archive.open("images.npy") as member:
            _header(member)
            data = member.tell()
            row_bytes = self._row_bytes

            def fetch(start: int, stop: int) -> partial[Rows]:
                try:
                    member.seek(data + start * row_bytes)  # no work where we are there already
                    pixels = member.read((stop - start) * row_bytes)
                    # bytearray: torch warns of tensors on memory that cannot be written
                    images = np.frombuffer(bytearray(pixels), np.uint8)
                    images = images.reshape(stop - start, *self._shape[1:])
                except (OSError, EOFError, ValueError, zipfile.BadZipFile, *DAMAGE) as error:
                    raise ImagesError(
                        f"{self.name} is damaged at image {start}: {unreadable_file(error)}"
                    ) from error
                return partial(_decode_array, self._values[start:stop], images)

            yield fetch


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, dtype; leaves the stream where the data begin."""
    version = np.lib.format.read_magic(member)
    if version != (1, 0):  # the others are for long names of fields, and their headers may be, too
        raise ValueError(f"an array in format {version[0]}.{version[1]}, expected 1.0")
    return np.lib.format.read_array_header_1_0(member)


def _small_array(archive: zipfile.ZipFile, name: str, most: int) -> NDArray[Any] | None:
    """An array of at most so many elements, None where the archive has none of that name. Raises
    ValueError for more: numpy would make room for whatever the header claims."""
    if f"{name}.npy" not in archive.namelist():
        return None
    with archive.open(f"{name}.npy") as member:
        shape, _, kind = _header(member)
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count > most or count * kind.itemsize > LARGEST_WHOLE:
        raise ValueError(f"'{name}' is {kind} of shape {shape}, expected at most {most} of them")
    with archive.open(f"{name}.npy") as member:
        array: NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
    return array


def _texts(names: NDArray[Any]) -> list[str]:
    return [
        name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)
        for name in names.reshape(-1).tolist()
    ]


def _decode_array(labels: Tensor, images: NDArray[np.uint8], preprocessing: Preprocessing) -> Rows:
    """images: (n, H, W, C) or (n, H, W). Without a loop where size and colours fit already."""
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]  # (n, H, W)
    if images.ndim == 4:
        images = images[..., :3]  # (n, H, W, 3)
    height, width = preprocessing.input_size
    resized = preprocessing.resize not in (None, min(height, width), (height, width))
    grey = images.ndim == 3
    if (
        images.shape[1:3] == (height, width)
        and not resized
        and (grey or preprocessing.channels == 3)
    ):
        pixels = torch.from_numpy(images)
        if grey:
            pixels = pixels[..., None].expand(-1, -1, -1, preprocessing.channels)
        return Rows(labels, [None] * len(images), pixels)
    loads = [partial(Image.fromarray, np.ascontiguousarray(image)) for image in images]
    return decode_rows(labels, loads, preprocessing)


class VirtualImages(ImageSource):
    """Images made by ``oodcli invert``, an HDF5 file with the root attributes
    ``format="oodcli-virtual"`` and ``preprocessing`` (JSON), and the datasets ``/images`` float16
    (N, C, H, W), normalised by that preprocessing, and ``/label`` int64 (N,).

    They are taken back to pixels, which are not clipped, brought to the size that is asked for,
    and normalised anew. labels: (N,) int64, -1 = unknown.
    """

    grain = 64

    def __init__(self, path: Path, preprocessing: Preprocessing, num_classes: int) -> None:
        from oodcli.files.hdf5 import VERSION, dataset, opened

        self.name = str(path)
        self._path = path
        try:
            with opened(path) as file:
                self._check_format(file.attrs.get("format"))
                if int(file.attrs.get("version", VERSION)) > VERSION:
                    raise ImagesError(
                        f"{path} has format version {file.attrs['version']}, this oodcli reads "
                        f"{VERSION}: use a newer oodcli, or run oodcli invert again"
                    )
                self._made_by = Preprocessing.from_dict(json.loads(file.attrs["preprocessing"]))
                shape = dataset(file, "images", "f", by_rows=True).shape
                labels = dataset(file, "label", "iu")[()]
        except (
            *(LookupError, TypeError, ValueError, AttributeError, CheckpointError, OverflowError),
            *(RecursionError, MemoryError),
        ) as error:
            raise ImagesError(
                f"{path} lacks a part of a virtual file ({unreadable_file(error)}): run oodcli "
                "invert again"
            ) from error
        except (OSError, RuntimeError) as error:
            raise ImagesError(
                f"{path} is damaged, truncated or not an HDF5 file: run oodcli invert again"
            ) from error
        if len(shape) != 4 or shape[1] != self._made_by.channels or labels.shape != shape[:1]:
            raise ImagesError(
                f"{path}: /images has shape {shape} and /label {labels.shape}, expected "
                f"(N, {self._made_by.channels}, height, width) and (N,): run oodcli invert again"
            )
        if 0 in shape:
            raise ImagesError(f"{path} has no images: run oodcli invert again")
        found = numbered(
            torch.from_numpy(labels.astype(np.int64)),
            num_classes,
            "labels of the virtual images",
            exact=True,
        )
        self.labels = found.values
        self._row_bytes: int = 4 * math.prod(shape[1:])
        self.grain = max(1, min(self.grain, BLOCK_BYTES // self._row_bytes))
        made, wanted = self._made_by.input_size, preprocessing.input_size
        size_note = (
            f"virtual images of {made[0]}x{made[1]} are resized to {wanted[0]}x{wanted[1]}: they "
            "were made for another network"
        )
        notes = [found.note, size_note if made != wanted else None]
        self.note = "; ".join(note for note in notes if note) or None
        self.labelled = bool((self.labels >= 0).any())

    def weight(self, start: int, stop: int) -> int:
        return (stop - start) * self._row_bytes

    def _check_format(self, found: Any) -> None:
        if found == "oodcli-features":
            raise ImagesError(
                f"{self.name} is a feature cache, not images: use 'oodcli score CACHE.h5' or "
                "'oodcli fit CACHE.h5', without a checkpoint"
            )
        if found != VIRTUAL_FORMAT:
            raise ImagesError(
                f"{self.name} is an HDF5 file, but not one of virtual images: create one with "
                "oodcli invert"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def paths(self, start: int, stop: int) -> list[str]:
        name = printable(self._path.as_posix())
        return [f"{name}[{row}]" for row in range(start, stop)]

    @contextmanager
    def reading(self) -> Iterator[Fetch]:
        from oodcli.files.hdf5 import opened

        with opened(self._path) as file:
            images = file["images"]

            def fetch(start: int, stop: int) -> partial[Rows]:
                try:
                    normalised = torch.from_numpy(images[start:stop].astype(np.float32))
                except (OSError, RuntimeError, ValueError, MemoryError) as error:
                    raise ImagesError(
                        f"{self.name} is damaged at image {start}: run oodcli invert again"
                    ) from error
                return partial(self._decode, self.labels[start:stop], normalised)

            yield fetch

    def _decode(self, labels: Tensor, normalised: Tensor, preprocessing: Preprocessing) -> Rows:
        pixels = self._made_by.to_pixels(normalised)  # (n, C, H, W)
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, preprocessing.channels, -1, -1)
        elif preprocessing.channels == 1:
            pixels = (pixels * pixels.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
        if tuple(pixels.shape[2:]) != preprocessing.input_size:
            like = {"nearest": "nearest", "bicubic": "bicubic", "lanczos": "bicubic"}
            mode = like.get(preprocessing.interpolation, "bilinear")
            pixels = torch.nn.functional.interpolate(
                pixels, preprocessing.input_size, mode=mode, antialias=mode != "nearest"
            )
        return Rows(labels, [None] * len(pixels), pixels)
