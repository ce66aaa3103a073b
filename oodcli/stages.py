"""The stages, without a terminal: what each subcommand does between its options and its print.

Each writes its file whole or not at all, and returns a summary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from oodcli import __version__, detectors
from oodcli.calibration import Calibration, calibrate, labelled_threshold
from oodcli.classifier import Classifier
from oodcli.detectors.base import Detector
from oodcli.errors import DetectorError, FileError, ImagesError
from oodcli.features import Features, OdinStep, Rows, recorded
from oodcli.files.artefact import Artefact, read_artefact, write_artefact
from oodcli.files.atomic import atomic, refuse_existing
from oodcli.files.cache import CacheWriter, FeatureCache
from oodcli.files.hdf5 import Provenance, writing
from oodcli.files.scores import ScoreRow, ScoresWriter
from oodcli.files.virtual import VirtualWriter, read_sensitivity
from oodcli.images import ImageSource, batches, open_images
from oodcli.inversion.degrade import blurred, match_accuracy
from oodcli.inversion.invert import Plan, invert
from oodcli.inversion.quality import Quality
from oodcli.recording import Recorder
from oodcli.report.contact_sheet import contact_sheet

Progress = Callable[[int], None]

Change = Callable[[Tensor], Tensor]
"""What is done to images (N, C, H, W), normalised, before the network sees them."""


def no_progress(count: int) -> None:
    """Nobody is watching."""


# ----------------------------------------------------------------------------- recording


def record_images(
    classifier: Classifier,
    source: ImageSource,
    recorder: Recorder,
    batch_size: int,
    progress: Progress = no_progress,
    change: Change | None = None,
) -> Iterator[Rows]:
    """The rows of a source in order, recorded a batch at a time, ``change`` made before. Raises
    ImagesError at the end when not one image could be read."""
    readable = 0
    reason = ""
    for batch in batches(source, classifier.preprocessing, batch_size):
        good = torch.tensor([error is None for error in batch.errors])
        images = batch.images if change is None else change(batch.images)
        features = recorder(images, batch.labels[good]) if len(images) else None
        readable += len(images)
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
        unfinished = stack.enter_context(atomic(path, force=force))
        sheet = stack.enter_context(atomic(sheet_path, force=force))
        with writing(unfinished) as new:
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
    change: Change | None = None,
    sensitivity_from: Path | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Records a source into a cache. sensitivity_from: the virtual file that the source reads, for
    the sensitivities that inversion measured."""
    unreadable = 0
    row = 0
    agreed = known = 0
    with atomic(path, force=force) as unfinished, writing(unfinished) as new:
        writer = CacheWriter(new.file, provenance, len(source))
        for rows in record_images(classifier, source, recorder, batch_size, progress, change):
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


def degrading(
    classifier: Classifier, source: ImageSource, target: float, *, batch_size: int, precision: str
) -> tuple[Change, float, float]:
    """The blur that brings the network's accuracy on virtual images down to ``target``; its
    standard deviation in pixels and the accuracy reached. Raises OodcliError when the target is
    out of reach."""
    recorder = Recorder(classifier, frozenset({"logits"}), precision=precision)

    def accuracy(sigma: float) -> float:
        right = known = 0
        change = partial(blurred, sigma=sigma)
        for rows in record_images(classifier, source, recorder, batch_size, change=change):
            if rows.features is not None and rows.features.label is not None:
                label = rows.features.label
                hits = recorded(rows.features.logits).argmax(1) == label
                right += int(hits.sum())
                known += int((label >= 0).sum())
        return right / max(known, 1)

    sigma, reached = match_accuracy(accuracy, target)
    return partial(blurred, sigma=sigma), sigma, reached


def _with_sensitivity(features: Features, path: Path, start: int, stop: int) -> Features:
    found = read_sensitivity(path, start, stop)
    layers = {
        name: replace(layer, sensitivity=found.get(name)) for name, layer in features.layers.items()
    }
    return replace(features, layers=layers)


# ----------------------------------------------------------------------------- fit


@dataclass(frozen=True)
class FitInputs:
    """What detectors are fitted and calibrated on. train: rows to fit on. calibrate: caches of real
    images or of accuracy-matched virtual ones. ood: rows known to be out of distribution.
    labelled: path of an image → whether somebody marked it as OOD."""

    train: FeatureCache | None
    calibrate: Sequence[FeatureCache] = ()
    ood: FeatureCache | None = None
    labelled: Mapping[str, bool] | None = None

    @property
    def sha256(self) -> str:
        """The checkpoint that all of them come from. Raises FileError when they differ."""
        caches = [cache for cache in (self.train, *self.calibrate, self.ood) if cache is not None]
        if not caches:
            raise DetectorError("nothing to fit on: give a cache, or --calibrate FILE.h5")
        first = caches[0]
        for cache in caches[1:]:
            if cache.provenance.checkpoint_sha256 != first.provenance.checkpoint_sha256:
                raise FileError(
                    f"{cache.path} was extracted with the checkpoint "
                    f"{cache.provenance.checkpoint_sha256[:12]}…, but {first.path} with "
                    f"{first.provenance.checkpoint_sha256[:12]}…: use one checkpoint"
                )
        return first.provenance.checkpoint_sha256


def fit_to_folder(
    inputs: FitInputs,
    chosen: Sequence[type[Detector] | Artefact],
    hyperparameters: Mapping[str, Mapping[str, Any]],
    folder: Path,
    *,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Fits and calibrates detectors, one artefact each; one that comes as an artefact is fitted
    already. Everything is fitted before anything is written. Raises DetectorError when one cannot
    be fitted on these rows, FileError when an artefact is of another checkpoint."""
    for each in chosen:
        name = each.detector.name if isinstance(each, Artefact) else each.name
        if not folder.exists():
            continue
        refuse_existing(folder / f"{name}.safetensors", force=force)
    for cache in inputs.calibrate:
        if cache.provenance.virtual and cache.provenance.matched_accuracy is None:
            raise DetectorError(
                f"{cache.path} holds raw virtual images, whose scores are far lower than those of "
                "real ones, so no verdict can rest on them: degrade them first with 'oodcli "
                "extract CHECKPOINT V.h5 --match-accuracy 0.9' (the published accuracy)"
            )
    sha256 = inputs.sha256
    fitted = []
    for each in chosen:
        if isinstance(each, Artefact):
            require_checkpoint(each, sha256)
            made: tuple[Detector, dict[str, Any], list[Tensor] | None]
            made = each.detector, each.fitted_on, None
        else:
            made = _fit_one(each, dict(hyperparameters.get(each.name, {})), inputs)
        fitted.append(_calibrate_one(*made, inputs))
    summary = []
    with ExitStack() as stack:
        for detector, fitted_on, calibrations, limit in fitted:
            path = folder / f"{detector.name}.safetensors"
            unfinished = stack.enter_context(atomic(path, force=force))
            artefact = Artefact(detector, sha256, fitted_on, calibrations, limit)
            write_artefact(artefact, unfinished)
            plain = calibrations.get("plain")
            summary.append(
                {
                    "file": str(path),
                    "detector": detector.name,
                    "fitted_on": fitted_on,
                    "calibrated_on": None if plain is None else plain.words,
                    "resolution": None if plain is None else plain.resolution,
                    "achieved_at_0.05": None if plain is None else plain.achieved(0.05),
                    "threshold": limit,
                    "bytes": unfinished.stat().st_size,
                }
            )
    return summary


HELD_OUT_FROM = 50
"""With fewer real rows than this there is no calibration unless --calibrate names a file."""


def _fit_one(
    kind: type[Detector], given: dict[str, Any], inputs: FitInputs
) -> tuple[Detector, dict[str, Any], list[Tensor] | None]:
    """A detector, what it was fitted on, and scores of real rows that it has not seen."""
    cache = inputs.train
    fitted_on: dict[str, Any] = {}
    held_out: list[Tensor] | None = None
    if kind.fitted:
        if cache is None:
            raise DetectorError(
                f"{kind.name} must be fitted: give a cache made by 'oodcli extract'"
            )
        needs = kind.fit_needs(**given)
        cache.require(needs, kind.name)
        _check_reference(kind, given, cache)
        if kind.uses_ood:
            given["ood"] = _ood_rows(kind, inputs, needs)
        detector = kind.fit(cache.rows(needs), **given)
        fitted_on = {
            "file": cache.path.name,
            "source": cache.provenance.source,
            "rows": cache.count,
            "kind": "virtual" if cache.provenance.virtual else "real",
            "ood": None if not kind.uses_ood or inputs.ood is None else inputs.ood.path.name,
        }
        real = not cache.provenance.virtual and kind.reference_images is None
        alone = not inputs.calibrate and inputs.labelled is None
        if real and alone and cache.count >= HELD_OUT_FROM:
            # A detector is kinder to the rows that it was fitted on, so another one, fitted
            # without every fifth row, says how rows that it has not seen are scored.
            apart = kind.fit(cache.rows(needs, lambda row: row % 5 != 0), **given)
            kept = cache.rows(needs | apart.needs, lambda row: row % 5 == 0)
            held_out = [apart.score(block) for block in kept]
    else:
        detector = kind(**given)
        alone = not inputs.calibrate and inputs.labelled is None
        if cache is not None and not cache.provenance.virtual and alone:
            cache.require(detector.needs, kind.name)
            held_out = [detector.score(block) for block in cache.rows(detector.needs)]
    return detector, fitted_on, held_out


def _calibrate_one(
    detector: Detector,
    fitted_on: dict[str, Any],
    held_out: list[Tensor] | None,
    inputs: FitInputs,
) -> tuple[Detector, dict[str, Any], dict[str, Calibration], float | None]:
    """The detector with what labelled rows teach it, its calibrations and its threshold."""
    limit = None
    if inputs.labelled is not None:
        detector, limit = _learn(detector, inputs)
    calibrations = {}
    if held_out is not None:
        calibrations["plain"] = calibrate(held_out, [], None)
    elif inputs.calibrate:
        calibrations["plain"] = _calibrated(detector, inputs.calibrate, mirror=False)
        if all("mirror" in each.recorded for each in inputs.calibrate):
            calibrations["mirror"] = _calibrated(detector, inputs.calibrate, mirror=True)
    return detector, fitted_on, calibrations, limit


def _check_reference(kind: type[Detector], given: Mapping[str, Any], cache: FeatureCache) -> None:
    """A detector that is standardised on noise must not be fitted on something else by mistake."""
    if kind.reference_images is None:
        return
    virtual = given.get("reference") == "virtual"
    noise = cache.provenance.source.startswith(kind.reference_images.partition("?")[0])
    if virtual != cache.provenance.virtual or not (virtual or noise):
        raise DetectorError(
            f"{kind.name} is standardised on {kind.reference_images.partition('?')[0]}, but "
            f"{cache.path} holds {cache.provenance.source}: extract {kind.reference_images}, or "
            f"fit on virtual images with -p {kind.name}.reference=virtual"
        )


def _ood_rows(kind: type[Detector], inputs: FitInputs, needs: frozenset[str]) -> Any:
    if inputs.ood is None:
        raise DetectorError(f"{kind.name} learns from OOD images, too: give a cache with --ood")
    inputs.ood.require(needs, kind.name)
    return inputs.ood.rows(needs)


def _calibrated(detector: Detector, caches: Sequence[FeatureCache], *, mirror: bool) -> Calibration:
    real: list[Tensor] = []
    pools: list[Tensor] = []
    accuracy = None
    needs = detector.needs | {"logits"} | ({"mirror"} if mirror else set())
    for cache in caches:
        cache.require(needs, detector.name)
        scores = [score_views(detector, block, mirror=mirror) for block in cache.rows(needs)]
        if cache.provenance.matched_accuracy is None:
            real += scores
        else:
            pools += scores
            accuracy = cache.provenance.matched_accuracy
    return calibrate(real, pools, accuracy)


def _learn(detector: Detector, inputs: FitInputs) -> tuple[Detector, float]:
    """The detector with what labelled rows teach it, and the threshold that parts them best."""
    cache, marks = inputs.train, inputs.labelled
    if cache is None or marks is None:
        raise DetectorError("--labelled needs the cache of the images that were marked")
    blocks, flags = [], []
    for rows in cache.blocks(detector.needs | {"logits"}):
        readable = [path for path, error in zip(rows.paths, rows.errors, strict=True) if not error]
        known = torch.tensor([path in marks for path in readable], dtype=torch.bool)
        if rows.features is not None and known.any():
            blocks.append(rows.features.select(known))
            flags += [marks[path] for path in readable if path in marks]
    if not blocks:
        raise DetectorError(f"no path of --labelled is among the paths of {cache.path}")
    ood = torch.tensor(flags)
    if not 0 < int(ood.sum()) < len(ood):
        raise DetectorError("--labelled must mark rows of both kinds, 0 (ID) and 1 (OOD)")
    detector = detector.learn(blocks, ood)
    return detector, labelled_threshold(torch.cat([detector.score(b) for b in blocks]), ood)


# ----------------------------------------------------------------------------- score


@dataclass(frozen=True)
class Chosen:
    """A detector to score with, and what its artefact knows beyond it."""

    detector: Detector
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    threshold: float | None = None
    trained_on: str = ""

    @property
    def name(self) -> str:
        return self.detector.name


FitReference = Callable[[type[Detector], Mapping[str, Any]], Detector]
"""Fits a detector on the reference images that it names, with the network at hand."""


def choose_detectors(
    wanted: Sequence[str],
    hyperparameters: Mapping[str, Mapping[str, str]],
    available: frozenset[str],
    sha256: str,
    fit_reference: FitReference | None = None,
) -> list[Chosen]:
    """Detectors from names and artefacts' paths; ``all`` is every one that needs no images of its
    own and that ``available`` allows. Raises DetectorError or FileError for one that is unknown,
    needs fitting, belongs to another checkpoint or is given twice."""
    chosen: list[Chosen] = []
    made: set[str] = set()

    def make(kind: type[Detector]) -> None:
        given = kind.parse(hyperparameters.get(kind.name, {}))
        made.add(kind.name)
        if not kind.fitted:
            chosen.append(Chosen(kind(**given)))
        elif fit_reference is not None:
            chosen.append(Chosen(fit_reference(kind, given)))

    listed = [word for word in wanted if word != "all"]
    for word in listed:
        if word in detectors.names():
            kind = detectors.get(word)
            if kind.fitted and (kind.reference_images is None or fit_reference is None):
                raise DetectorError(_must_be_fitted(kind))
            make(kind)
        elif word.endswith(".safetensors") or Path(word).is_file():
            chosen.append(_belonging(Path(word), sha256))
        else:
            detectors.get(word)  # raises the sentence that lists the names
    names = [each.name for each in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DetectorError(f"{twice[0]} is given twice: each detector has one column")
    if "all" in wanted:
        for name in detectors.names():
            kind = detectors.get(name)
            fits = not kind.fitted or (kind.reference_images is not None and fit_reference)
            if name not in names and fits and kind.needs <= available:
                make(kind)
        chosen.sort(key=lambda each: detectors.names().index(each.name))
    unused = sorted(hyperparameters.keys() - made)
    if unused:
        raise DetectorError(
            f"-p {unused[0]}.…: {unused[0]} is not among the detectors that are made here"
        )
    return chosen


def _must_be_fitted(kind: type[Detector]) -> str:
    how = f"'oodcli fit CACHE.h5 -d {kind.name}' makes {kind.name}.safetensors, whose path -d takes"
    if kind.reference_images is not None:
        how += f" (CACHE.h5: extract {kind.reference_images})"
    return f"{kind.name} must be fitted first: {how}"


def require_checkpoint(artefact: Artefact, sha256: str) -> None:
    """Raises FileError when an artefact was made for another checkpoint."""
    if artefact.checkpoint_sha256 != sha256:
        raise FileError(
            f"{artefact.path} was fitted for the checkpoint {artefact.checkpoint_sha256[:12]}…, "
            f"but this is {sha256[:12]}…: fit it on features of this checkpoint"
        )


def _belonging(path: Path, sha256: str) -> Chosen:
    artefact = read_artefact(path)
    require_checkpoint(artefact, sha256)
    trained_on = artefact.fitted_on.get("kind", "")
    if trained_on and artefact.detector.reference_images is not None:
        trained_on = "noise" if trained_on == "real" else trained_on
    return Chosen(artefact.detector, artefact.calibrations, artefact.threshold, trained_on)


def fit_on_noise(
    classifier: Classifier, kind: type[Detector], given: Mapping[str, Any], batch_size: int
) -> Detector:
    """A detector fitted on the reference images that it names. Raises DetectorError when it wants
    virtual images instead, which only an artefact can have."""
    if given.get("reference") == "virtual" or kind.reference_images is None:
        raise DetectorError(_must_be_fitted(kind))
    source = open_images(kind.reference_images, classifier.preprocessing, classifier.class_names)
    recorder = Recorder(classifier, kind.fit_needs(**given))
    blocks = record_images(classifier, source, recorder, batch_size)
    return kind.fit([rows.features for rows in blocks if rows.features is not None], **given)


def odin_step(chosen: Iterable[Detector]) -> OdinStep | None:
    """The perturbation that the chosen detectors need, if any."""
    return next((d.odin_step for d in chosen if d.odin_step is not None), None)


def needs(chosen: Iterable[Chosen], *, mirror: bool = False) -> frozenset[str]:
    """Everything that must be recorded to score with the chosen detectors."""
    views = {"mirror"} if mirror else set()
    return frozenset[str]().union(*(each.detector.needs for each in chosen), {"logits"}, views)


def score_views(detector: Detector, features: Features, *, mirror: bool) -> Tensor:
    """(N,) the score of each image, with ``mirror`` plus that of its mirror image."""
    scores = detector.score(features)
    if mirror and features.mirror is not None:
        scores = scores + detector.score(features.mirror)
    return scores


@dataclass(frozen=True)
class Rule:
    """How scores become decisions. A calibration gives p-values, and what has p ≤ rate is OOD;
    otherwise what exceeds the threshold is. An infinite score always is."""

    threshold: float = torch.inf
    calibration: Calibration | None = None
    rate: float = 0.0

    def columns(self, name: str, scores: Tensor) -> dict[str, list[float]]:
        """``<detector>.p`` (with a calibration) and ``<detector>.ood``. scores: (N,)."""
        if self.calibration is None:
            flags = ~(scores <= self.threshold) | torch.isinf(scores)
            return {f"{name}.ood": flags.int().tolist()}
        p = self.calibration.p_value(scores)
        flags = (p <= self.rate) | torch.isinf(scores)
        return {f"{name}.p": p.tolist(), f"{name}.ood": flags.int().tolist()}


def calibrated_rules(chosen: Sequence[Chosen], rate: float, *, mirror: bool) -> dict[str, Rule]:
    """Rules with a nominal false-alarm rate. Raises DetectorError when an artefact knows none."""
    rules = {}
    view = "mirror" if mirror else "plain"
    for each in chosen:
        calibration = each.calibrations.get(view)
        if calibration is None:
            how = "'oodcli extract … --mirror' records both views of the rows to --calibrate on"
            if not mirror or not each.calibrations:
                how = (
                    f"'oodcli fit … -d {each.name} --calibrate FILE.h5' makes a calibrated "
                    "artefact, from real images or from accuracy-matched virtual ones (oodcli "
                    "extract … --match-accuracy)"
                )
            raise DetectorError(f"{each.name} has no calibration for --fpr: {how}")
        rules[each.name] = Rule(calibration=calibration, rate=rate)
    return rules


StreamRule = Callable[[Tensor], float]
"""All finite and infinite scores of a stream → the threshold."""


@dataclass(frozen=True)
class ScoreSummary:
    """rows: all inputs. unreadable, infinite: how many had no score, or +inf for some detector.
    flagged: detector → how many are OOD by its rule. thresholds: those found in the stream."""

    rows: int
    unreadable: int
    infinite: int
    flagged: dict[str, int]
    thresholds: dict[str, float]

    @property
    def ood_fraction(self) -> dict[str, float]:
        """Of the rows that could be scored."""
        scored = max(self.rows - self.unreadable, 1)
        return {name: count / scored for name, count in self.flagged.items()}


def score_to_file(
    rows: Iterable[Rows],
    chosen: Sequence[Chosen],
    class_names: Sequence[str],
    target: Path | TextIO,
    *,
    rules: Mapping[str, Rule] | None = None,
    stream_rule: StreamRule | None = None,
    mirror: bool = False,
    explain: bool = False,
    force: bool = False,
) -> ScoreSummary:
    """Scores rows as they come. rules: detector → how it decides, which adds ``<detector>.ood`` and
    with a calibration ``<detector>.p``. stream_rule: thresholds from the whole stream, which is
    then kept in memory. explain: adds ``<detector>.why``."""
    rules = dict(rules or {})
    if stream_rule is not None:
        rules |= {each.name: Rule() for each in chosen}
    columns: list[str] = []
    for each in chosen:
        columns.append(each.name)
        if each.name in rules:
            columns += rules[each.name].columns(each.name, torch.zeros(0))
        if explain and each.detector.explains:
            columns.append(f"{each.name}.why")
    total = unreadable = infinite = 0
    flagged = dict.fromkeys(rules, 0)
    thresholds: dict[str, float] = {}

    def blocks() -> Iterator[list[ScoreRow]]:
        scored = (
            _score_block(block, chosen, class_names, rules, mirror=mirror, explain=explain)
            for block in rows
        )
        if stream_rule is None:
            yield from scored
            return
        kept = [row for block in scored for row in block]
        for each in chosen:
            values = torch.tensor([r.scores[each.name] for r in kept if not r.error]).double()
            thresholds[each.name] = stream_rule(values)
            found = Rule(thresholds[each.name]).columns(each.name, values)[f"{each.name}.ood"]
            for row, flag in zip((r for r in kept if not r.error), found, strict=True):
                row.scores[f"{each.name}.ood"] = flag
        yield kept

    with ExitStack() as stack:
        if isinstance(target, Path):
            target = stack.enter_context(atomic(target, force=force))
        writer = stack.enter_context(ScoresWriter(target, columns))
        for scored in blocks():
            writer.write(scored)
            for row in scored:
                total += 1
                unreadable += bool(row.error)
                infinite += any(row.scores[each.name] == math.inf for each in chosen if row.scores)
                for name in flagged:
                    flagged[name] += row.scores.get(f"{name}.ood") == 1
    return ScoreSummary(total, unreadable, infinite, flagged, thresholds)


def _score_block(
    block: Rows,
    chosen: Sequence[Chosen],
    class_names: Sequence[str],
    rules: Mapping[str, Rule],
    *,
    mirror: bool,
    explain: bool,
) -> list[ScoreRow]:
    scores: dict[str, Sequence[float | str]] = {}
    predicted: list[int] = []
    confidence: list[float] = []
    features = block.features
    if features is not None and len(features):
        top = torch.softmax(recorded(features.logits).double(), 1).max(1)
        predicted, confidence = top.indices.tolist(), top.values.tolist()
        for each in chosen:
            values = score_views(each.detector, features, mirror=mirror)
            scores[each.name] = values.tolist()
            if each.name in rules:
                scores |= rules[each.name].columns(each.name, values)
            if explain and each.detector.explains:
                scores[f"{each.name}.why"] = each.detector.explain(features)
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
