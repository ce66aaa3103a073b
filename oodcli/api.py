"""The Python API: load a classifier and detectors, record and score images as objects; and every
command as a function that writes files.

>>> import oodcli
>>> classifier = oodcli.load_classifier("digits.pt")
>>> energy = oodcli.load_detector("energy")
>>> features = oodcli.record(classifier, "noise:uniform?n=3", energy)
>>> features.logits.shape
torch.Size([3, 10])
>>> energy.score(features).shape  # higher = more out of distribution
torch.Size([3])

Functions have the defaults of their commands. They print nothing: notes go to the logger ``oodcli``
at level INFO, details at DEBUG. progress: called with the number of images done and their total (0
if unknown); an exception that it raises stops the job, and the same call resumes it. command: the
command that the file records as its origin. An existing output is an error without ``force``. Under
torchrun the processes share the work, and all but the first return None.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from oodcli.detectors import own
from oodcli.detectors.base import Detector
from oodcli.errors import DetectorError, ImagesError, OodcliError
from oodcli.features import Features, Rows, concatenate
from oodcli.files.artefact import read_artefact
from oodcli.files.describe import describe_file, kind_of
from oodcli.images import ImageSource, open_images
from oodcli.images.decoding import LONGEST_TIMEOUT, decode_rows
from oodcli.images.files import listed
from oodcli.images.pixels import limit_pixels
from oodcli.images.source import Fetch
from oodcli.images.source import Rows as Decoded
from oodcli.networks import load
from oodcli.networks.card import Overrides
from oodcli.networks.class_names import read_class_names
from oodcli.networks.classifier import Classifier
from oodcli.networks.devices import limit_threads
from oodcli.networks.preprocessing import Preprocessing
from oodcli.recording.recorder import Recorder, recordable
from oodcli.records import CHEAP, KNOWN_RECORDS
from oodcli.report.evaluation import Evaluation
from oodcli.stages.chosen import (
    choose_detectors,
    fit_on_noise,
    is_artefact,
    made_with,
    require_same_network,
)
from oodcli.stages.demo import Demonstrated, DemoStep
from oodcli.stages.demo import demo as _demo
from oodcli.stages.evaluate import Evaluated, draw_layers
from oodcli.stages.evaluate import evaluate as _evaluate
from oodcli.stages.extract_job import Extracted, ExtractRequest
from oodcli.stages.extract_job import extract as _extract
from oodcli.stages.fit_job import FitRequest, Fitted
from oodcli.stages.fit_job import fit as _fit
from oodcli.stages.inspect import inspect as _inspect
from oodcli.stages.invert_job import Inverted, InvertEstimate, InvertRequest
from oodcli.stages.invert_job import estimate as _estimate
from oodcli.stages.invert_job import invert as _invert
from oodcli.stages.labels import settle_labels
from oodcli.stages.merge_job import Merged
from oodcli.stages.merge_job import merge as _merge
from oodcli.stages.model import Checkpoint, Model, Running
from oodcli.stages.prepare import Prepared, PrepareRequest
from oodcli.stages.prepare import plan as _plan
from oodcli.stages.prepare import prepare as _prepare
from oodcli.stages.record import record_images
from oodcli.stages.score import Doubts
from oodcli.stages.score_job import Scored, ScoreRequest
from oodcli.stages.score_job import score as _score
from oodcli.stages.show import Shown, ShowRequest, refuse_page
from oodcli.stages.show import show as _show
from oodcli.stages.verdict import Deciding
from oodcli.stages.watching import Watch, Watching

__all__ = [
    "Checkpoint",
    "DemoStep",
    "Demonstrated",
    "Doubts",
    "Evaluated",
    "Evaluation",
    "Extracted",
    "Fitted",
    "InvertEstimate",
    "Inverted",
    "Merged",
    "Model",
    "Overrides",
    "Prepared",
    "Running",
    "Scored",
    "Shown",
    "demo",
    "draw_layers",
    "estimate_inversion",
    "evaluate",
    "extract",
    "fit",
    "inspect",
    "invert",
    "limit_pixels",
    "limit_threads",
    "listed",
    "load_classifier",
    "load_detector",
    "merge",
    "plan_preparation",
    "prepare",
    "read_class_names",
    "record",
    "score",
    "show",
]

log = logging.getLogger(__name__)

BATCH_SIZE = 64

Network = Classifier | Checkpoint | str | Path
"""A classifier, the path of a checkpoint, or a checkpoint with overrides."""
Parameters = Mapping[str, Mapping[str, Any]]
"""Hyper-parameters: detector → key → value, such as ``{"knn": {"k": 20}}``."""


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
    decode: str | None = None,
    class_names: Sequence[str] | None = None,
    layers: str | None = None,
    card: str | Path | None = None,
    multi_label: bool = False,
    state_key: str | None = None,
    device: str = "auto",
    prefer_ema: bool = False,
    trust_pickle: bool = False,
) -> Classifier:
    """Load the network of a checkpoint, frozen, with its preprocessing and class names.

    Values that are not given come from the model card beside it, then from the weights;
    ``assumptions`` lists what was assumed. The arguments are the options of the command line. mean,
    std: one number per channel, of pixels in [0, 1]. device: where the network stays; auto is
    the first GPU, or the CPU. Raises CheckpointError; OodcliError for an unusable device.
    """
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
        decode=decode,
        class_names=None if class_names is None else tuple(class_names),
        layers=layers,
        card=None if card is None else Path(card),
        multi_label=multi_label,
        state_key=state_key,
    )
    return load.load_classifier(
        Path(path),
        overrides,
        device=Model(Checkpoint(Path(path)), Running(device)).device(),
        prefer_ema=prefer_ema,
        trust_pickle=trust_pickle,
    )


def load_detector(
    name_or_path: str | Path | type[Detector],
    classifier: Classifier | None = None,
    *,
    code: str | type[Detector] | None = None,
    **hyperparameters: Any,
) -> Detector:
    """Load a detector: by name if it needs no fitting, otherwise from a file written by ``oodcli
    fit``. Its ``score(features)`` returns (N,) float64, higher = more out of distribution.

    For a detector of your own, give ``"FILE.py:CLASS"``, whose code is run, or its class. If it
    must be fitted, give the file of ``oodcli fit``, and the class as ``code``. classifier: check
    that the file was fitted for this network and preprocessing, and standardise ``1c-sum`` on noise
    with it, which runs 2,000 forward passes. Without it, nothing is checked. hyperparameters: as
    ``-p NAME.KEY=VALUE``, for a detector given by name.

    Raises DetectorError for an unknown name or hyper-parameter, or a detector that must be fitted
    first; FileError for a file that is missing, damaged, or belongs to another network.
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
    kind = own.find(word)
    given = {key: str(value) for key, value in hyperparameters.items()}
    fit_reference = None if classifier is None else partial(_on_noise, classifier)
    [chosen] = choose_detectors([word], {kind.name: given}, kind.needs, "", fit_reference)
    return chosen.detector


def _name_of(code: str | type[Detector]) -> str:
    """Register a class and return its name."""
    return own.register(code).name if isinstance(code, type) else own.find(code).name


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
    """Run the network over images and return their records, one row per readable image, in memory.

    images: IMAGES of the command line (a folder, a list, ``noise:uniform?n=500`` …); or pixels,
    uint8 (N, H, W, 3) or (N, H, W), of any size, which are preprocessed for the classifier; or
    inputs of the network, a normalised floating-point tensor (N, C, H, W). needs: the detectors
    that will score the rows, or records of ``oodcli extract --record``, or both; None for
    everything that one forward pass gives. precision: float32 or bfloat16.

    Unreadable images are left out with a warning of the logger ``oodcli``. Another warning reports
    assumptions about the labels. Raises ImagesError for images of another shape, or if none can be
    read; DetectorError for a record that is unknown, or that this network cannot give.
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
    recorder = Recorder(
        classifier, what | {"logits"}, made_with=made_with(chosen), precision=precision
    )
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


def inspect(
    file: Network,
    *,
    card: str | Path | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    precision: str | None = None,
    seed: int = 0,
    force: bool = False,
) -> dict[str, Any]:
    """What a checkpoint is and which detectors it allows, or how another file of oodcli was made:
    what ``oodcli inspect --json`` prints. card: where to write a checkpoint's model card.

    Raises CheckpointError or FileError for a file that cannot be read, and OodcliError for a card
    of anything but a checkpoint.
    """
    if isinstance(file, str | Path):
        kind = kind_of(Path(file))
        if kind != "checkpoint":
            if card is not None:
                raise OodcliError(f"{file} is no checkpoint: leave card out")
            return describe_file(Path(file), kind)
    model = _model(file, device, batch_size, precision, seed)
    return _inspect(model, _path(card), force=force)


def score(
    checkpoint: Network,
    images: str | Path | None,
    output: str | Path | TextIO,
    detectors: Iterable[str | Path | type[Detector]] = (),
    *,
    parameters: Parameters | None = None,
    fpr: float | None = None,
    threshold: str | Iterable[str] | Mapping[str, float] = (),
    contamination: float | None = None,
    mirror: bool = False,
    stream: bool = False,
    explain: bool = False,
    force: bool = False,
    restart: bool = False,
    timeout: float | None = None,
    shard: str | None = None,
    engine: str | None = None,
    html: str | Path | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    precision: str | None = None,
    seed: int = 0,
    progress: Watch | None = None,
    command: str = "oodcli.score",
) -> Scored | None:
    """Score images, or a cache if images is None, into a .csv, .jsonl or .parquet file, or as CSV
    into a stream; higher = more out of distribution.

    checkpoint: a checkpoint, or the path of the cache. detectors: names, paths of artefacts,
    ``"FILE.py:CLASS"`` or classes; by default the strongest detector that needs no data. fpr: the
    false-alarm rate of the verdicts, by the artefacts' calibration. threshold: detector → number
    above which a score is OOD, or ``"split"`` or ``"labelled"``. contamination: the expected share
    of OOD images. stream: add scores that borrow from similar images of the job. timeout: seconds
    to decode an image. shard: ``"3/64"``. engine: ``"ray"`` or
    ``"ray://HOST:PORT"``. html: also write the page of ``show``, to this file.

    Raises OodcliError for invalid arguments and unusable files; an unreadable image is a row with
    an error.
    """
    if isinstance(threshold, Mapping):
        threshold = [f"{name}={value!r}" for name, value in threshold.items()]
    request = ScoreRequest(
        _model(checkpoint, device, batch_size, precision, seed),
        None if images is None else str(images),
        Path(output) if isinstance(output, str | Path) else output,
        [_word(each) for each in detectors],
        _texts(parameters),
        Deciding(
            _share("fpr", fpr),
            [threshold] if isinstance(threshold, str) else list(threshold),
            _share("contamination", contamination),
        ),
        mirror=mirror,
        stream=stream,
        explain=explain,
        force=force,
        restart=restart,
        timeout=_seconds(timeout),
        shard=shard,
        engine=engine,
        command=command,
    )
    if html is None:
        return _score(request, progress)
    if request.file is None:
        raise OodcliError("a page shows a scores file: write the scores to a file, too")
    # Others can be opened under the paths in the scores, or drawn again.
    dataset = request.images is not None and request.images.startswith("torchvision:")
    show_request = ShowRequest(
        request.file,
        Path(html),
        request.images if dataset else None,
        force=force,
        command=command,
    )
    refuse_page(show_request.page, force=force)
    scored = _score(request, progress)
    if scored is not None:
        _show(show_request)
    return scored


def show(
    scores: str | Path,
    output: str | Path | None = None,
    images: str | Path | None = None,
    *,
    detectors: Iterable[str] = (),
    thumbnails: bool = True,
    force: bool = False,
    progress: Watch | None = None,
    command: str = "oodcli.show",
) -> Shown:
    """Write one HTML page to look at a scores file: counts, histogram, thumbnails, a list to search
    and sort, and a threshold to move. It needs no network.

    output: by default SCORES with the suffix .html. images: as for ``score``, if the images have
    moved; rows are matched by path. detectors: those to show, by default all; the page starts with
    the first. progress: called with the number of thumbnails done. Raises OodcliError for scores
    that cannot be read; an image that cannot be opened has no thumbnail.
    """
    request = ShowRequest(
        Path(scores),
        _path(output),
        None if images is None else str(images),
        list(detectors),
        thumbnails=thumbnails,
        force=force,
        command=command,
    )
    return _show(request, progress)


def invert(
    checkpoint: Network,
    output: str | Path | None = None,
    *,
    per_class: int = 100,
    total: int | None = None,
    objective: str = "kl",
    steps: int | None = None,
    classes: str | Iterable[int] | None = None,
    mirror: bool | None = None,
    compiled: bool | None = None,
    sensitivity: bool = True,
    force: bool = False,
    restart: bool = False,
    shard: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    precision: str | None = None,
    seed: int = 0,
    progress: Watch | None = None,
    command: str = "oodcli.invert",
) -> Inverted | None:
    """Invert a network: optimise virtual images from the statistics of its BatchNorm layers, into
    an .h5 file, by default CHECKPOINT.virtual.h5 in the working directory.

    total: number of images in all, instead of per_class. objective: kl, short, patches, paper or
    deepinversion. steps, mirror: None for the default of the objective. classes: classes to invert,
    such as ``"0-4,7"`` or [0, 7]. compiled: compile the step; None to compile if that is faster.
    sensitivity: measure what ``c2ir`` needs. Raises OodcliError for a network without BatchNorm and
    an objective other than patches, and for invalid arguments.
    """
    model = _model(checkpoint, device, batch_size, precision, seed)
    request = _inversion(
        *(model, output, per_class, total, objective, steps, classes, mirror, compiled),
        sensitivity=sensitivity,
        force=force,
        shard=shard,
    )
    return _invert(replace(request, restart=restart, command=command), progress)


def estimate_inversion(
    checkpoint: Network,
    output: str | Path | None = None,
    *,
    per_class: int = 100,
    total: int | None = None,
    objective: str = "kl",
    steps: int | None = None,
    classes: str | Iterable[int] | None = None,
    mirror: bool | None = None,
    compiled: bool | None = None,
    sensitivity: bool = True,
    force: bool = False,
    shard: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    precision: str | None = None,
    seed: int = 0,
) -> InvertEstimate:
    """Estimate how long ``invert`` would run with these arguments, by a trial. Writes nothing."""
    model = _model(checkpoint, device, batch_size, precision, seed)
    return _estimate(
        _inversion(
            *(model, output, per_class, total, objective, steps, classes, mirror, compiled),
            sensitivity=sensitivity,
            force=force,
            shard=shard,
        )
    )


def _inversion(
    model: Model,
    output: str | Path | None,
    per_class: int,
    total: int | None,
    objective: str,
    steps: int | None,
    classes: str | Iterable[int] | None,
    mirror: bool | None,
    compiled: bool | None,
    *,
    sensitivity: bool,
    force: bool,
    shard: str | None,
) -> InvertRequest:
    for name, value in (("per_class", per_class), ("total", total), ("steps", steps)):
        if value is not None and value < 1:
            raise OodcliError(f"{name} {value}: expected at least 1")
    if classes is not None and not isinstance(classes, str):
        classes = ",".join(map(str, classes))
    return InvertRequest(
        model,
        _path(output),
        per_class=per_class,
        total=total,
        objective=objective,
        steps=steps,
        classes=classes,
        mirror=mirror,
        compiled=compiled,
        sensitivity=sensitivity,
        force=force,
        shard=shard,
    )


def prepare(
    checkpoint: Network,
    output: str | Path | None = None,
    *,
    accuracy: float | None = None,
    images: str | Path | None = None,
    per_class: int | None = None,
    steps: int | None = None,
    mirror: bool | None = None,
    force: bool = False,
    restart: bool = False,
    device: str = "auto",
    batch_size: int | None = None,
    precision: str | None = None,
    seed: int = 0,
    progress: Watch | None = None,
    watching: Watching | None = None,
    command: str = "oodcli.prepare",
) -> Prepared | None:
    """Make all that ``score`` needs, in a folder that it finds, by default CHECKPOINT.oodcli:
    virtual images, caches, the strongest detector that they allow, and its calibration. Steps that
    are there already are not run again.

    accuracy: the published test accuracy, such as 0.917. images: real in-distribution images that
    the network was not trained on. per_class, steps, mirror: as of ``invert``; per_class: None for
    50, or with over 100 classes for a number in all that follows from the image size. progress:
    called with the number of steps done and their total. watching: opens a progress callback per
    step, which is called with the number of images, or detectors, and their total. Raises
    OodcliError for invalid arguments and unusable files.
    """
    model = _model(checkpoint, device, batch_size, precision, seed)
    request = _preparation(model, output, accuracy, images, per_class, steps, mirror, force)
    return _prepare(replace(request, restart=restart, command=command), progress, watching)


def plan_preparation(
    checkpoint: Network,
    output: str | Path | None = None,
    *,
    accuracy: float | None = None,
    images: str | Path | None = None,
    per_class: int | None = None,
    steps: int | None = None,
    mirror: bool | None = None,
    force: bool = False,
    device: str = "auto",
    batch_size: int | None = None,
    precision: str | None = None,
    seed: int = 0,
) -> Prepared | None:
    """The steps that ``prepare`` would run with these arguments, and how long they would take, by
    short trials. Writes nothing; None in processes of torchrun but the first."""
    model = _model(checkpoint, device, batch_size, precision, seed)
    return _plan(_preparation(model, output, accuracy, images, per_class, steps, mirror, force))


def _preparation(
    model: Model,
    output: str | Path | None,
    accuracy: float | None,
    images: str | Path | None,
    per_class: int | None,
    steps: int | None,
    mirror: bool | None,
    force: bool,
) -> PrepareRequest:
    return PrepareRequest(
        model,
        accuracy=accuracy,
        images=None if images is None else str(images),
        per_class=per_class,
        steps=steps,
        mirror=mirror,
        output=_path(output),
        force=force,
    )


def extract(
    checkpoint: Network,
    images: str | Path,
    output: str | Path | None = None,
    *,
    record: str | Iterable[str] | None = None,
    for_detectors: Iterable[str | type[Detector]] = (),
    parameters: Parameters | None = None,
    match_accuracy: float | None = None,
    mirror: bool = False,
    force: bool = False,
    restart: bool = False,
    timeout: float | None = None,
    shard: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    precision: str | None = None,
    seed: int = 0,
    progress: Watch | None = None,
    command: str = "oodcli.extract",
) -> Extracted | None:
    """Run the network over images and store the records in a feature cache, by default
    IMAGES.features.h5 in the working directory.

    record: records such as ``"layers.mean"``, or ``"all"``; by default everything that a forward
    pass gives, and for virtual images also the gradients. for_detectors: detectors whose records to
    store. match_accuracy: degrade virtual images until the network has this accuracy on them.
    mirror: also record the mirrored images. Raises OodcliError for invalid arguments and unusable
    files; an unreadable image is a row without features.
    """
    request = ExtractRequest(
        _model(checkpoint, device, batch_size, precision, seed),
        str(images),
        _path(output),
        record=[record] if isinstance(record, str) else None if record is None else list(record),
        for_detectors=[_word(each) for each in for_detectors],
        parameters=_texts(parameters),
        match_accuracy=_share("match_accuracy", match_accuracy),
        mirror=mirror,
        force=force,
        restart=restart,
        timeout=_seconds(timeout),
        shard=shard,
        command=command,
    )
    return _extract(request, progress)


def fit(
    cache: str | Path | None,
    detectors: Iterable[str | Path | type[Detector]],
    output: str | Path = "detectors",
    *,
    parameters: Parameters | None = None,
    calibrate: Iterable[str | Path] = (),
    ood: str | Path | None = None,
    noise: str | Path | None = None,
    labelled: str | Path | None = None,
    force: bool = False,
    progress: Watch | None = None,
    command: str = "oodcli.fit",
) -> Fitted:
    """Fit detectors on a cache and calibrate them; write one artefact each to the folder
    ``output``.

    cache: None to calibrate only. detectors: as for ``score``; ``["all"]`` for every detector that
    the cache can fit. calibrate: caches of real images, or of virtual ones with match_accuracy.
    ood: cache of OOD images, for detectors that learn from them. noise: cache of noise images.
    labelled: a CSV file with the columns path and ood. progress: called with the number of
    detectors done.

    Raises OodcliError if no detector can be fitted; ``artefacts`` has the reasons of those that
    could not.
    """
    request = FitRequest(
        _path(cache),
        [_word(each) for each in detectors],
        _texts(parameters),
        calibrate=[Path(each) for each in calibrate],
        ood=_path(ood),
        noise=_path(noise),
        labelled=_path(labelled),
        output=Path(output),
        force=force,
        command=command,
    )
    return _fit(request, progress)


def evaluate(
    id_scores: str | Path,
    ood_scores: Mapping[str, str | Path],
    *,
    detectors: Iterable[str] = (),
    output: str | Path | None = None,
    resamples: int = 1000,
    thumbnails: bool = True,
    seed: int = 0,
    force: bool = False,
    progress: Watch | None = None,
    command: str = "oodcli.evaluate",
) -> Evaluated:
    """Compute how well detectors separate in-distribution from OOD images, from scores files.

    ood_scores: name of the set → file. detectors: the detectors to compare, by default all. output:
    folder for report.html, tables and figures. resamples: bootstrap resamples; 0 for no intervals.
    progress: called with the number of detectors done. Raises OodcliError for files that cannot be
    compared.
    """
    return _evaluate(
        Path(id_scores),
        {name: Path(path) for name, path in ood_scores.items()},
        detectors=list(detectors),
        output=_path(output),
        resamples=resamples,
        thumbnails=thumbnails,
        seed=seed,
        force=force,
        watch=progress,
        command=command,
    )


def merge(
    shards: Iterable[str | Path],
    output: str | Path,
    *,
    with_verdicts: bool = False,
    force: bool = False,
    progress: Watch | None = None,
    command: str = "oodcli.merge",
) -> Merged:
    """Merge the outputs of all shards of a job into the file that the whole job would have written.

    with_verdicts: raise an error for shards of scores without verdicts. progress: called with the
    number of rows done. Raises OodcliError if the shards belong to different jobs, or one is
    missing.
    """
    return _merge(
        [Path(each) for each in shards],
        Path(output),
        with_verdicts=with_verdicts,
        force=force,
        watch=progress,
        command=command,
    )


def demo(
    output: str | Path = "oodcli-demo",
    *,
    force: bool = False,
    progress: Watch | None = None,
    watching: Watching | None = None,
    finished: Callable[[DemoStep], None] | None = None,
) -> Demonstrated:
    """Train a small network on scikit-learn's digits and run the whole pipeline on it, into the
    folder ``output``. Takes half a minute.

    progress: called with the number of commands done and their total. watching: opens a progress
    callback per command, as of ``prepare``. finished: called with each command when it is done.
    Raises OodcliError for a folder that exists.
    """
    return _demo(Path(output), force=force, watch=progress, watching=watching, finished=finished)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _model(
    checkpoint: Network, device: str, batch_size: int | None, precision: str | None, seed: int
) -> Model:
    if batch_size is not None and batch_size < 1:
        raise OodcliError(f"batch_size {batch_size}: expected at least 1")
    if isinstance(checkpoint, str | Path):
        checkpoint = Checkpoint(Path(checkpoint))
    return Model(checkpoint, Running(device, batch_size, precision, seed))


def _word(detector: str | Path | type[Detector]) -> str:
    """The detector as ``-d`` accepts it."""
    return _name_of(detector) if isinstance(detector, type) else str(detector)


def _texts(parameters: Parameters | None) -> dict[str, dict[str, str]]:
    """The hyper-parameters as ``-p`` accepts them."""
    return {
        name: {key: str(value) for key, value in given.items()}
        for name, given in (parameters or {}).items()
    }


def _share(name: str, value: float | None) -> float | None:
    if value is not None and not 0 <= value <= 1:
        raise OodcliError(f"{name} {value}: expected a number from 0 to 1")
    return value


def _seconds(timeout: float | None) -> float | None:
    if timeout is not None and not 0 < timeout <= LONGEST_TIMEOUT:
        raise OodcliError(
            f"timeout {timeout}: expected seconds above 0 and at most {LONGEST_TIMEOUT:g}"
        )
    return timeout
