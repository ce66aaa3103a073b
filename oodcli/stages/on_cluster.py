"""``score --engine ray``: what is opened here, and what a Ray cluster does."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from oodcli import notes
from oodcli.errors import OodcliError
from oodcli.features import Rows
from oodcli.images.pieces import Piece, is_remote, left_out, pieces, sizes
from oodcli.jobs.kept import Kept
from oodcli.networks.classifier import Classifier
from oodcli.recording.recorder import recordable
from oodcli.stages.chosen import Chosen
from oodcli.stages.labels import table_of
from oodcli.stages.model import Model
from oodcli.stages.opened import Opened, from_images, with_noise
from oodcli.stages.ray import ClusterWork, Job, Network, Reading, pieces_of
from oodcli.stages.record import Progress, Work, provenance
from oodcli.stages.score import Scoring
from oodcli.stages.sources import log


def refuse_with_engine(
    engine: str, images: str | None, *, to_file: bool, timeout: float | None, shared: bool
) -> None:
    """Raises OodcliError for what does not go with ``--engine``."""
    if engine != "ray" and not engine.startswith("ray://"):
        raise OodcliError(f"--engine {engine}: expected ray, or ray://HOST:PORT")
    for wrong, words in (
        (images is None, "a cache is scored faster here: leave it out"),
        (images == "-", "its hosts have no standard input: give a file with the list"),
        (not to_file, "it needs a file for the scores: name one with -o"),
        (timeout is not None, "--timeout-per-image is not for it: leave one of them out"),
        (shared, "it shares the work by itself: leave out --shard, and start it without torchrun"),
    ):
        if wrong:
            raise OodcliError(f"--engine {engine}: {words}")


def for_cluster(
    model: Model, classifier: Classifier, images: str, *, mirror: bool, command: str
) -> Opened:
    """Images that a cluster records and scores."""
    if is_remote(images):
        return _from_anywhere(model, classifier, images, mirror, command)
    opened, source, reading = from_images(
        model, classifier, images, mirror=mirror, timeout=None, command=command
    )

    def listed() -> Sequence[Piece]:
        return pieces_of(source, model.batch_size(classifier))

    return replace(
        opened, cluster=ClusterJob(model, classifier, images, mirror, listed, reading).work
    )


def _from_anywhere(
    model: Model, classifier: Classifier, images: str, mirror: bool, command: str
) -> Opened:
    """Images that only a cluster reads: how many there are is not known before."""
    batch_size = model.batch_size(classifier)
    made = provenance(
        classifier,
        source=images,
        command=command,
        seed=model.running.seed,
        precision=model.precision(),
        virtual=False,
        left_out=left_out(images),
    )

    def listing() -> str:
        return hashlib.sha256("\n".join(sizes(images)).encode()).hexdigest()

    def record(chosen: Sequence[Chosen], advance: Progress) -> Callable[[int, int], Sequence[Rows]]:
        return lambda start, stop: ()  # the cluster does

    def job() -> dict[str, Any]:
        return {**model.job(), "the list of images": listing(), "--batch-size": batch_size}

    return Opened(
        made,
        recordable(classifier),
        record,
        job,
        0,
        lambda chosen: batch_size,
        listing,
        with_noise(classifier, batch_size),
        cluster=ClusterJob(
            model, classifier, images, mirror, lambda: pieces(images, batch_size)
        ).work,
    )


@dataclass(frozen=True)
class ClusterJob:
    """All of a job at a Ray cluster. pieces: which images there are. reading: of their labels, as
    in ``Reading``."""

    model: Model
    classifier: Classifier
    images: str
    mirror: bool
    pieces: Callable[[], Sequence[Piece]]
    reading: int | None = 0

    def work(
        self, kept: Kept | None, chosen: Sequence[Chosen], scoring: Scoring, engine: str
    ) -> Work:
        """engine: ``ray``, or the address of a cluster. Raises OodcliError for a classifier, which
        no other host can load, or when a file cannot be read."""
        classifier, given = self.classifier, self.model.checkpoint
        if isinstance(given, Classifier):
            raise OodcliError(
                "a cluster's hosts cannot load a classifier that is in memory: give the path of "
                "its checkpoint"
            )
        network = Network.of(
            given.path,
            given.overrides,
            prefer_ema=given.prefer_ema,
            trust_pickle=given.trust_pickle,
        )
        found = self.pieces()
        table, note = table_of(found, classifier)
        if note:
            notes.say(log, note)
        reading = Reading(
            self.images,
            os.getcwd(),
            classifier.preprocessing,
            classifier.class_names,
            self.model.batch_size(classifier),
            self.reading,
            table,
        )
        precision = self.model.precision()
        job = Job(network, reading, precision, self.mirror, chosen, scoring)
        address = engine if engine != "ray" else None
        return ClusterWork(kept, job=job, pieces=found, address=address)
