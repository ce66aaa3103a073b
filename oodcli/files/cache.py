"""The feature cache: what was recorded of each image, in HDF5."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from oodcli.errors import FileError
from oodcli.features import (
    LAYER_PARTS,
    BatchNorm,
    Features,
    Layer,
    LinearHead,
    OdinStep,
    Rows,
    concatenate,
)
from oodcli.files.hdf5 import Provenance, damage, reading

FORMAT = "oodcli-features"

CHUNK_BYTES = 1 << 18
BLOCK_BYTES = 1 << 26
BLOCK_ROWS = 8192


class CacheWriter:
    """Appends blocks of N rows in turn; unreadable images keep a row of NaN and their error.

    Raises ValueError when a block records something else than the first one did.
    """

    def __init__(self, file: h5py.File, provenance: Provenance, count: int) -> None:
        provenance.write(file, FORMAT)
        self._file = file
        self._count = count
        self._row = 0
        text = h5py.string_dtype("utf-8")
        self._path = file.create_dataset("path", (count,), text)
        self._error = file.create_dataset("error", (count,), text)
        self._label = file.create_dataset("label", (count,), "int64", fillvalue=-1)
        self._rows: dict[str, h5py.Dataset] = {}

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
        self._row = stop

    def _create(self, features: Features, named: dict[str, Tensor]) -> None:
        for name, rows in named.items():
            width = rows.shape[1]
            self._rows[name] = self._file.create_dataset(
                name,
                (self._count, width),
                "float32",
                chunks=(max(1, min(self._count, CHUNK_BYTES // (4 * width))), width),
                fillvalue=np.nan,
            )
        for order, (name, layer) in enumerate(features.layers.items()):
            group = self._file.require_group(f"layers/{name}")
            group.attrs["kind"], group.attrs["order"] = layer.kind, order
        for order, (name, norm) in enumerate(features.batchnorm.items()):
            group = self._file.require_group(f"batchnorm/{name}")
            group.attrs["order"] = order
            for part in ("running_mean", "running_var", "weight", "bias"):
                group[part] = getattr(norm, part).cpu().numpy()
            group["eps"], group["spatial_size"] = norm.eps, norm.spatial_size
        if features.head is not None:
            self._file["head/weight"] = features.head.weight.cpu().numpy()
            self._file["head/bias"] = features.head.bias.cpu().numpy()
        if features.mirror is not None:
            self._file.require_group("mirror")
        if features.odin_step is not None:
            self._file["odin"].attrs["epsilon"] = features.odin_step.epsilon
            self._file["odin"].attrs["temperature"] = features.odin_step.temperature


class FeatureCache:
    """An open cache; rows are read in blocks, so memory does not grow with their number."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file
        with damage(path):
            self.provenance = Provenance.read(file)
            self._constants = self._read_constants()
            lengths = {name: len(file[name]) for name in ("path", "error", *self._constants.rows())}
        self.recorded = self._constants.recorded
        self.count = lengths["path"]
        wrong = [name for name, length in lengths.items() if length != self.count]
        if wrong:
            raise FileError(
                f"{path}: /{wrong[0]} has {lengths[wrong[0]]} rows, but /path has {self.count}: "
                "the file is damaged, extract it again"
            )

    def _read_constants(self, view: str = "") -> Features:
        """A block of no rows: everything that is not per image. view: ``mirror/`` for the mirror
        images, which share all else."""
        file = self._file

        def empty(name: str) -> Tensor | None:
            name = view + name
            return torch.zeros((0, *file[name].shape[1:])) if name in file else None

        def ordered(group: str) -> list[str]:
            found = file.get(group, {})
            return sorted(found, key=lambda name: int(found[name].attrs.get("order", 0)))

        layers = {
            name: Layer(
                str(file[f"layers/{name}"].attrs["kind"]),
                *(empty(f"layers/{name}/{part}") for part in LAYER_PARTS),
            )
            for name in ordered("layers")
        }
        norms = {}
        for name in ordered("batchnorm"):
            group = file[f"batchnorm/{name}"]
            tensors = {
                part: torch.from_numpy(group[part][()])
                for part in ("running_mean", "running_var", "weight", "bias")
            }
            norms[name] = BatchNorm(
                eps=float(group["eps"][()]),
                spatial_size=int(group["spatial_size"][()]),
                mean=empty(f"batchnorm/{name}/mean"),
                var=empty(f"batchnorm/{name}/var"),
                **tensors,
            )
        head = None
        if "head" in file:
            head = LinearHead(
                torch.from_numpy(file["head/weight"][()]), torch.from_numpy(file["head/bias"][()])
            )
        step = None
        if "odin" in file:
            attributes = file["odin"].attrs
            step = OdinStep(float(attributes["epsilon"]), float(attributes["temperature"]))
        return Features(
            count=0,
            label=torch.zeros(0, dtype=torch.int64),
            logits=empty("logits"),
            embedding=empty("embedding"),
            layers=layers,
            batchnorm=norms,
            odin_logits=empty("odin/logits"),
            deconf_h=empty("deconf/h"),
            mos_others=empty("mos/others"),
            odin_step=step,
            head=head,
            mirror=self._read_constants("mirror/") if not view and "mirror" in file else None,
        )

    def blocks(self, needs: Iterable[str] | None = None) -> Iterator[Rows]:
        """All rows in order, with the records named by ``needs`` (None: all)."""
        constants = self._constants if needs is None else only(self._constants, frozenset(needs))
        width = sum(rows.shape[1] for rows in constants.rows().values() if rows.ndim == 2)
        size = max(1, min(BLOCK_ROWS, BLOCK_BYTES // (4 * max(width, 1))))
        for start in range(0, self.count, size):
            yield self._block(constants, start, min(start + size, self.count))

    def _block(self, constants: Features, start: int, stop: int) -> Rows:
        with damage(self.path):
            paths = tuple(self._file["path"].asstr()[start:stop])
            errors = tuple(text or None for text in self._file["error"].asstr()[start:stop])
            good = np.array([error is None for error in errors])

            def read(name: str, _: Tensor) -> Tensor:
                return torch.from_numpy(self._file[name][start:stop][good])

            features = constants.map_rows(read, int(good.sum()))
            labels = torch.from_numpy(self._file["label"][start:stop])
        return Rows(paths, labels, errors, features)

    def require(self, needs: Iterable[str], who: str) -> None:
        """Raises DetectorError naming what was not recorded and how to record it."""
        self._constants.require(needs, who)

    def rows(
        self, needs: Iterable[str], part: Callable[[Tensor], Tensor] | None = None
    ) -> CachedRows:
        """What ``Detector.fit`` takes: blocks that can be read again and again. part: numbers of
        readable rows (N,) → which of them are wanted."""
        return CachedRows(self, frozenset(needs), part)


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
        for block in self.cache.blocks(self.needs):
            if block.features is None:
                continue
            if self.part is None:
                yield block.features
                continue
            numbers = torch.arange(start, start + len(block.features))
            start += len(block.features)
            full = max(full, len(block.features))
            waiting.append(block.features.select(self.part(numbers)))
            if sum(map(len, waiting)) >= full:
                yield concatenate(waiting)
                waiting = []
        if waiting:
            yield concatenate(waiting)


@contextmanager
def open_cache(path: Path) -> Iterator[FeatureCache]:
    """Raises FileError when path is no cache, or is damaged."""
    with reading(path, FORMAT, "oodcli extract") as file:
        yield FeatureCache(path, file)


def only(features: Features, needs: frozenset[str]) -> Features:
    """The same rows with nothing recorded but what ``needs`` names; constants stay."""
    layers = {}
    for name, layer in features.layers.items():
        parts = {
            part: getattr(layer, part) if f"layers.{part}" in needs else None
            for part in LAYER_PARTS
        }
        layers[name] = Layer(layer.kind, **parts)
    norms = {
        name: replace(
            norm,
            mean=norm.mean if "batchnorm.mean" in needs else None,
            var=norm.var if "batchnorm.var" in needs else None,
        )
        for name, norm in features.batchnorm.items()
    }
    return replace(
        features,
        logits=features.logits if "logits" in needs else None,
        embedding=features.embedding if "embedding" in needs else None,
        layers=layers,
        batchnorm=norms,
        odin_logits=features.odin_logits if "odin.logits" in needs else None,
        deconf_h=features.deconf_h if "deconf.h" in needs else None,
        mos_others=features.mos_others if "mos.others" in needs else None,
        mirror=None
        if features.mirror is None or "mirror" not in needs
        else only(features.mirror, needs),
    )
