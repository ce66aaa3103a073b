"""Images through the network, a batch at a time; what every file says of how it was made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from oodcli import __version__
from oodcli.classifier import Classifier
from oodcli.errors import ImagesError
from oodcli.features import Rows
from oodcli.files.hdf5 import Provenance
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
) -> Iterator[Rows]:
    """The rows of a source in order, recorded a batch at a time, ``change`` made before; in the
    processor's memory, where detectors work. Raises ImagesError at the end when not one image could
    be read."""
    readable = 0
    reason = ""
    for batch in batches(source, classifier.preprocessing, batch_size):
        good = torch.tensor([error is None for error in batch.errors])
        images = batch.images if change is None else change(batch.images)
        features = recorder(images, batch.labels[good]) if len(images) else None
        if features is not None and classifier.device.type != "cpu":
            features = features.to(torch.device("cpu"))
        readable += len(images)
        reason = reason or next((error for error in batch.errors if error), "")
        yield Rows(batch.paths, batch.labels, batch.errors, features)
        progress(len(batch.paths))
    if not readable:
        raise ImagesError(
            f"{source.name}: not one of {len(source)} images could be read ({reason})"
        )


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
