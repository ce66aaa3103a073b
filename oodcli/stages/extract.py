"""Images to a feature cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodcli.features import Features, Rows, recorded
from oodcli.files.atomic import atomic
from oodcli.files.cache import CacheWriter
from oodcli.files.hdf5 import Provenance, writing
from oodcli.files.virtual import read_sensitivity
from oodcli.images import ImageSource
from oodcli.images.arrays import VirtualImages
from oodcli.inversion.degrade import Patched, match_accuracy
from oodcli.jobs.kept import Stored
from oodcli.networks.classifier import Classifier
from oodcli.recording.recorder import Recorder
from oodcli.stages.record import ALONE, Progress, Work, no_progress, record_images


def extract_to_file(
    classifier: Classifier,
    source: ImageSource,
    recorder: Recorder,
    path: Path,
    provenance: Provenance,
    *,
    batch_size: int,
    sensitivity_from: Path | None = None,
    force: bool = False,
    progress: Progress = no_progress,
    timeout: float | None = None,
    work: Work = ALONE,
) -> dict[str, Any] | None:
    """Record a source into a cache. sensitivity_from: the virtual file that the source reads, for
    the sensitivities that inversion measured. None in a process that writes no file."""
    unreadable = 0
    agreed = known = 0
    if work.kept is not None:
        force = force or work.kept.about.complete
        provenance = replace(provenance, command=work.kept.about.command)

    def make(start: int, stop: int) -> Iterator[Rows]:
        return record_images(
            classifier,
            source,
            recorder,
            batch_size,
            progress,
            start=start,
            stop=stop,
            timeout=timeout,
        )

    restored = Restored(recorder)
    blocks = work.blocks(len(source), batch_size, restored, stored_rows, make, progress)
    if blocks is None:
        return None
    rows_here = work.share.part(len(source), batch_size)
    row = rows_here.start
    with atomic(path, force=force) as unfinished:
        with writing(unfinished) as new:
            writer = CacheWriter(new.file, provenance, len(rows_here))
            for rows in work.readable(blocks):
                stop = row + len(rows.paths)
                features = rows.features
                if features is not None and sensitivity_from is not None:
                    features = _with_sensitivity(features, sensitivity_from, row, stop)
                writer.append(replace(rows, features=features))
                new.check()
                unreadable += sum(error is not None for error in rows.errors)
                right, labelled = _hits(features)
                agreed, known = agreed + right, known + labelled
                row = stop
            if unreadable == len(rows_here):  # of a share; a whole without a row is refused
                nothing = restored.nothing
                if sensitivity_from is not None:
                    nothing = _with_sensitivity(nothing, sensitivity_from, row, row)
                writer.declare(nothing)
        if work.kept is not None:
            work.kept.finish(path, force=force)
    return {
        "file": str(path),
        "images": len(rows_here),
        "unreadable": unreadable,
        "recorded": sorted(recorder.what | ({"layers.sensitivity"} if sensitivity_from else set())),
        "labelled": known,
        "accuracy": agreed / known if known else None,
    }


def stored_rows(rows: Rows) -> Stored:
    """Recorded rows, for ``Restored``."""
    arrays = {"labels": rows.labels.numpy()}
    if rows.features is not None:
        for name, tensor in rows.features.rows().items():
            plain = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            arrays[f"rows/{name}"] = plain.numpy()
    return Stored(len(rows.paths), arrays, {"paths": rows.paths, "errors": rows.errors})


class Restored:
    """Recorded rows from stored batches. The recorder supplies what does not depend on the
    image."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    @cached_property
    def nothing(self) -> Features:
        """The records of zero images."""
        preprocessing = self._recorder.classifier.preprocessing
        blank = torch.zeros(1, preprocessing.channels, *preprocessing.input_size)
        features = self._recorder(blank, torch.tensor([-1]))
        return features.to(torch.device("cpu")).select(torch.zeros(0, dtype=torch.int64))

    def __call__(self, stored: Stored) -> Rows:
        paths, errors = tuple(stored.words["paths"]), tuple(stored.words["errors"])
        labels = torch.from_numpy(stored.arrays["labels"])
        if not len(paths) == len(errors) == len(labels) == stored.rows:
            raise ValueError("rows of different numbers")
        count = sum(error is None for error in errors)

        def read(name: str, rows: Tensor) -> Tensor:
            return torch.from_numpy(stored.arrays[f"rows/{name}"]).to(rows.dtype)

        features = self.nothing.map_rows(read, count) if count else None
        return Rows(paths, labels, errors, features)


def degrading(
    classifier: Classifier,
    source: VirtualImages,
    target: float,
    *,
    batch_size: int,
    precision: str,
) -> tuple[float, float]:
    """Patches that bring the network's accuracy on virtual images down to ``target``: their side,
    as a share of the image's, and the accuracy reached. Raises OodcliError if the target cannot be
    reached."""
    recorder = Recorder(classifier, frozenset({"logits"}), precision=precision)

    def accuracy(side: float) -> float:
        images = Patched(source, side, versions=1)
        counts = [
            _hits(rows.features) for rows in record_images(classifier, images, recorder, batch_size)
        ]
        return sum(right for right, _ in counts) / max(sum(known for _, known in counts), 1)

    return match_accuracy(accuracy, target)


def _hits(features: Features | None) -> tuple[int, int]:
    """Number of rows that the network classifies correctly, and of rows with a label."""
    if features is None or features.label is None:
        return 0, 0
    # A label of -1 is never a predicted class.
    hits = recorded(features.logits).argmax(1) == features.label
    return int(hits.sum()), int((features.label >= 0).sum())


def _with_sensitivity(features: Features, path: Path, start: int, stop: int) -> Features:
    found = read_sensitivity(path, start, stop)
    layers = {
        name: replace(layer, sensitivity=found.get(name)) for name, layer in features.layers.items()
    }
    return replace(features, layers=layers)
