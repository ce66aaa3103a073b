"""Images through the network, a batch at a time; what every file says of how it was made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from oodcli import __version__
from oodcli.classifier import Classifier
from oodcli.errors import ImagesError
from oodcli.features import Rows
from oodcli.files.hdf5 import Provenance
from oodcli.files.journal import Journal, Record
from oodcli.images import ImageSource, batches
from oodcli.recording import Recorder

Progress = Callable[[int], None]

Change = Callable[[Tensor], Tensor]
"""What is done to images (N, C, H, W), normalised, before the network sees them."""


def no_progress(count: int) -> None:
    """Nobody is watching."""


def record_images(
    classifier: Classifier,
    source: ImageSource,
    recorder: Recorder,
    batch_size: int,
    progress: Progress = no_progress,
    change: Change | None = None,
    *,
    start: int = 0,
    timeout: float | None = None,
) -> Iterator[Rows]:
    """The rows of a source from ``start`` on, in order, recorded a batch at a time, ``change`` made
    before; in the processor's memory, where detectors work. timeout: seconds for an image to be
    read."""
    for batch in batches(
        source, classifier.preprocessing, batch_size, start=start, timeout=timeout
    ):
        good = torch.tensor([error is None for error in batch.errors])
        images = batch.images if change is None else change(batch.images)
        features = recorder(images, batch.labels[good]) if len(images) else None
        if features is not None and classifier.device.type != "cpu":
            features = features.to(torch.device("cpu"))
        yield Rows(batch.paths, batch.labels, batch.errors, features)
        progress(len(batch.paths))


class _Block(Protocol):
    @property
    def paths(self) -> Sequence[str]: ...

    @property
    def errors(self) -> Sequence[str | None]:
        """One a row; None or empty where it could be read."""


Block = TypeVar("Block", bound=_Block)


def resumed(
    journal: Journal | None,
    restore: Callable[[Record], Block],
    keep: Callable[[Block], Record],
    make: Callable[[int], Iterable[Block]],
) -> Iterator[Block]:
    """All blocks of a job: those that its journal keeps, then those that ``make`` makes from a row
    on, each of which is kept first. Without a journal, all are made. Raises ImagesError at the end
    when not one row could be read; there is nothing to go on with then."""
    rows = readable = 0
    reason = ""

    def blocks() -> Iterator[Block]:
        if journal is None:
            yield from make(0)
            return
        yield from journal.kept(restore)
        for block in make(journal.rows):
            journal.append(keep(block))
            yield block

    for block in blocks():
        rows += len(block.errors)
        readable += sum(not error for error in block.errors)
        for path, error in zip(block.paths, block.errors, strict=True):
            reason = reason or (f"{path}: {error}" if error else "")
        yield block
    if rows and not readable:
        if journal is not None:
            journal.clear()
        raise ImagesError(f"not one of {rows} images could be read; {reason}")


def job_of(made: Provenance, **more: Any) -> dict[str, Any]:
    """What decides the contents of a file made so, by the names that users know: for a journal."""
    return {
        "the checkpoint": made.checkpoint_sha256,
        "the images": made.source,
        "--arch": made.arch,
        "the preprocessing": made.preprocessing.to_dict(),
        "--class-names": made.class_names,
        "--seed": made.seed,
        "--precision": made.precision,
        "--device": made.device,
        "oodcli": made.oodcli_version,
        "torch": made.torch_version,
        **more,
    }


LISTED = 8192
"""Rows whose paths are looked at together."""


def listing(source: ImageSource) -> str:
    """SHA-256 of the paths of a source and, where it is one file, of its size and time."""
    found = hashlib.sha256()
    for start in range(0, len(source), LISTED):
        paths = source.paths(start, min(start + LISTED, len(source)))
        found.update("".join(f"{path}\0" for path in paths).encode())
    found.update(file_state(Path(source.name)).encode())
    return found.hexdigest()


def file_state(path: Path) -> str:
    """Changes when the file does; empty where there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ""
    return f"{status.st_size} bytes of {status.st_mtime_ns}" if path.is_file() else ""


def provenance(
    classifier: Classifier,
    *,
    source: str,
    command: str,
    seed: int,
    precision: str,
    virtual: bool,
    matched_accuracy: float | None = None,
) -> Provenance:
    """What a file says of how it was made."""
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
        virtual=virtual,
        matched_accuracy=matched_accuracy,
    )
