"""IMAGES of the command line → a source."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from oodcli.errors import ImagesError
from oodcli.images.arrays import ArchiveOfArrays, VirtualImages
from oodcli.images.files import (
    FileList,
    TarOfImages,
    ZipOfImages,
    folder,
    list_from_stream,
    list_from_text,
)
from oodcli.images.generated import Noise, TorchvisionImages
from oodcli.images.pieces import is_remote
from oodcli.images.pixels import SUFFIXES
from oodcli.images.source import ImageSource
from oodcli.networks.preprocessing import Preprocessing

LISTS = (".txt", ".lst", ".list", ".csv", ".tsv", "")
TARS = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz")
VIRTUAL = (".h5", ".hdf5")
KINDS = (
    "a folder, a text list, an .npz, a .tar or .zip of images, a virtual .h5, "
    "torchvision:DATASET, noise:KIND, or - for a list on standard input"
)


def open_images(
    spec: str,
    preprocessing: Preprocessing,
    class_names: Sequence[str],
    *,
    stdin: TextIO | None = None,
) -> ImageSource:
    """The source that ``spec`` names: one of the kinds of IMAGES, or one image file. class_names:
    the network's; "0", "1", … if it has none. Only names, labels and headers are read here; the
    source's ``note`` is for the user. Raises ImagesError if there is nothing to read, the file is
    damaged, or its kind is unknown."""
    scheme, colon, rest = spec.partition(":")
    if colon and scheme == "noise":
        return Noise(spec, rest)
    if colon and scheme == "torchvision":
        return TorchvisionImages(spec, rest, class_names)
    if spec == "-":
        return list_from_stream(sys.stdin if stdin is None else stdin, class_names)
    if not spec:  # an unset variable of a shell; as a path it would be the working directory
        raise ImagesError(f"IMAGES is empty (an unset shell variable?): give {KINDS}")
    path = Path(spec)
    if os.path.isdir(path):  # unlike Path.is_dir, False for what is out of reach
        return folder(path, class_names)
    if is_remote(spec):
        raise ImagesError(
            f"{spec}: addresses, patterns of .tar files and Parquet files of images need 'oodcli "
            "score … --engine ray'"
        )
    if not os.path.exists(path):
        raise ImagesError(f"{spec} does not exist, or cannot be reached: give {KINDS}")
    name = path.name.lower()
    if name.endswith(".npz"):
        return ArchiveOfArrays(path, class_names)
    if name.endswith(".zip"):
        return ZipOfImages(path, class_names)
    if name.endswith(TARS):
        return TarOfImages(path, class_names)
    if name.endswith(VIRTUAL):
        return VirtualImages(path, preprocessing, len(class_names))
    if path.suffix.lower() in SUFFIXES:
        return FileList(spec, [spec])
    if path.suffix.lower() in LISTS:
        return list_from_text(path, class_names)
    raise ImagesError(
        f"{spec}: files with the suffix '{path.suffix}' are not supported: give {KINDS}"
    )
