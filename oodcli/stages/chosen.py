"""Detectors to score with: by name, from artefacts, or fitted on noise when they are needed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodcli import detectors
from oodcli.detectors import own, serial
from oodcli.detectors.bank import Bank
from oodcli.detectors.base import Detector
from oodcli.detectors.calibration import Calibration
from oodcli.detectors.hyperparameters import parse
from oodcli.errors import DetectorError
from oodcli.features import Features, Making, Rows, in_words
from oodcli.files.artefact import Artefact, read_artefact
from oodcli.files.origin import Origin, Words
from oodcli.float64 import has_float64
from oodcli.images import open_images
from oodcli.networks.classifier import Classifier
from oodcli.networks.preprocessing import Preprocessing
from oodcli.recording.recorder import MOMENTS, Recorder
from oodcli.stages.record import record_images


@dataclass(frozen=True)
class Chosen:
    """A detector to score with, and facts from its artefact. trained_on: virtual, real or noise;
    empty if it needs no fitting. saw: OOD data that it has learnt from, as text. column: name of
    its column, if not the detector's. device: its device; None for the CPU. artefact: the file that
    it comes from. without_rows: classes without a fitting row."""

    detector: Detector
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    threshold: float | None = None
    trained_on: str = ""
    saw: str = ""
    column: str = ""
    device: torch.device | None = None
    artefact: str = ""
    without_rows: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The name of its column."""
        return self.column or self.detector.name


def fingerprint(chosen: Chosen) -> str:
    """Settings of a detector and, if it comes from an artefact, the SHA-256 of its fitted state:
    equal for equal scores, before ``placed``. The last digits of a detector fitted here depend on
    the batch size."""
    settings = ", ".join(
        f"{key}={value}" for key, value in serial.settings(chosen.detector).items()
    )
    code = detectors.code_sha256(chosen.detector.name)
    if code:
        settings = ", ".join(filter(None, (settings, f"code {code[:16]}")))
    if not chosen.artefact:
        return settings or "as it is"
    found = hashlib.sha256()
    for name, value in sorted(serial.state(chosen.detector).items()):
        found.update(name.encode())
        for block in value.blocks() if isinstance(value, Bank) else [value]:
            found.update(block.contiguous().numpy().tobytes())
    words = (settings, f"fitted on {chosen.trained_on}" if chosen.trained_on else "", chosen.saw)
    return ", ".join(filter(None, (*words, f"state {found.hexdigest()[:16]}")))


FitReference = Callable[[type[Detector], Mapping[str, Any]], Detector]
"""Fits a detector on its reference images, with the current network."""


def choose_detectors(
    wanted: Sequence[str],
    hyperparameters: Mapping[str, Mapping[str, str]],
    available: frozenset[str],
    sha256: str,
    fit_reference: FitReference | None = None,
    preprocessing: Preprocessing | None = None,
    averaged: bool | None = None,
) -> list[Chosen]:
    """Detectors from names, from ``FILE.py:CLASS`` and from paths of artefacts; ``all`` is every
    built-in detector that needs no images of its own and that ``available`` allows. Beside an
    artefact of the same detector, ``FILE.py:CLASS`` is only the artefact's code. A detector given
    twice, fitted on virtual and on real images, has the columns ``knn[virtual]`` and ``knn[real]``.

    Raises DetectorError or FileError for a detector that is unknown, needs fitting, belongs to
    another checkpoint, other weights or preprocessing, or is given twice otherwise.
    """
    chosen: list[Chosen] = []
    made: set[str] = set()

    def make(kind: type[Detector]) -> None:
        given = parse(kind, hyperparameters.get(kind.name, {}))
        made.add(kind.name)
        if not kind.fitted:
            chosen.append(Chosen(kind(**given)))
        elif fit_reference is not None:
            chosen.append(Chosen(fit_reference(kind, given), trained_on="noise"))

    listed = [word for word in wanted if word != "all"]
    kinds = {word: own.find(word) for word in listed if not is_artefact(word)}
    fitted = {
        word: _belonging(Path(word), sha256, preprocessing, averaged)
        for word in listed
        if word not in kinds
    }
    given_fitted = {each.detector.name for each in fitted.values()}
    for word in listed:
        if word in fitted:
            chosen.append(fitted[word])
            continue
        kind = kinds[word]
        if detectors.is_code(word) and kind.name in given_fitted:
            continue
        if kind.fitted and (kind.reference_images is None or fit_reference is None):
            raise _must_be_fitted(kind)
        make(kind)
    chosen = _told_apart(chosen)
    if "all" in wanted:
        names = {each.detector.name for each in chosen}
        for name in detectors.names():
            kind = detectors.get(name)
            fits = not kind.fitted or (kind.reference_images is not None and fit_reference)
            several = kind.multi_label or "multi-label" not in available
            if name not in names and fits and several and kind.needs <= available:
                make(kind)
        chosen.sort(key=lambda each: _place(each.detector.name))
    if "multi-label" in available:
        require_multi_label(each.detector for each in chosen)
    unused = sorted(hyperparameters.keys() - made)
    if unused:
        raise DetectorError(
            f"-p {unused[0]}.…: {unused[0]} is not among the detectors given by name"
        )
    return chosen


def require_multi_label(chosen: Iterable[Detector | type[Detector]]) -> None:
    """Raises DetectorError for a detector that takes each image to have one label."""
    for each in chosen:
        if not each.multi_label:
            fitting = [name for name in detectors.names() if detectors.get(name).multi_label]
            raise DetectorError(
                f"{each.name} is for networks with one label per image, but this one has several "
                f"(--multi-label): use {' or '.join(fitting)}"
            )


def is_artefact(word: str) -> bool:
    """Whether ``-d`` names a file written by ``fit``."""
    if word in detectors.names() or detectors.is_code(word):
        return False
    return word.endswith(".safetensors") or Path(word).is_file()


def _place(name: str) -> int:
    """Position of a detector in the listing; user-defined ones come last."""
    return [*detectors.names(), name].index(name)


def require_built_in(chosen: Iterable[Chosen], engine: str) -> None:
    """Raises DetectorError for a detector whose code the hosts of a cluster do not have."""
    for each in chosen:
        if each.detector.name not in detectors.names():
            word = detectors.word_for(each.detector.name)
            raise DetectorError(
                f"--engine {engine}: the cluster's hosts do not have the code of {word}: leave out "
                "--engine or this detector"
            )


def _told_apart(chosen: Sequence[Chosen]) -> list[Chosen]:
    """The detectors with distinct columns: duplicates are named after their fitting images. Raises
    DetectorError if that does not distinguish them."""
    count = Counter(each.detector.name for each in chosen)
    alike = Counter((each.detector.name, each.trained_on) for each in chosen)
    told = []
    for each in chosen:
        name = each.detector.name
        if count[name] == 1:
            told.append(each)
        elif each.trained_on and alike[name, each.trained_on] == 1:
            told.append(replace(each, column=f"{name}[{each.trained_on}]"))
        else:
            times = "twice" if count[name] == 2 else f"{count[name]} times"
            raise DetectorError(
                f"{name} is given {times}: give it once, or as two artefacts, one fitted on "
                "virtual and one on real images"
            )
    return told


def _must_be_fitted(kind: type[Detector]) -> DetectorError:
    further = further_rows(kind)
    made = {option.split()[1]: words for option, words in further.items()}
    if kind.reference_images is not None:
        made["CACHE.h5"] = f"extract {kind.reference_images}"
    word = detectors.word_for(kind.name)
    command = " ".join(["oodcli fit CACHE.h5 -d", word, *further])
    how = f"'{command}' writes {kind.name}.safetensors; give its path to -d"
    if word != kind.name:
        how += f" with -d {word}"
    if made:
        how += f" ({'; '.join(f'{file}: {words}' for file, words in made.items())})"
    return DetectorError(f"{kind.name} must be fitted first", hint=how)


SIMILARITY = "layers.mean"
"""The record that ``score --stream`` compares images by."""
POOL = "--calibrate POOL.h5"


def further_rows(kind: type[Detector]) -> dict[str, str]:
    """Options of ``fit`` that a detector needs beside the rows to fit on → how to create their
    file."""
    found = {}
    if kind.noise_images is not None:
        found["--noise NOISE.h5"] = f"extract '{kind.noise_images}'"
    if kind.needs_pool:
        found[POOL] = (
            "extract other virtual images with --match-accuracy and the published accuracy"
        )
    return found


def require_same_network(
    artefact: Artefact,
    sha256: str,
    preprocessing: Preprocessing | None = None,
    averaged: bool | None = None,
) -> None:
    """Raises FileError for an artefact of another checkpoint or of other weights in it, or fitted
    on images with another preprocessing; None is not compared."""
    Origin(artefact.checkpoint_sha256, artefact.averaged, artefact.preprocessing).require_same(
        Origin(sha256, averaged, preprocessing),
        Words(
            f"{artefact.path} was fitted for",
            "this is",
            weights="these are",
            inputs=(f"{artefact.path} was fitted on images prepared with", "here with"),
            hint="fit it on a cache of this checkpoint",
        ),
    )


def _belonging(
    path: Path, sha256: str, preprocessing: Preprocessing | None, averaged: bool | None
) -> Chosen:
    artefact = read_artefact(path)
    require_same_network(artefact, sha256, preprocessing, averaged)
    trained_on = artefact.fitted_on.get("kind", "")
    if trained_on and artefact.detector.reference_images is not None:
        trained_on = "noise" if trained_on == "real" else trained_on
    return Chosen(
        artefact.detector,
        artefact.calibrations,
        artefact.threshold,
        trained_on,
        artefact.saw,
        artefact=str(path),
        without_rows=artefact.without_rows,
    )


def fit_on_noise(
    classifier: Classifier, kind: type[Detector], given: Mapping[str, Any], batch_size: int
) -> Detector:
    """A detector fitted on its reference images. Raises DetectorError if it is set to virtual
    images instead, which need an artefact."""
    if given.get("reference") == "virtual" or kind.reference_images is None:
        raise _must_be_fitted(kind)
    source = open_images(kind.reference_images, classifier.preprocessing, classifier.class_names)
    recorder = Recorder(classifier, kind.fit_needs(**given))
    return kind.fit(
        _Recorded(partial(record_images, classifier, source, recorder, batch_size)), **given
    )


@dataclass(frozen=True)
class _Recorded:
    """The rows of images, recorded anew each time: those of many images are hundreds of megabytes,
    which in between the feature maps would also keep the memory of these from being used again."""

    record: Callable[[], Iterable[Rows]]

    def __iter__(self) -> Iterator[Features]:
        return (rows.features for rows in self.record() if rows.features is not None)


def made_with(chosen: Iterable[Detector]) -> dict[str, Making]:
    """How to make the records of the chosen detectors, by group. Raises DetectorError where two
    want one made differently."""
    return one_way((each.name, each.made_with) for each in chosen)


def one_way(wanted: Iterable[tuple[str, Making | None]]) -> dict[str, Making]:
    """The same of names and what each wants."""
    found: dict[str, tuple[str, Making]] = {}
    for name, making in wanted:
        if making is None:
            continue
        before, known = found.setdefault(making.group, (name, making))
        if known != making:
            raise DetectorError(
                f"{before} wants {in_words(known)}, but {name} wants {in_words(making)}: use one "
                "at a time"
            )
    return {group: making for group, (_, making) in found.items()}


def needs(
    chosen: Iterable[Chosen], *, mirror: bool = False, stream: bool = False
) -> frozenset[str]:
    """All records that the chosen detectors need to score, and with ``stream`` to find similar
    images."""
    views = ({"mirror"} if mirror else set()) | ({SIMILARITY} if stream else set())
    return frozenset[str]().union(
        *(each.detector.score_needs for each in chosen), {"logits"}, views
    )


def layers_read(chosen: Iterable[Chosen], *, stream: bool = False) -> frozenset[str] | None:
    """The layers whose means and spreads the chosen detectors read; None for all."""
    found = [each.detector.layers_read for each in chosen if each.detector.score_needs & MOMENTS]
    if stream or None in found:
        return None
    return frozenset[str]().union(*filter(None, found))


def placed(chosen: Iterable[Chosen], device: str) -> list[Chosen]:
    """The same detectors, heavy ones moved to a GPU if ``device`` supports float64."""
    there = torch.device(device)
    if there.type == "cpu" or not has_float64(there):
        return list(chosen)
    return [
        replace(each, detector=each.detector.to(there), device=there)
        if each.detector.heavy
        else each
        for each in chosen
    ]


def score_views(detector: Detector, features: Features, *, mirror: bool) -> Tensor:
    """(N,) score of each image; with ``mirror`` plus that of the mirrored image."""
    scores = detector.score(features)
    if mirror and features.mirror is not None:
        scores = scores + detector.score(features.mirror)
    return scores
