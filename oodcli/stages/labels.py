"""Choose between readings of ambiguous labels by the network's accuracy on a sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from oodcli.features import recorded
from oodcli.images import ImageSource
from oodcli.images.labels import UNKNOWN, Labels, is_plain, match, of_imagenet, unknown, wnids
from oodcli.images.pieces import Piece, folder_names
from oodcli.images.source import Decode, Fetch
from oodcli.networks import heads
from oodcli.networks.classifier import Classifier
from oodcli.recording.recorder import Recorder
from oodcli.stages.record import record_images

SAMPLE = 256
"""Labelled rows that the network is tried on."""

BATCH = 32
"""Rows per batch of the sample, whatever --batch-size is, so that shards and ranks agree."""


def settle_labels(
    source: ImageSource, classifier: Classifier, *, timeout: float | None = None
) -> int | None:
    """Choose between the readings of a source's labels and put the choice and its reason into the
    source's note; returns the reading's number, None if the labels stay unknown. The sample depends
    only on the list of images, not on the shard that is recorded. timeout: seconds to read an
    image."""
    known = source.known
    if known is None:
        return 0
    if known.of_imagenet and in_groups(classifier):
        source.read_as(unknown(len(known.values), IN_GROUPS))
        return None
    readings = known.readings
    if len(readings) == 1:
        return 0
    if classifier.named and is_plain(classifier.class_names):
        source.read_as(readings[0])  # by number: the classes have been named so
        source.note = source.order_note
        return 0
    hits, count = _tried(source, classifier, readings, timeout)
    best = max(range(len(readings)), key=lambda number: hits[number])  # the first of equals
    source.read_as(_explained(readings, hits, count, best))
    return best


IN_GROUPS = (
    "the network orders its classes by group, not as ImageNet does: labels unknown; give "
    "--class-names"
)


def in_groups(classifier: Classifier) -> bool:
    """Whether the classes are in the order of a MOS head's groups."""
    return heads.split(classifier.arch)[1].startswith("mos")


def table_of(found: Sequence[Piece], classifier: Classifier) -> tuple[dict[str, int], str | None]:
    """Class of each name that can come with images that only a cluster reads, and a note. The
    network is not tried here, as the images are not on this host."""
    names = folder_names(found)
    if names:
        labels = match(names, classifier.class_names, "folders")
        if labels.of_imagenet and in_groups(classifier):
            labels = unknown(len(names), IN_GROUPS)
        note = labels.note
        if labels.others and classifier.named and is_plain(classifier.class_names):
            note = None
        elif labels.others:
            note = f"{note} (--engine ray does not test the alternatives)"
        return dict(zip(names, labels.values.tolist(), strict=True)), note
    if any(piece.kind in ("tar", "parquet") for piece in found):
        table = {}
        if of_imagenet(classifier.class_names) and not in_groups(classifier):
            table = wnids()
        return table, "numeric labels are read as class numbers from 0"
    return {}, None


def _explained(readings: tuple[Labels, ...], hits: list[int], count: int, best: int) -> Labels:
    """The best reading, with a note about the others."""
    taken = readings[best]
    right = [f"{hit / max(count, 1):.2%}" for hit in hits]
    others = [number for number in range(len(readings)) if number != best]
    rest = " or ".join(readings[number].words for number in others)
    options = " or ".join(readings[number].option for number in others)
    what = f"{taken.what} are numbers, read {taken.words}"
    if all(hits[number] == hits[best] for number in others):
        why = (
            f"a sample cannot distinguish this from {rest}: the network is right on {right[best]} "
            f"of {count} images either way"
        )
    else:
        shares = " or ".join(right[number] for number in others)
        why = (
            f"the network is right on {right[best]} of a sample of {count} images; {rest} it is "
            f"right on {shares}"
        )
    return Labels(
        taken.values,
        f"{what}: {why}; to set it yourself, give {taken.option} (as here) or {options}",
    )


def _tried(
    source: ImageSource,
    classifier: Classifier,
    readings: tuple[Labels, ...],
    timeout: float | None,
) -> tuple[list[int], int]:
    """Number of images of the sample that the network gets right by each reading, and the number
    tried."""
    rows = torch.arange(len(source))
    if source.labels_are_of_rows:
        rows = torch.stack([each.values for each in readings]).ge(0).any(0).nonzero().flatten()
    size = min(SAMPLE, len(rows))
    sample = _Sample(source, rows[torch.arange(size) * len(rows) // max(size, 1)].tolist())
    recorder = Recorder(classifier, frozenset({"logits"}))
    hits, count = [0] * len(readings), 0
    in_force = source.known
    assert in_force is not None
    # Each label is its own place among the values, in which all readings can be looked up then.
    source.read_as(Labels(torch.arange(len(in_force.values))))
    try:
        for block in record_images(classifier, sample, recorder, BATCH, timeout=timeout):
            if block.features is None:
                continue
            places = block.labels[torch.tensor([error is None for error in block.errors])]
            predicted = recorded(block.features.logits).argmax(1)
            count += int((places != UNKNOWN).sum())
            for number, reading in enumerate(readings):
                hits[number] += int((reading.at(places).values == predicted).sum())
    finally:
        source.read_as(in_force)
    return hits, count


class _Sample(ImageSource):
    """Some rows of a source. rows: ascending."""

    grain = 1

    def __init__(self, source: ImageSource, rows: list[int]) -> None:
        self.name = source.name
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def paths(self, start: int, stop: int) -> list[str]:
        rows = self._rows[start:stop]
        return [path for row in rows for path in self._source.paths(row, row + 1)]

    def weight(self, start: int, stop: int) -> int:
        return sum(self._source.weight(row, row + 1) for row in self._rows[start:stop])

    @contextmanager
    def reading(self) -> Iterator[Fetch]:
        with self._source.reading() as fetch:

            def one(start: int, stop: int) -> Decode:
                (row,) = self._rows[start:stop]  # the grain is 1
                return fetch(row, row + 1)

            yield one
