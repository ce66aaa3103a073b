"""The feature cache: the records of each image, in HDF5."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodcli.errors import FileError
from oodcli.features import (
    INPUT,
    MAKINGS,
    BatchNorm,
    DropoutPasses,
    Features,
    Layer,
    LinearHead,
    Making,
    ProSteps,
    Rows,
    concatenate,
)
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
from oodcli.records import LAYER_PARTS, NORM_PARTS, WHOLE, field_of, word_of

FORMAT = "oodcli-features"

LOGITS_LEVEL = "logits_level"
"""Root attribute, False if /logits are log-probabilities; otherwise absent."""

MULTI_LABEL = "multi_label"
"""Root attribute, True if each label has its own sigmoid; otherwise absent."""

POOLED = "pooled"
"""Root attribute, True if /embedding is the mean of the last map; otherwise absent."""

LATER = {"where"}
"""Attributes of how a record was made that older files lack; their defaults hold."""

BLOCK_BYTES = 1 << 26
BLOCK_ROWS = 8192


def listed(paths: Sequence[str], labels: Tensor, errors: Sequence[str | None]) -> bytes:
    """The input of ``rows_sha256``: path, label and error of each row, each followed by a NUL,
    which text in HDF5 cannot contain."""
    rows = zip(paths, labels.tolist(), errors, strict=True)
    return "".join(f"{path}\0{label}\0{error or ''}\0" for path, label, error in rows).encode()


class CacheWriter:
    """Appends blocks of N rows in turn; unreadable images keep a row of NaN and their error. The
    checksum of the list is computed as rows are written, and stored after all ``count`` rows.
    Raises ValueError for a block with other records than the first."""

    def __init__(self, file: h5py.File, provenance: Provenance, count: int) -> None:
        provenance.write(file, FORMAT)
        self._file = file
        self._count = count
        self._row = 0
        text = h5py.string_dtype("utf-8")
        self._path = file.create_dataset("path", (count,), text)
        self._error = file.create_dataset("error", (count,), text)
        self._label = file.create_dataset(
            "label", (count,), "int64", fillvalue=-1, **checked((count,), 8)
        )
        self._rows: dict[str, h5py.Dataset] = {}
        self._list = hashlib.sha256()

    def append(self, rows: Rows) -> None:
        start, stop = self._row, self._row + len(rows.paths)
        if rows.features is not None:
            named = {
                name: tensor for name, tensor in rows.features.rows().items() if name != "label"
            }
            if not self._rows:
                self._create(rows.features, named)
            if named.keys() != self._rows.keys():
                raise ValueError("these rows record something else than the first ones")
            good = np.array([error is None for error in rows.errors])
            for name, tensor in named.items():
                values = np.full((len(rows.paths), tensor.shape[1]), np.nan, dtype=np.float32)
                values[good] = tensor.float().cpu().numpy()
                self._rows[name][start:stop] = values
        self._path[start:stop] = list(rows.paths)
        self._error[start:stop] = [error or "" for error in rows.errors]
        self._label[start:stop] = rows.labels.cpu().numpy()
        self._list.update(listed(rows.paths, rows.labels, rows.errors))
        self._row = stop
        self._sum_up()

    def declare(self, features: Features) -> None:
        """Create the datasets of the records, for a cache without a readable row. features: any
        number of rows, none of which is written."""
        if not self._rows:
            named = {name: rows for name, rows in features.rows().items() if name != "label"}
            self._create(features, named)
        self._sum_up()

    def _sum_up(self) -> None:
        if self._row == self._count:
            self._file.attrs[ROWS_SHA256] = self._list.hexdigest()

    def _constant(self, name: str, value: Tensor | float) -> None:
        values = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
        write_constant(self._file, name, values)

    def _create(self, features: Features, named: dict[str, Tensor]) -> None:
        for name, rows in named.items():
            shape = (self._count, rows.shape[1])
            self._rows[name] = self._file.create_dataset(
                name, shape, "float32", fillvalue=np.nan, **checked(shape, 4)
            )
        for order, (name, layer) in enumerate(features.layers.items()):
            group = self._file.require_group(f"layers/{name}")
            group.attrs["kind"], group.attrs["order"] = layer.kind, order
        for order, (name, norm) in enumerate(features.batchnorm.items()):
            group = self._file.require_group(f"batchnorm/{name}")
            group.attrs["order"] = order
            for part in ("running_mean", "running_var", "weight", "bias", "eps", "spatial_size"):
                self._constant(f"batchnorm/{name}/{part}", getattr(norm, part))
        if features.head is not None:
            self._constant("head/weight", features.head.weight)
            self._constant("head/bias", features.head.bias)
        if not features.logits_level:
            self._file.attrs[LOGITS_LEVEL] = False
        if features.multi_label:
            self._file.attrs[MULTI_LABEL] = True
        if features.pooled:
            self._file.attrs[POOLED] = True
        if features.mirror is not None:
            self._file.require_group("mirror")
        for group, making in features.made_with.items():
            self._file[group].attrs.update(asdict(making))


class FeatureCache:
    """An open cache; rows are read in blocks, so memory does not grow with their number.
    rows_sha256: of the list of its images; None in files of before."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file
        with damage(path):
            self.provenance = Provenance.read(file)
            self.rows_sha256: str | None = file.attrs.get(ROWS_SHA256)
            self._constants = self._read_constants()
            lengths = {}
            for name, kinds in (("path", "OS"), ("error", "OS"), ("label", "iu")):
                (lengths[name],) = dataset(file, name, kinds).shape
            lengths |= {n: len(file[n]) for n in self._constants.rows() if n not in lengths}
        self.recorded = self._constants.recorded
        self.made_with = self._constants.made_with
        self.count = lengths["path"]
        wrong = [name for name, length in lengths.items() if length != self.count]
        if wrong:
            raise FileError(
                f"{path}: /{wrong[0]} has {lengths[wrong[0]]} rows, but /path has {self.count}: "
                "the file is damaged, extract it again"
            )
        unlike = _unlike(self._constants, len(self.provenance.class_names))
        if unlike:
            raise FileError(f"{path}: {unlike}: the file is damaged, extract it again")

    def _read_constants(self, view: str = "") -> Features:
        """A block of no rows: everything that is not per image. view: ``mirror/`` for the mirror
        images, which share all else."""
        file = self._file

        def empty(name: str) -> Tensor | None:
            name = view + name
            if name not in file:
                return None
            shape = dataset(file, name, "f", by_rows=True).shape
            if len(shape) != 2:
                raise ValueError(f"/{name} has shape {shape}, expected a row for each image")
            return torch.zeros(0, shape[1])

        def whole(name: str) -> Tensor:
            return torch.from_numpy(dataset(file, name, "f")[()].astype(np.float32, copy=False))

        def ordered(group: str) -> list[str]:
            found = group_of(file, group)
            return sorted(found, key=lambda name: int(found[name].attrs.get("order", 0)))

        layers = {
            name: Layer(
                str(file[f"layers/{name}"].attrs["kind"]),
                **{part: empty(f"layers/{name}/{part}") for part in LAYER_PARTS},
            )
            for name in ordered("layers")
        }
        norms = {}
        for name in ordered("batchnorm"):
            group = file[f"batchnorm/{name}"]
            tensors: dict[str, Any] = {
                part: whole(f"batchnorm/{name}/{part}")
                for part in ("running_mean", "running_var", "weight", "bias")
            }
            tensors |= {part: empty(f"batchnorm/{name}/{part}") for part in NORM_PARTS}
            norms[name] = BatchNorm(
                eps=float(dataset(group, "eps", "fiu")[()]),
                spatial_size=int(dataset(group, "spatial_size", "fiu")[()]),
                **tensors,
            )
        head = None
        if "head" in file:
            head = LinearHead(whole("head/weight"), whole("head/bias"))
        return Features(
            count=0,
            label=torch.zeros(0, dtype=torch.int64),
            layers=layers,
            batchnorm=norms,
            **{field_of(place): empty(place) for place in WHOLE},
            made_with={
                group: _made_with(file[group].attrs, kind)
                for group, kind in MAKINGS.items()
                if group in file
            },
            logits_level=bool(file.attrs.get(LOGITS_LEVEL, True)),
            multi_label=bool(file.attrs.get(MULTI_LABEL, False)),
            pooled=bool(file.attrs.get(POOLED, False)),
            head=head,
            mirror=self._read_constants("mirror/") if not view and "mirror" in file else None,
        )

    @property
    def widths(self) -> dict[str, int]:
        """Numbers per row of each dataset."""
        return {n: rows.shape[1] for n, rows in self._constants.rows().items() if n != "label"}

    def listing(self) -> Iterator[tuple[tuple[str, ...], Tensor, tuple[str, ...]]]:
        """Paths, labels and errors (empty if none) of all rows, in blocks."""
        for start in range(0, self.count, BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            with damage(self.path):
                paths, errors = (tuple(self._file[n].asstr()[part]) for n in ("path", "error"))
                labels = torch.from_numpy(self._file["label"][part])
            yield paths, labels, errors

    def blocks(
        self, needs: Iterable[str] | None = None, *, start: int = 0, stop: int | None = None
    ) -> Iterator[Rows]:
        """The rows [start, stop), by default all, in order, with the records named by ``needs``
        (None: all), ``block_rows`` at a time."""
        constants = self._constants if needs is None else only(self._constants, frozenset(needs))
        size = _block_rows(constants)
        end = self.count if stop is None else min(stop, self.count)
        for first in range(start, end, size):
            yield self._block(constants, first, min(first + size, end))

    def readable(self, needs: frozenset[str]) -> Iterator[Features]:
        """The readable rows in such blocks, without paths and errors: to make text of them takes
        longer than to read the records of a few layers."""
        constants = only(self._constants, needs)
        size = _block_rows(constants)
        for start in range(0, self.count, size):
            stop = min(start + size, self.count)
            with damage(self.path):
                good = self._file["error"][start:stop] == b""
                yield self._features(constants, start, stop, good)

    def _features(
        self, constants: Features, start: int, stop: int, good: NDArray[np.bool_]
    ) -> Features:
        whole = bool(good.all())

        def read(name: str, _: Tensor) -> Tensor:
            found = self._file[name][start:stop]
            if name != "label":  # some other width of numbers than ours
                found = found.astype(np.float32, copy=False)
            return torch.from_numpy(found if whole else found[good])

        return constants.map_rows(read, int(good.sum()))

    def block_rows(self, needs: Iterable[str]) -> int:
        """Number of rows of a block."""
        return _block_rows(only(self._constants, frozenset(needs)))

    def _block(self, constants: Features, start: int, stop: int) -> Rows:
        with damage(self.path):
            paths = tuple(self._file["path"].asstr()[start:stop])
            errors = tuple(text or None for text in self._file["error"].asstr()[start:stop])
            good = np.array([error is None for error in errors])
            features = self._features(constants, start, stop, good)
            labels = torch.from_numpy(self._file["label"][start:stop].astype(np.int64, copy=False))
        return Rows(paths, labels, errors, features)

    def require(self, needs: Iterable[str], who: str, made_with: Making | None = None) -> None:
        """Raises DetectorError that names the missing records and how to record them, and for
        records that were made otherwise."""
        self._constants.require(needs, who)
        self._constants.require_made_with(made_with, who)

    def rows(
        self, needs: Iterable[str], part: Callable[[Tensor], Tensor] | None = None
    ) -> CachedRows:
        """What ``Detector.fit`` takes: blocks that can be read again and again. part: numbers of
        readable rows (N,) → which of them are wanted."""
        return CachedRows(self, frozenset(needs), part)


def _made_with(attributes: Any, kind: type[Making]) -> Making:
    """Of the attributes of a group."""
    usual = asdict(kind())
    values = {
        name: type(value)(attributes[name])
        for name, value in usual.items()
        if name in attributes or name not in LATER
    }
    return kind(**values)


def _block_rows(constants: Features) -> int:
    width = sum(rows.shape[1] for rows in constants.rows().values() if rows.ndim == 2)
    return max(1, min(BLOCK_ROWS, BLOCK_BYTES // (4 * max(width, 1))))


def _unlike(features: Features, classes: int) -> str:
    """The first record whose width does not fit the others, as text; empty if all fit."""
    rows = features.rows()
    if {"batchnorm.mean", "batchnorm.var"} & features.recorded and INPUT not in features.batchnorm:
        return f"/batchnorm/{INPUT} is missing"
    expected: dict[str, int] = {}
    for view in ("", "mirror/"):
        expected |= dict.fromkeys(
            (f"{view}{n}" for n in ("logits", "odin/logits", "deconf/h")), classes
        )
        for name in features.layers:
            parts = [f"{view}layers/{name}/{part}" for part in LAYER_PARTS if part != "gram"]
            there = [rows[part].shape[1] for part in parts if part in rows]
            expected |= dict.fromkeys(parts, *there[:1])
        for name, norm in features.batchnorm.items():
            width = len(norm.running_mean)
            statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            if any(each.shape != (width,) for each in statistics):
                return f"/batchnorm/{name} has statistics of different lengths"
            expected |= {f"{view}batchnorm/{name}/{part}": width for part in ("mean", "var")}
        if features.head is not None:
            width = features.head.weight.shape[1]
            expected |= {f"{view}embedding": width, f"{view}adascale/u": width}
        dropout = features.made_with.get(DropoutPasses.group)
        if isinstance(dropout, DropoutPasses):
            expected[f"{view}dropout/logits"] = dropout.passes * classes
        pro = features.made_with.get(ProSteps.group)
        if isinstance(pro, ProSteps):
            expected[f"{view}pro/steps"] = pro.steps + 1
    if features.head is not None and len(features.head.weight) != classes:
        return f"/head/weight is for {len(features.head.weight)} classes, not {classes}"
    for name, width in expected.items():
        if name in rows and rows[name].shape[1] != width:
            return f"/{name} is {rows[name].shape[1]} wide, expected {width}"
    return ""


@dataclass(frozen=True)
class CachedRows:
    """The readable rows of a cache, or some of them, block by block, as often as wanted. Where
    only some are wanted, those of several blocks are put together."""

    cache: FeatureCache
    needs: frozenset[str]
    part: Callable[[Tensor], Tensor] | None = None

    def __iter__(self) -> Iterator[Features]:
        start = full = 0
        waiting: list[Features] = []
        for block in self.cache.readable(self.needs):
            if self.part is None:
                yield block
                continue
            numbers = torch.arange(start, start + len(block))
            start += len(block)
            full = max(full, len(block))
            waiting.append(block.select(self.part(numbers)))
            if sum(map(len, waiting)) >= full:
                yield concatenate(waiting)
                waiting = []
        if waiting:
            yield concatenate(waiting)


@contextmanager
def open_cache(path: Path) -> Iterator[FeatureCache]:
    """Open a feature cache. Raises FileError for a file that is damaged or not a cache."""
    with reading(path, FORMAT, "oodcli extract") as file:
        yield FeatureCache(path, file)


def only(features: Features, needs: frozenset[str]) -> Features:
    """The same rows with only the records of ``needs``; constants stay."""

    def kept(part: Any, where: str, parts: Iterable[str]) -> Any:
        lost = (each for each in parts if word_of(f"{where}{each}") not in needs)
        return replace(part, **{field_of(each): None for each in lost})

    whole: Features = kept(features, "", WHOLE)
    return replace(
        whole,
        layers={name: kept(x, f"layers/{name}/", LAYER_PARTS) for name, x in whole.layers.items()},
        batchnorm={
            name: kept(x, f"batchnorm/{name}/", NORM_PARTS) for name, x in whole.batchnorm.items()
        },
        mirror=None
        if features.mirror is None or "mirror" not in needs
        else only(features.mirror, needs),
    )
