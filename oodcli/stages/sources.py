"""Images and caches of a job, opened; what is in them is logged."""

from __future__ import annotations

import logging

from oodcli import notes
from oodcli.files.cache import FeatureCache
from oodcli.images import ImageSource, open_images
from oodcli.images.reading import MOST_WORKERS, processors
from oodcli.jobs.kept import Kept
from oodcli.networks.classifier import Classifier
from oodcli.recording.recorder import Recorder
from oodcli.stages.labels import settle_labels

log = logging.getLogger(__name__)


def open_source(
    images: str, classifier: Classifier, *, timeout: float | None = None
) -> tuple[ImageSource, int | None]:
    """The source that IMAGES names, and the number of the reading of its labels, see
    ``settle_labels``. timeout: seconds for an image to be read."""
    source = open_images(images, classifier.preprocessing, classifier.class_names)
    reading = settle_labels(source, classifier, timeout=timeout)
    if source.note:
        notes.say(log, source.note)
    count = min(MOST_WORKERS, processors())
    crew = f"threads: {count}" if timeout is None else f"processes: {count}, {timeout:g} s an image"
    labels = "with labels" if source.labelled else "without labels"
    log.debug("%d images of %s, %s; decoding %s", len(source), source.name, labels, crew)
    notes.done(log, "the list of images")
    return source, reading


def log_cache(use: str, cache: FeatureCache) -> None:
    """What is in a cache, and what it is used for."""
    made = cache.provenance
    kind = "virtual images" if made.virtual else "images"
    recorded = ", ".join(sorted(cache.recorded))
    log.debug(
        "%s: %s, %d %s of %s, with %s", use, cache.path, cache.count, kind, made.source, recorded
    )


def log_records(recorder: Recorder) -> None:
    """What is recorded of a batch, and how many passes that takes."""
    what = recorder.asked
    views = ", and again of its mirror images" if "mirror" in what else ""
    log.debug(
        "records %s; passes of a batch: %d forward, %d backward%s",
        *(", ".join(sorted(what - {"mirror"})), *recorder.passes, views),
    )


def log_kept(kept: Kept) -> None:
    """Where finished batches are stored, and how many are there from before."""
    log.debug("finished batches are stored in %s; there now: %d", kept.path, len(kept.numbers))
