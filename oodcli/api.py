"""The command line's objects for a notebook: a classifier, detectors, and records of images.

>>> import oodcli
>>> classifier = oodcli.load_classifier("digits.pt")
>>> energy = oodcli.load_detector("energy")
>>> features = oodcli.record(classifier, "noise:uniform?n=3", energy)
>>> features.logits.shape
torch.Size([3, 10])
>>> energy.score(features).shape  # higher = more out of distribution
torch.Size([3])
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from oodcli import detectors
from oodcli.detectors import own
from oodcli.detectors.base import Detector
from oodcli.errors import DetectorError, ImagesError, OodcliError
from oodcli.features import Features, Rows, concatenate
from oodcli.files.artefact import read_artefact
from oodcli.images import ImageSource, open_images
from oodcli.images.decoding import decode_rows
from oodcli.images.source import Fetch
from oodcli.images.source import Rows as Decoded
from oodcli.networks import load
from oodcli.networks.card import Overrides
from oodcli.networks.classifier import Classifier
from oodcli.networks.preprocessing import Preprocessing
from oodcli.recording.recorder import Recorder, recordable
from oodcli.records import CHEAP, KNOWN_RECORDS
from oodcli.stages.chosen import (
    choose_detectors,
    fit_on_noise,
    is_artefact,
    odin_step,
    require_same_network,
)
from oodcli.stages.labels import settle_labels
from oodcli.stages.record import record_images

log = logging.getLogger(__name__)

BATCH_SIZE = 64


def load_classifier(
    path: str | Path,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    input_size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resize: int | tuple[int, int] | None = None,
    interpolation: str | None = None,
    crop: str | None = None,
    exif: str | None = None,
    image_range: tuple[float, float] | None = None,
    class_names: Sequence[str] | None = None,
    layers: str | None = None,
    card: str | Path | None = None,
    device: str = "cpu",
    prefer_ema: bool = False,
    trust_pickle: bool = False,
) -> Classifier:
    """The network of a checkpoint, frozen, with what must be known to use it. What is not given
    comes from the model card beside it, then from the weights; ``assumptions`` says what was
    assumed. The arguments are the command line's options; mean, std: one number a channel, of
    pixels in [0, 1]. Raises CheckpointError."""
    overrides = Overrides(
        arch=arch,
        num_classes=num_classes,
        input_size=input_size,
        mean=None if mean is None else tuple(mean),
        std=None if std is None else tuple(std),
        resize=resize if resize is None or isinstance(resize, int) else (resize[0], resize[1]),
        interpolation=interpolation,
        crop=crop,
        exif=exif,
        image_range=None if image_range is None else (image_range[0], image_range[1]),
        class_names=None if class_names is None else tuple(class_names),
        layers=layers,
        card=None if card is None else Path(card),
    )
    return load.load_classifier(
        Path(path), overrides, device=device, prefer_ema=prefer_ema, trust_pickle=trust_pickle
    )


def load_detector(
    name_or_path: str | Path | type[Detector],
    classifier: Classifier | None = None,
    *,
    code: str | type[Detector] | None = None,
    **hyperparameters: Any,
) -> Detector:
    """A detector that needs no fitting, by its name, or a fitted one from a file made by ``oodcli
    fit``. Its ``score(features)`` gives (N,) float64, higher = more out of distribution.

    A detector of your own is given as ``"FILE.py:CLASS"``, whose code is run, or as its class. Of
    one that must be fitted, give the file made by ``oodcli fit``, and the class as ``code``.
    classifier: the file must have been fitted for it, on images prepared as it prepares them; and
    ``1c-sum`` is standardised on noise with it, which takes 2,000 forward passes. Without it,
    nothing is checked. hyperparameters: as ``-p NAME.KEY=VALUE``, of a name only.

    Raises DetectorError for an unknown name or hyper-parameter, or one that must be fitted first;
    FileError for a file that is missing, damaged, or belongs to another network.
    """
    if code is not None:
        _name_of(code)
    word = _name_of(name_or_path) if isinstance(name_or_path, type) else str(name_or_path)
    if is_artefact(word):
        artefact = read_artefact(Path(word))
        if hyperparameters:
            raise DetectorError(f"{word} is fitted already: give hyper-parameters to 'oodcli fit'")
        if classifier is not None:
            require_same_network(
                artefact, classifier.sha256, classifier.preprocessing, classifier.averaged
            )
        return artefact.detector
    kind = detectors.find(word)
    given = {key: str(value) for key, value in hyperparameters.items()}
    fit_reference = None if classifier is None else partial(_on_noise, classifier)
    [chosen] = choose_detectors([word], {kind.name: given}, kind.needs, "", fit_reference)
    return chosen.detector


def _name_of(code: str | type[Detector]) -> str:
    """The name by which a class is known from now on."""
    return own.register(code).name if isinstance(code, type) else detectors.find(code).name


def _on_noise(classifier: Classifier, kind: type[Detector], given: Mapping[str, Any]) -> Detector:
    return fit_on_noise(classifier, kind, given, BATCH_SIZE)


def record(
    classifier: Classifier,
    images: str | Path | Tensor | NDArray[np.uint8],
    needs: Detector | str | Iterable[Detector | str] | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    precision: str = "float32",
) -> Features:
    """What the network makes of images, one row for each that could be read, all in memory.

    images: IMAGES of the command line (a folder, a list, ``noise:uniform?n=500`` …); or pixels,
    uint8 (N, H, W, 3) or (N, H, W), of any size, which are prepared as the classifier's
    preprocessing says; or the network's inputs, a floating-point tensor (N, C, H, W) of its size,
    normalised already.
    needs: the detectors that will score the rows, or words of ``oodcli extract --record``, or both;
    None is everything that one forward pass gives. precision: float32 or bfloat16.

    A row that could not be read is left out, and a warning of the logger ``oodcli`` says so.
    Another one says what was assumed about the labels.
    Raises ImagesError where there is nothing to read, or for another shape; DetectorError for a
    word that is unknown, or that this network cannot give.
    """
    if precision not in ("float32", "bfloat16"):
        raise OodcliError(f"precision '{precision}': expected float32 or bfloat16")
    wanted = [needs] if isinstance(needs, Detector | str) else list(needs or ())
    chosen = [each for each in wanted if isinstance(each, Detector)]
    words = {each for each in wanted if isinstance(each, str)}
    unknown = sorted(words - KNOWN_RECORDS)
    if unknown:
        raise DetectorError(
            f"'{unknown[0]}' cannot be recorded: expected detectors, as load_detector gives them, "
            f"or some of {', '.join(sorted(KNOWN_RECORDS))}"
        )
    what = frozenset(words).union(*(each.score_needs for each in chosen))
    if needs is None:
        what = CHEAP & recordable(classifier)
    recorder = Recorder(classifier, what | {"logits"}, odin=odin_step(chosen), precision=precision)
    if isinstance(images, Tensor) and images.is_floating_point():
        return _of_inputs(recorder, images, batch_size)
    source: ImageSource = (
        open_images(str(images), classifier.preprocessing, classifier.class_names)
        if isinstance(images, str | Path)
        else Pixels(images.numpy(force=True) if isinstance(images, Tensor) else images)
    )
    settle_labels(source, classifier)
    if source.note:
        log.warning("%s: %s", source.name, source.note)
    return _readable(record_images(classifier, source, recorder, batch_size), len(source))


class Pixels(ImageSource):
    """Images in memory. images: uint8 (N, H, W, C), C = 1, 3 or 4 (alpha is dropped), or (N, H, W).
    Raises ImagesError for another shape or type."""

    name = "images"

    def __init__(self, images: NDArray[np.uint8]) -> None:
        images = np.asarray(images)
        shape = images.shape
        fits = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3, 4))
        if images.dtype != np.uint8 or not fits or 0 in shape:
            raise ImagesError(
                f"images are {images.dtype} {shape}: expected pixels, uint8 (N, H, W, 3) or "
                "(N, H, W), or normalised inputs, a floating-point tensor (N, C, H, W)"
            )
        self._images = images[..., 0] if len(shape) == 4 and shape[3] == 1 else images

    def __len__(self) -> int:
        return len(self._images)

    def paths(self, start: int, stop: int) -> list[str]:
        return [f"{self.name}[{row}]" for row in range(start, stop)]

    @contextmanager
    def reading(self) -> Iterator[Fetch]:
        yield lambda start, stop: partial(_decode, self._images[start:stop])


def _decode(images: NDArray[np.uint8], preprocessing: Preprocessing) -> Decoded:
    loads = [partial(Image.fromarray, np.ascontiguousarray(image)) for image in images]
    return decode_rows(torch.full((len(images),), -1), loads, preprocessing)


def _of_inputs(recorder: Recorder, inputs: Tensor, batch_size: int) -> Features:
    preprocessing = recorder.classifier.preprocessing
    expected = (preprocessing.channels, *preprocessing.input_size)
    if inputs.shape[1:] != expected or not len(inputs):
        raise ImagesError(
            f"images are {tuple(inputs.shape)}: expected normalised inputs of this network, "
            f"(N, {', '.join(map(str, expected))})"
        )
    cpu = torch.device("cpu")
    batches = torch.split(inputs.detach().float(), batch_size)
    return concatenate([recorder(batch).to(cpu) for batch in batches])


def _readable(blocks: Iterable[Rows], count: int) -> Features:
    found = []
    errors = []
    for block in blocks:
        errors += [
            f"{path}: {error}"
            for path, error in zip(block.paths, block.errors, strict=True)
            if error
        ]
        if block.features is not None:
            found.append(block.features)
    if not found:
        raise ImagesError(f"not one of {count} images could be read; {errors[0]}")
    if errors:
        log.warning("left out %d of %d images: %s", len(errors), count, errors[0])
    return concatenate(found)
