"""The stages, without a terminal: what each subcommand does between its options and its print.

Each writes its file whole or not at all, and returns a summary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from oodcli import __version__, detectors
from oodcli.classifier import Classifier
from oodcli.detectors.base import Detector
from oodcli.errors import DetectorError, FileError, ImagesError
from oodcli.features import Features, OdinStep, Rows, recorded
from oodcli.files.artefact import Artefact, read_artefact, write_artefact
from oodcli.files.atomic import atomic
from oodcli.files.cache import CacheWriter, FeatureCache
from oodcli.files.hdf5 import Provenance, writing
from oodcli.files.scores import ScoreRow, ScoresWriter
from oodcli.files.virtual import VirtualWriter, read_sensitivity
from oodcli.images import ImageSource, batches
from oodcli.inversion.invert import Plan, invert
from oodcli.inversion.quality import Quality
from oodcli.recording import Recorder
from oodcli.report.contact_sheet import contact_sheet

Progress = Callable[[int], None]


def no_progress(count: int) -> None:
    """Nobody is watching."""


# ----------------------------------------------------------------------------- recording


def record_images(
    classifier: Classifier,
    source: ImageSource,
    recorder: Recorder,
    batch_size: int,
    progress: Progress = no_progress,
) -> Iterator[Rows]:
    """The rows of a source in order, recorded a batch at a time. Raises ImagesError at the end
    when not one image could be read."""
    readable = 0
    reason = ""
    for batch in batches(source, classifier.preprocessing, batch_size):
        good = torch.tensor([error is None for error in batch.errors])
        features = recorder(batch.images, batch.labels[good]) if len(batch.images) else None
        readable += len(batch.images)
        reason = reason or next((error for error in batch.errors if error), "")
        yield Rows(batch.paths, batch.labels, batch.errors, features)
        progress(len(batch.paths))
    if not readable:
        raise ImagesError(
            f"{source.name}: not one of {len(source)} images could be read ({reason})"
        )


# ----------------------------------------------------------------------------- invert


def invert_to_file(
    classifier: Classifier,
    plan: Plan,
    path: Path,
    provenance: Provenance,
    *,
    force: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Virtual images into ``path`` and a contact sheet beside it; returns the quality report."""
    sheet_path = path.with_suffix(".png")
    settings = {**asdict(plan.objective), "steps": plan.total_steps, "per_class": plan.per_class}
    count = len(plan.classes) * plan.per_class
    quality = Quality(classifier)
    shown: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as stack:
        partial = stack.enter_context(atomic(path, force=force))
        sheet = stack.enter_context(atomic(sheet_path, force=force))
        with writing(partial) as new:
            writer = VirtualWriter(new.file, provenance, count, settings)
            for batch in invert(classifier, plan, progress=progress):
                writer.append(batch.images, batch.label, batch.sensitivity)
                new.check()
                quality.add(batch.images, batch.label)
                if len(shown) < 10:
                    shown.append((batch.images, batch.label))
            report = quality.report()
            writer.finish(report)
        images, labels = (torch.cat(parts) for parts in zip(*shown, strict=True))
        pixels = classifier.preprocessing.to_pixels(images.float()).clamp(0, 1)
        contact_sheet(pixels, labels, classifier.class_names, sheet)
    return {
        "file": str(path),
        "contact_sheet": str(sheet_path),
        "images": count,
        "classes": len(plan.classes),
        "objective": plan.objective.name,
        "steps": plan.total_steps,
        "precision": plan.precision,
        "device": str(classifier.device),
        **report,
    }


# ----------------------------------------------------------------------------- extract


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
) -> dict[str, Any]:
    """Records a source into a cache. sensitivity_from: the virtual file that the source reads, for
    the sensitivities that inversion measured."""
    unreadable = 0
    row = 0
    agreed = known = 0
    with atomic(path, force=force) as partial, writing(partial) as new:
        writer = CacheWriter(new.file, provenance, len(source))
        for rows in record_images(classifier, source, recorder, batch_size, progress):
            stop = row + len(rows.paths)
            features = rows.features
            if features is not None and sensitivity_from is not None:
                features = _with_sensitivity(features, sensitivity_from, row, stop)
            writer.append(replace(rows, features=features))
            new.check()
            unreadable += sum(error is not None for error in rows.errors)
            if features is not None and features.logits is not None and features.label is not None:
                labelled = features.label >= 0
                hits = features.logits.argmax(1) == features.label
                known += int(labelled.sum())
                agreed += int((hits & labelled).sum())
            row = stop
    return {
        "file": str(path),
        "images": len(source),
        "unreadable": unreadable,
        "recorded": sorted(recorder.what | ({"layers.sensitivity"} if sensitivity_from else set())),
        "labelled": known,
        "accuracy": agreed / known if known else None,
    }


def _with_sensitivity(features: Features, path: Path, start: int, stop: int) -> Features:
    found = read_sensitivity(path, start, stop)
    layers = {
        name: replace(layer, sensitivity=found.get(name)) for name, layer in features.layers.items()
    }
    return replace(features, layers=layers)


# ----------------------------------------------------------------------------- fit


def fit_to_folder(
    cache: FeatureCache,
    chosen: Sequence[type[Detector]],
    hyperparameters: Mapping[str, Mapping[str, Any]],
    folder: Path,
    *,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Fits detectors on a cache, one artefact each. Everything is fitted before anything is
    written. Raises DetectorError when one cannot be fitted on this cache."""
    fitted: list[Artefact] = []
    for kind in chosen:
        given = dict(hyperparameters.get(kind.name, {}))
        needs = kind.fit_needs(**given) if kind.fitted else frozenset[str]()
        cache.require(needs, kind.name)
        detector = kind.fit(cache.rows(needs), **given)
        fitted_on = {
            "file": cache.path.name,
            "source": cache.provenance.source,
            "rows": cache.count,
            "kind": "virtual" if cache.provenance.virtual else "real",
        }
        fitted.append(Artefact(detector, cache.provenance.checkpoint_sha256, fitted_on))
    summary = []
    with ExitStack() as stack:
        for artefact in fitted:
            path = folder / f"{artefact.detector.name}.safetensors"
            partial = stack.enter_context(atomic(path, force=force))
            write_artefact(artefact, partial)
            summary.append(
                {
                    "file": str(path),
                    "detector": artefact.detector.name,
                    "fitted_on": artefact.fitted_on,
                    "bytes": partial.stat().st_size,
                }
            )
    return summary


# ----------------------------------------------------------------------------- score


def choose_detectors(
    wanted: Sequence[str],
    hyperparameters: Mapping[str, Mapping[str, str]],
    available: frozenset[str],
    sha256: str,
) -> list[Detector]:
    """Detectors from names and artefacts' paths; ``all`` is every one that needs no fitting and
    that ``available`` allows. Raises DetectorError or FileError for one that is unknown, needs
    fitting, belongs to another checkpoint or is given twice."""
    chosen: list[Detector] = []
    for word in wanted:
        if word == "all":
            kinds = [detectors.get(name) for name in detectors.names()]
            chosen += [
                kind(**kind.parse(hyperparameters.get(kind.name, {})))
                for kind in kinds
                if not kind.fitted and kind.needs <= available
            ]
        elif word in detectors.names():
            kind = detectors.get(word)
            if kind.fitted:
                raise DetectorError(
                    f"{word} must be fitted first: 'oodcli fit CACHE.h5 -d {word}' makes "
                    f"{word}.safetensors, whose path -d takes"
                )
            chosen.append(kind(**kind.parse(hyperparameters.get(word, {}))))
        elif word.endswith(".safetensors") or Path(word).is_file():
            chosen.append(_belonging(Path(word), sha256).detector)
        else:
            detectors.get(word)  # raises the sentence that lists the names
    names = [detector.name for detector in chosen]
    twice = sorted({name for name in names if names.count(name) > 1} - {"all"})
    if twice and "all" not in wanted:
        raise DetectorError(f"{twice[0]} is given twice: each detector has one column")
    unique = {detector.name: detector for detector in reversed(chosen)}
    kept = [unique.pop(name) for name in dict.fromkeys(names)]
    unused = sorted(hyperparameters.keys() - {d.name for d in kept if not d.fitted})
    if unused:
        raise DetectorError(
            f"-p {unused[0]}.…: {unused[0]} is not among the detectors that are made here"
        )
    return kept


def _belonging(path: Path, sha256: str) -> Artefact:
    artefact = read_artefact(path)
    if artefact.checkpoint_sha256 != sha256:
        raise FileError(
            f"{path} was fitted for the checkpoint {artefact.checkpoint_sha256[:12]}…, but this is "
            f"{sha256[:12]}…: fit it on features of this checkpoint"
        )
    return artefact


def odin_step(chosen: Iterable[Detector]) -> OdinStep | None:
    """The perturbation that the chosen detectors need, if any."""
    return next((d.odin_step for d in chosen if d.odin_step is not None), None)


def needs(chosen: Iterable[Detector]) -> frozenset[str]:
    """Everything that must be recorded to score with the chosen detectors."""
    return frozenset[str]().union(*(detector.needs for detector in chosen), {"logits"})


@dataclass(frozen=True)
class ScoreSummary:
    """rows: all inputs. unreadable, infinite: how many had no score, or +inf for some detector.
    flagged: detector → how many exceed its threshold."""

    rows: int
    unreadable: int
    infinite: int
    flagged: dict[str, int]

    @property
    def ood_fraction(self) -> dict[str, float]:
        """Of the rows that could be scored."""
        scored = max(self.rows - self.unreadable, 1)
        return {name: count / scored for name, count in self.flagged.items()}


def score_to_file(
    rows: Iterable[Rows],
    chosen: Sequence[Detector],
    class_names: Sequence[str],
    target: Path | TextIO,
    *,
    thresholds: Mapping[str, float] | None = None,
    force: bool = False,
) -> ScoreSummary:
    """Scores rows as they come. thresholds: detector → the score above which an input counts as
    OOD; such a detector gets a column ``<detector>.ood``."""
    thresholds = thresholds or {}
    columns: list[str] = []
    for detector in chosen:
        columns.append(detector.name)
        if detector.name in thresholds:
            columns.append(f"{detector.name}.ood")
    total = unreadable = infinite = 0
    flagged = dict.fromkeys(thresholds, 0)
    with ExitStack() as stack:
        if isinstance(target, Path):
            target = stack.enter_context(atomic(target, force=force))
        writer = stack.enter_context(ScoresWriter(target, columns))
        for block in rows:
            scored = _score_block(block, chosen, class_names, thresholds)
            writer.write(scored)
            for row in scored:
                total += 1
                unreadable += bool(row.error)
                infinite += any(math.isinf(value) for value in row.scores.values())
                for name in flagged:
                    flagged[name] += row.scores.get(f"{name}.ood") == 1
    return ScoreSummary(total, unreadable, infinite, flagged)


def _score_block(
    block: Rows,
    chosen: Sequence[Detector],
    class_names: Sequence[str],
    thresholds: Mapping[str, float],
) -> list[ScoreRow]:
    scores: dict[str, list[float]] = {}
    predicted: list[int] = []
    confidence: list[float] = []
    if block.features is not None and len(block.features):
        probabilities = torch.softmax(recorded(block.features.logits).double(), 1)
        top = probabilities.max(1)
        predicted, confidence = top.indices.tolist(), top.values.tolist()
        for detector in chosen:
            values = detector.score(block.features)
            scores[detector.name] = values.tolist()
            if detector.name in thresholds:
                flags = ~(values <= thresholds[detector.name])  # +inf counts, whatever the limit
                scores[f"{detector.name}.ood"] = flags.int().tolist()
    found = []
    index = 0
    for path, label, error in zip(block.paths, block.labels.tolist(), block.errors, strict=True):
        name = class_names[label] if 0 <= label < len(class_names) else ""
        if error is not None:
            found.append(ScoreRow(path, name, error=error))
            continue
        found.append(
            ScoreRow(
                path,
                name,
                class_names[predicted[index]],
                confidence[index],
                {column: values[index] for column, values in scores.items()},
            )
        )
        index += 1
    return found


# ----------------------------------------------------------------------------- shared


def provenance(
    classifier: Classifier, *, source: str, command: str, seed: int, precision: str, virtual: bool
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
    )
