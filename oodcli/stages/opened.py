"""The rows to score: from a cache, or from images and a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from oodcli import detectors, notes
from oodcli._version import __version__
from oodcli.detectors.base import Detector
from oodcli.errors import DetectorError, OodcliError
from oodcli.features import Rows
from oodcli.files.cache import FORMAT, open_cache
from oodcli.files.hashes import file_sha256
from oodcli.files.hdf5 import Provenance, format_of
from oodcli.files.virtual import FORMAT as VIRTUAL
from oodcli.images import ImageSource
from oodcli.jobs.kept import Kept
from oodcli.networks.classifier import Classifier
from oodcli.recording.recorder import Recorder, recordable, why_not
from oodcli.stages.chosen import Chosen, FitReference, fit_on_noise, layers_read, made_with, needs
from oodcli.stages.model import Model
from oodcli.stages.record import (
    Progress,
    Work,
    file_state,
    images_of,
    paths_sha256,
    provenance,
    record_images,
)
from oodcli.stages.score import Scoring
from oodcli.stages.sources import log, log_cache, log_records, open_source

Record = Callable[[Sequence[Chosen], Progress], Callable[[int, int], Iterable[Rows]]]
OnCluster = Callable[[Kept | None, Sequence[Chosen], Scoring, str], Work]
"""Makes a Ray cluster's work. Its last argument: ``ray``, or the address of the cluster."""


@dataclass(frozen=True)
class Opened:
    """A source of rows. made: metadata of their scores. available: records it can give. record:
    rows [start, stop) for some detectors. job: further settings that decide the rows. count: number
    of rows. unit: rows scored together. listing: SHA-256 of the list of images. fit_reference: fits
    a detector on noise; None without the network. extracted_by: the command that wrote a cache.
    cluster: how a Ray cluster does the job."""

    made: Provenance
    available: frozenset[str]
    record: Record
    job: Callable[[], dict[str, Any]]
    count: int
    unit: Callable[[Sequence[Chosen]], int]
    listing: Callable[[], str]
    fit_reference: FitReference | None = None
    extracted_by: str | None = None
    cluster: OnCluster | None = None


def from_cache(path: Path, stack: ExitStack, *, mirror: bool, stream: bool, command: str) -> Opened:
    """The rows of a feature cache, which stays open as long as the stack. Raises OodcliError if the
    file is not a cache, or cannot be read."""
    cache_like = path.suffix in (".h5", ".hdf5") or not path.exists()
    if path.is_dir() or not (cache_like or format_of(path) == FORMAT):
        raise OodcliError(f"{path} is not a cache: after a checkpoint, give IMAGES")
    cache = stack.enter_context(open_cache(path))
    log_cache("score", cache)
    wanted = partial(needs, mirror=mirror, stream=stream)

    def record(chosen: Sequence[Chosen], advance: Progress) -> Callable[[int, int], Iterable[Rows]]:
        views = {"mirror"} if mirror else set()
        for each in chosen:
            detector, word = each.detector, detectors.word_for(each.detector.name)
            cache.require(detector.score_needs | views, word, detector.made_with)

        def rows(start: int, stop: int) -> Iterator[Rows]:
            for block in cache.blocks(wanted(chosen), start=start, stop=stop):
                yield block
                advance(len(block.paths))

        return rows

    made = replace(
        cache.provenance,
        source=str(path),
        command=command,
        oodcli_version=__version__,
        torch_version=str(torch.__version__),
    )
    return Opened(
        made,
        cache.recorded,
        record,
        lambda: {"the cache's state": file_state(path)},
        cache.count,
        lambda chosen: cache.block_rows(wanted(chosen)),
        lambda: cache.rows_sha256 or file_sha256(path),
        extracted_by=cache.provenance.command,
    )


def from_images(
    model: Model,
    classifier: Classifier,
    images: str,
    *,
    mirror: bool,
    stream: bool = False,
    timeout: float | None,
    command: str,
) -> tuple[Opened, ImageSource, int | None]:
    """Images that the network records when they are scored; their source; and the number of the
    reading of its labels, see ``settle_labels``."""
    source, reading = open_source(images, classifier, timeout=timeout)
    batch_size = model.batch_size(classifier)
    precision = model.precision()

    def record(chosen: Sequence[Chosen], advance: Progress) -> Callable[[int, int], Iterable[Rows]]:
        for each in chosen:
            possible = recordable(classifier) | {"label"}
            if missing := sorted(each.detector.score_needs - possible):
                raise DetectorError(f"{each.name}: {why_not(classifier, missing)}")
        recorder = Recorder(
            classifier,
            needs(chosen, mirror=mirror, stream=stream),
            made_with=made_with(each.detector for each in chosen),
            precision=precision,
            layers=layers_read(chosen, stream=stream),
        )
        log_records(recorder)

        def rows(start: int, stop: int) -> Iterable[Rows]:
            return record_images(
                *(classifier, source, recorder, batch_size, advance),
                start=start,
                stop=stop,
                timeout=timeout,
            )

        return rows

    def job() -> dict[str, Any]:
        return {
            **model.job(),
            **images_of(source),
            **({} if reading == 0 else {"the reading of its labels": reading}),
            "--batch-size": batch_size,
        }

    made = provenance(
        classifier,
        source=images,
        command=command,
        seed=model.running.seed,
        precision=precision,
        virtual=format_of(Path(images)) == VIRTUAL,
        left_out=source.left_out,
    )
    opened = Opened(
        made,
        recordable(classifier),
        record,
        job,
        len(source),
        lambda chosen: batch_size,
        lambda: paths_sha256(source),
        with_noise(classifier, batch_size),
    )
    return opened, source, reading


def with_noise(classifier: Classifier, batch_size: int) -> FitReference:
    """Fits a detector on its reference noise, with this network."""

    def fit_reference(kind: type[Detector], given: Mapping[str, Any]) -> Detector:
        Recorder(classifier, kind.fit_needs(**given))  # raises where that is not possible
        notes.say(log, f"first standardising {kind.name} on {kind.reference_images}")
        return fit_on_noise(classifier, kind, given, batch_size)

    return fit_reference
