"""Images through the network, a batch at a time; what every file says of how it was made."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from oodcli._version import __version__
from oodcli.errors import ImagesError
from oodcli.features import Rows
from oodcli.files.hdf5 import Provenance
from oodcli.images import Batch, ImageSource, batches
from oodcli.jobs.kept import Block, Kept, Stored
from oodcli.jobs.shards import WHOLE, Shard, Share
from oodcli.jobs.torchrun import Team
from oodcli.networks.classifier import Classifier
from oodcli.recording.recorder import Recorder

Progress = Callable[[int], None]


def no_progress(count: int) -> None:
    """Nobody is watching."""


def record_images(
    classifier: Classifier,
    source: ImageSource,
    recorder: Recorder,
    batch_size: int,
    progress: Progress = no_progress,
    *,
    start: int = 0,
    stop: int | None = None,
    timeout: float | None = None,
) -> Iterator[Rows]:
    """The rows [start, stop) of a source, by default all, in order, recorded a batch at a time; in
    the processor's memory, where detectors work. timeout: seconds for an image to be read."""
    for batch in batches(
        source, classifier.preprocessing, batch_size, start=start, stop=stop, timeout=timeout
    ):
        yield recorded_batch(recorder, batch)
        progress(len(batch.paths))


def recorded_batch(recorder: Recorder, batch: Batch) -> Rows:
    """A batch through the network, in the processor's memory."""
    good = torch.tensor([error is None for error in batch.errors])
    features = recorder(batch.images, batch.labels[good]) if len(batch.images) else None
    if features is not None and recorder.classifier.device.type != "cpu":
        features = features.to(torch.device("cpu"))
    return Rows(batch.paths, batch.labels, batch.errors, features)


class _Rows(Protocol):
    @property
    def paths(self) -> Sequence[str]: ...

    @property
    def errors(self) -> Sequence[str | None]:
        """One a row; None or empty where it could be read."""


RowBlock = TypeVar("RowBlock", bound=_Rows)


@dataclass(frozen=True)
class Work:
    """How a job is stored and shared. kept: its finished batches; None to store none. share: the
    part of it that this file will have. team: processes that do the whole together."""

    kept: Kept | None = None
    share: Share = WHOLE
    team: Team | None = None

    def part(self, count: int, unit: int = 1) -> range:
        """Which of ``count`` things this process does, a ``unit`` of them at a time."""
        return (self.share if self.team is None else self.team.share).part(count, unit)

    def rows(self, count: int, unit: int = 1) -> int:
        """How many rows of this process's part are stored from before."""
        if self.kept is None:
            return 0
        part = self.part(count, unit)
        numbers = {(start // unit,) for start in range(part.start, part.stop, unit)}
        return sum(map(self.kept.rows, numbers & self.kept.numbers))

    def blocks(
        self,
        count: int,
        unit: int,
        restore: Callable[[Stored], Block],
        store: Callable[[Block], Stored],
        make: Callable[[int, int], Iterable[Block]],
        progress: Progress,
    ) -> Iterator[Block] | None:
        """All blocks of the file, in order, a ``unit`` of ``count`` things each. make: those of the
        things [start, stop), where they are not stored yet; each is stored first. None in the
        processes that do but a share for another."""
        own = self._own(self.part(count, unit), unit, restore, store, make)
        if self.team is None or self.kept is None:
            return own
        for _ in own:
            pass
        self.team.gather(progress)
        if not self.team.leads:
            return None
        kept = self.kept
        return (kept.read((start // unit,), restore) for start in range(0, count, unit))

    def _own(
        self,
        part: range,
        unit: int,
        restore: Callable[[Stored], Block],
        store: Callable[[Block], Stored],
        make: Callable[[int, int], Iterable[Block]],
    ) -> Iterator[Block]:
        kept = self.kept
        if kept is None:
            yield from make(part.start, part.stop)
            return
        starts = range(part.start, part.stop, unit)
        for stored, run in groupby(starts, lambda start: (start // unit,) in kept.numbers):
            found = list(run)
            if stored:
                yield from (kept.read((start // unit,), restore) for start in found)
                continue
            made = make(found[0], min(found[-1] + unit, part.stop))
            for start, block in zip(found, made, strict=True):
                kept.write((start // unit,), store(block))
                yield block

    def readable(self, blocks: Iterable[RowBlock]) -> Iterator[RowBlock]:
        """The blocks. Raises ImagesError at the end when not one row could be read, unless these
        are a share of them; nothing is stored then."""
        rows = readable = 0
        reason = ""
        for block in blocks:
            rows += len(block.errors)
            readable += sum(not error for error in block.errors)
            for path, error in zip(block.paths, block.errors, strict=True):
                reason = reason or (f"{path}: {error}" if error else "")
            yield block
        if rows and not readable and self.share.whole:
            if self.kept is not None:
                self.kept.clear()
            raise ImagesError(f"not one of {rows} images could be read; {reason}")


ALONE = Work()


def job_of(made: Provenance, **more: Any) -> dict[str, Any]:
    """What decides the contents of a file made so, by the names that users know."""
    return {
        "the checkpoint": made.checkpoint_sha256,
        "--ema": made.averaged,
        "the images": made.source,
        "--arch": made.arch,
        "the preprocessing": made.preprocessing.to_dict(),
        "--class-names": made.class_names,
        "--seed": made.seed,
        "--precision": made.precision,
        "--device": made.device,
        "oodcli": made.oodcli_version,
        "torch": made.torch_version,
        **({} if made.shard is None else {"--shard": str(made.shard)}),
        **more,
    }


def images_of(source: ImageSource) -> dict[str, str]:
    """What decides the rows of a source, for ``job_of``. The times of files in a folder are left
    out, for a job may resume on a host with copies of them."""
    found = {"the list of images": listing(source)}
    total, each = 0, hashlib.sha256()
    for start in range(0, len(source), LISTED):
        sizes = source.sizes(start, min(start + LISTED, len(source)))
        if not sizes:
            return found
        total += sum(sizes)
        each.update(repr(sizes).encode())
    found["the size of the images"] = f"{total:,} bytes in all, {each.hexdigest()[:12]} by file"
    return found


LISTED = 8192
"""Rows whose paths are looked at together."""


def listing(source: ImageSource) -> str:
    """SHA-256 of the paths of a source and, where it is one file, of its size and time."""
    state = file_state(Path(source.name))
    return hashlib.sha256(f"{paths_sha256(source)} {state}".encode()).hexdigest()


def paths_sha256(source: ImageSource) -> str:
    """SHA-256 of the paths of a source."""
    found = hashlib.sha256()
    for start in range(0, len(source), LISTED):
        paths = source.paths(start, min(start + LISTED, len(source)))
        found.update("".join(f"{path}\0" for path in paths).encode())
    return found.hexdigest()


def shard_of(share: Share, rows: int, unit: int, listing: Callable[[], str]) -> Shard | None:
    """What a file with a share of rows says of it; None where that is all. listing: SHA-256 of the
    list of all of them."""
    if share.whole:
        return None
    part = share.part(rows, unit)
    return Shard(share.number, share.of, part.start, part.stop, rows, listing())


def file_state(path: Path) -> str:
    """Changes when the file does; empty where there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ""
    return f"{status.st_size} bytes of {status.st_mtime_ns}" if path.is_file() else ""


MOST_SUFFIXES = 100
"""Of files that are left out, the most frequent."""


def provenance(
    classifier: Classifier,
    *,
    source: str,
    command: str,
    seed: int,
    precision: str,
    virtual: bool,
    matched_accuracy: float | None = None,
    shard: Shard | None = None,
    left_out: Mapping[str, int] | None = None,
) -> Provenance:
    """What a file says of how it was made. left_out: as of the images' source."""
    counted = Counter(left_out or {})
    most = dict(counted.most_common(MOST_SUFFIXES))
    if len(counted) > len(most):
        most["others"] = counted.total() - sum(most.values())
    return Provenance(
        checkpoint_sha256=classifier.sha256,
        arch=classifier.arch,
        preprocessing=classifier.preprocessing,
        class_names=classifier.class_names,
        source=source,
        command=command,
        oodcli_version=__version__,
        torch_version=str(torch.__version__),
        seed=seed,
        device=str(classifier.device),
        precision=precision,
        averaged=classifier.averaged,
        virtual=virtual,
        matched_accuracy=matched_accuracy,
        shard=shard,
        left_out=most,
    )
