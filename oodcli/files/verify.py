"""Verify a file by its checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import h5py
import numpy as np
from numpy.typing import NDArray

from oodcli import detectors
from oodcli.errors import FileError
from oodcli.files import cache, virtual
from oodcli.files.artefact import TENSORS_SHA256, read_artefact, read_header, tensors_sha256
from oodcli.files.describe import Kind, describe_file
from oodcli.files.hashes import file_sha256
from oodcli.files.hdf5 import ROWS_SHA256, SHA256, damage, dataset, reading
from oodcli.files.hub import checkpoint_sha256
from oodcli.files.made import SHA256 as SCORES_SHA256
from oodcli.files.made import made_path, read_made

BLOCK_BYTES = 1 << 25
DEEPEST = 16
"""Levels of nested groups; a group that contains itself has no end."""

UNKNOWN = "not checked: no checksum was stored when the file was written"

Checks: TypeAlias = Iterator[tuple[str, str]]
"""Name of a check, and its result."""


def verify(path: Path, kind: Kind, checkpoint: Path | None = None) -> Checks:
    """Recompute every checksum of a file. checkpoint: the checkpoint that the file should come
    from. Raises FileError at the first mismatch, with both values."""
    if kind == "virtual":
        yield from _virtual(path)
    elif kind == "features":
        yield from _features(path)
    elif kind == "detector":
        yield from _detector(path)
    elif kind.startswith("scores."):
        yield from _scores(path)
    elif kind == "checkpoint":
        raise FileError(
            f"{path} is a checkpoint, which has no checksums of its own: check a file against it "
            f"with 'oodcli inspect --verify FILE {path}'"
        )
    else:
        raise FileError(
            f"{path} has no checksums: only virtual images, feature caches, detectors and scores do"
        )
    if checkpoint is not None:
        made = describe_file(path, kind)["made"]
        if made is None:
            raise FileError(f"{path} does not name its checkpoint")
        recorded = made["checkpoint_sha256"]
        try:
            found = checkpoint_sha256(checkpoint)
        except OSError as error:
            raise FileError(f"{checkpoint} cannot be read: {error.strerror or error}") from error
        if found != recorded:
            raise FileError(
                f"{path} was made from the checkpoint {recorded[:12]}…, but {checkpoint} is "
                f"{found[:12]}…"
            )
        yield "checkpoint", f"{checkpoint} is {found[:12]}…, from which the file was made"


def _virtual(path: Path) -> Checks:
    with reading(path, virtual.FORMAT, virtual.MADE_BY) as file, damage(path):
        images = dataset(file, "images", "f", by_rows=True)
        labels = dataset(file, "label", "iu")
        names = [f"layers/{name}/sensitivity" for name in virtual.sensitivities(file)]
        for name in ("label", *names):
            if len(file[name]) != len(images):
                raise FileError(
                    f"{path}: /{name} has {len(file[name])} rows, but /images has {len(images)}: "
                    "the file is damaged, create it again"
                )
        yield "rows", f"{len(images)} in each of {2 + len(names)} datasets"
        listed = (virtual.listed(images[part], labels[part]) for part in _parts(images))
        yield "list", _list(path, file, chain.from_iterable(listed), "images and labels")
        good = np.ones(len(images), dtype=np.bool_)
        yield from _contents(path, file, ("images", *names), good)


def _features(path: Path) -> Checks:
    with reading(path, cache.FORMAT, "oodcli extract") as file:
        opened = cache.FeatureCache(path, file)  # refuses datasets of different lengths
        yield "rows", f"{opened.count} in each of {3 + len(opened.widths)} datasets"
        good: list[bool] = []

        def listed() -> Iterator[bytes]:
            for paths, labels, errors in opened.listing():
                good.extend(not error for error in errors)
                yield cache.listed(paths, labels, errors)

        yield "list", _list(path, file, listed(), "paths, labels and errors")
        yield from _contents(path, file, opened.widths, np.array(good, dtype=np.bool_))


def _list(path: Path, file: h5py.File, listed: Iterable[bytes], what: str) -> str:
    digest = hashlib.sha256()
    for row in listed:
        digest.update(row)
    found, recorded = digest.hexdigest(), file.attrs.get(ROWS_SHA256)
    if recorded is None:
        return UNKNOWN
    if found != recorded:
        raise FileError(
            f"{path}: {ROWS_SHA256} is {recorded[:12]}…, but its {what} give {found[:12]}…: rows "
            "were changed, added or removed; create the file again"
        )
    return f"{ROWS_SHA256} {found[:12]}… is that of the {what}"


def _contents(
    path: Path, file: h5py.File, rowwise: Iterable[str], good: NDArray[np.bool_]
) -> Checks:
    """The numbers of every dataset against its checksums: HDF5's, which it checks as it reads, and
    the SHA-256 of older files. Those of the ``good`` rows of ``rowwise`` must be finite. One pass.
    """
    with damage(path):
        datasets = list(_datasets(file))
    rowwise = set(rowwise)
    known = 0
    for name in datasets:
        dataset = file[name]
        recorded = dataset.attrs.get(SHA256)
        has_checksum = recorded is not None or dataset.fletcher32
        if not has_checksum and name not in rowwise:
            continue
        digest = hashlib.sha256()
        with damage(path):
            if not dataset.shape and recorded is not None:
                digest.update(dataset[()])
            for part in _parts(dataset):
                block = dataset[part]
                if recorded is not None:
                    digest.update(block)
                if name in rowwise:
                    _require_finite(path, name, block, part.start, good[part])
        if recorded is not None and digest.hexdigest() != recorded:
            raise FileError(
                f"{path}: /{name} was written with the sha256 {recorded[:12]}…, but has "
                f"{digest.hexdigest()[:12]}…: the file is damaged, create it again"
            )
        known += has_checksum
    yield "contents", f"{known} datasets match their checksums" if known else UNKNOWN
    yield "numbers", f"finite in all {int(good.sum())} rows without an error"


def _datasets(group: h5py.Group, depth: int = 0) -> Iterator[str]:
    """The paths of all datasets below a group. Not by ``visititems``: that asks how large their
    indices are, on which the HDF5 library (as of 2.0) crashes where they are damaged."""
    if depth > DEEPEST:
        raise ValueError(f"{group.name} is too deep")
    for name in group:
        if isinstance(group.get(name, getlink=True), h5py.HardLink):
            each = group[name]
            if isinstance(each, h5py.Group):
                yield from _datasets(each, depth + 1)
            elif isinstance(each, h5py.Dataset):
                yield each.name.lstrip("/")


def _require_finite(
    path: Path, name: str, block: NDArray[np.float32], start: int, good: NDArray[np.bool_]
) -> None:
    flat = block.reshape(len(block), -1)
    bad = np.flatnonzero(good & ~np.isfinite(flat).all(1))
    if len(bad):
        first = flat[bad[0]]
        raise FileError(
            f"{path}: /{name} holds {first[~np.isfinite(first)][0]} in row {start + bad[0]}, "
            "expected a finite number, as the row has no error"
        )


def _parts(dataset: h5py.Dataset) -> Iterator[slice]:
    """All rows of a dataset, in blocks; nothing for a single number."""
    if not dataset.shape:
        return
    row = dataset.dtype.itemsize * int(np.prod(dataset.shape[1:]))
    step = max(1, BLOCK_BYTES // max(row, 1))
    for start in range(0, len(dataset), step):
        yield slice(start, start + step)


def _detector(path: Path) -> Checks:
    metadata, shapes = read_header(path)
    recorded = metadata.get(TENSORS_SHA256)
    if recorded is None:
        yield "tensors", UNKNOWN
    else:
        found = tensors_sha256(path)
        if found != recorded:
            raise FileError(
                f"{path}: {TENSORS_SHA256} is {recorded[:12]}…, but its tensors give "
                f"{found[:12]}…: the file is damaged, fit it again"
            )
        yield "tensors", f"{TENSORS_SHA256} {found[:12]}… is that of its {len(shapes)} tensors"
    name = metadata.get("detector", "")
    if name and not detectors.is_known(name):
        yield "detector", f"not checked: the code of '{name}' is not part of oodcli"
        return
    artefact = read_artefact(path)
    yield "detector", f"{artefact.detector.name} is made of them"


def _scores(path: Path) -> Checks:
    made = read_made(path)
    if made is None:
        yield "scores", f"not checked: no {made_path(path).name} beside it describes it"
        return
    found = file_sha256(path)
    if found != made[SCORES_SHA256]:
        raise FileError(
            f"{path}: {SCORES_SHA256} is {made[SCORES_SHA256][:12]}… in {made_path(path).name}, "
            f"but the file has {found[:12]}…: it was edited or damaged; score again"
        )
    yield "scores", f"{SCORES_SHA256} {found[:12]}… is that of the file"
