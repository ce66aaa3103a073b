"""Feature caches to artefacts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from oodcli import detectors
from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks
from oodcli.detectors.calibration import Calibration, calibrate, labelled_threshold
from oodcli.detectors.sums import Whole, Without
from oodcli.detectors.widened import RIGHT
from oodcli.errors import DetectorError, FileError, OodcliError
from oodcli.features import Features, recorded
from oodcli.files.artefact import Artefact, write_artefact
from oodcli.files.atomic import atomic, refuse_existing
from oodcli.files.cache import FeatureCache
from oodcli.files.hdf5 import Provenance
from oodcli.files.origin import Words
from oodcli.notes import only_from
from oodcli.stages.chosen import (
    POOL,
    further_rows,
    require_multi_label,
    require_same_network,
    score_views,
)
from oodcli.stages.verdict import TOO_STRICT, classes_in_words

log = logging.getLogger(__name__)


Part = Callable[[Tensor], Tensor]
"""Numbers of rows (N,) → which of them are wanted."""


@dataclass(frozen=True)
class FitInputs:
    """Caches to fit and calibrate on. train: rows to fit on. calibrate: real images or
    accuracy-matched virtual ones. ood: OOD images. labelled: path of an image → whether it is
    labelled OOD. noise: noise images, for detectors that are standardised on them."""

    train: FeatureCache | None
    calibrate: Sequence[FeatureCache] = ()
    ood: FeatureCache | None = None
    labelled: Mapping[str, bool] | None = None
    noise: FeatureCache | None = None

    @property
    def provenance(self) -> Provenance:
        """Provenance of the first cache. Raises FileError if another has a different checkpoint,
        weights or preprocessing."""
        given = (self.train, *self.calibrate, self.ood, self.noise)
        caches = [cache for cache in given if cache is not None]
        if not caches:
            raise DetectorError(
                "no rows to fit on: give a cache, or calibrate only with --calibrate FILE.h5"
            )
        first = caches[0]
        for cache in caches[1:]:
            cache.provenance.origin.require_same(
                first.provenance.origin,
                Words(
                    f"{cache.path} was extracted with",
                    f"{first.path} with",
                    inputs_hint="extract both with the same options or model card",
                ),
            )
        return first.provenance


def fit_to_folder(
    inputs: FitInputs,
    chosen: Sequence[type[Detector] | Artefact],
    hyperparameters: Mapping[str, Mapping[str, Any]],
    folder: Path,
    *,
    command: str = "",
    leave_out: bool = False,
    force: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Fit and calibrate detectors, one artefact each; a detector given as an artefact is only
    calibrated. Files are written after everything is fitted. command: stored in the artefacts.

    A detector that cannot be fitted or calibrated on these rows, such as an artefact of another
    checkpoint, has an entry with a ``reason`` and no file; with leave_out it has no entry, but a
    note. progress: called after each. Raises DetectorError or FileError if no detector can be
    fitted, or one is given twice.
    """
    names = [each.detector.name if isinstance(each, Artefact) else each.name for each in chosen]
    for name in names:
        path = folder / f"{name}.safetensors"
        if names.count(name) > 1:
            raise DetectorError(
                f"{name} is given twice, but {path} can hold only one: run fit twice"
            )
        refuse_existing(path, force=force)
    for cache in inputs.calibrate:
        if cache.provenance.virtual and cache.provenance.matched_accuracy is None:
            raise DetectorError(
                f"{cache.path} holds raw virtual images, which score far lower than real ones and "
                "cannot calibrate a verdict",
                hint="degrade them first with 'oodcli extract CHECKPOINT V.h5 --match-accuracy "
                "0.9' (the published accuracy)",
            )
    origin = inputs.provenance
    made: list[Artefact] = []
    failed: dict[str, OodcliError] = {}
    for name, each in zip(names, chosen, strict=True):
        try:
            if isinstance(each, Artefact):
                require_same_network(
                    each, origin.checkpoint_sha256, origin.preprocessing, origin.averaged
                )
                made.append(_calibrate_one(each, inputs))
            else:
                made.append(_fit_one(each, dict(hyperparameters.get(name, {})), inputs))
        except (DetectorError, FileError) as error:
            failed[name] = error
            if leave_out:
                log.info(f"{name} skipped: {error.text}")
        progress()
    if not made:
        raise _none_of(failed)
    for note in dict.fromkeys(note for each in made for note in _lacking(each, origin)):
        log.info(note)
    summary: list[dict[str, Any]] = []
    with ExitStack() as stack:
        for artefact in made:
            path = folder / f"{artefact.detector.name}.safetensors"
            unfinished = stack.enter_context(atomic(path, force=force))
            write_artefact(_with_origin(artefact, origin, command), unfinished)
            plain = artefact.calibrations.get("plain")
            summary.append(
                {
                    "file": str(path),
                    "detector": artefact.detector.name,
                    "fitted_on": artefact.fitted_on,
                    "calibrated_on": None if plain is None else plain.words,
                    "resolution": None if plain is None else plain.resolution,
                    "achieved_at_0.05": None if plain is None else plain.achieved(0.05),
                    "threshold": artefact.threshold,
                    "bytes": unfinished.stat().st_size,
                }
            )
    if not leave_out:
        summary += [
            {"file": None, "detector": name, "reason": error.text} for name, error in failed.items()
        ]
    return summary


def _none_of(failed: Mapping[str, OodcliError]) -> OodcliError:
    """The error if no detector could be fitted."""
    first, *others = failed.values()
    if not others:
        return first
    reasons = "; ".join(f"{name}: {error.text}" for name, error in failed.items())
    return DetectorError(f"none of {', '.join(failed)} can be fitted: {reasons}")


def _lacking(artefact: Artefact, origin: Provenance) -> Iterator[str]:
    """Sentences about what the rows cannot give: classes with too few, and thresholds."""
    fitted_on = artefact.fitted_on

    def words(classes: Sequence[int]) -> str:
        return classes_in_words(classes, origin.class_names)

    if artefact.without_rows:
        yield (
            f"{fitted_on['file']} has no rows of {words(artefact.without_rows)}: detectors fitted "
            "on it give no verdict on images predicted as such"
        )
    if one := fitted_on.get("classes_with_one_row"):
        yield f"{fitted_on['file']} has only one row of {words(one)}"
    for calibration in artefact.calibrations.values():
        if calibration.virtual and artefact.detector.strict_on_virtual:
            yield f"{artefact.detector.name}: {TOO_STRICT}"
        count = calibration.real + calibration.virtual
        if calibration.without_verdict:
            yield (
                f"none of the {count} calibration rows is of "
                f"{words(calibration.without_verdict)}: images predicted as such get no verdict"
            )
        elif calibration.without_rows:
            yield (
                f"{len(calibration.without_rows)} of {calibration.classes} classes have no row "
                f"among the {count} calibration rows, possibly by chance"
            )


UNJUDGED = "no_verdict_on"
"""Key of the names of classes without rows, in an artefact's ``recorded``."""


def _with_origin(artefact: Artefact, origin: Provenance, command: str) -> Artefact:
    """The artefact with its origin; what it was fitted on before is left unchanged."""
    if artefact.preprocessing is None:
        artefact = replace(artefact, preprocessing=origin.preprocessing, recorded=_how_made(origin))
    calibrations = artefact.calibrations.values()
    numbers = {*artefact.without_rows, *(n for each in calibrations for n in each.without_verdict)}
    names = [origin.class_names[number] for number in sorted(numbers)]
    recorded = {key: value for key, value in artefact.recorded.items() if key != UNJUDGED}
    recorded |= {UNJUDGED: names} if names else {}
    return replace(artefact, recorded=recorded, command=command)


def _how_made(rows: Provenance) -> dict[str, Any]:
    """How rows were created, as an artefact stores it."""
    kept = ("arch", "seed", "device", "precision", "averaged", "command")
    return {name: getattr(rows, name) for name in kept}


LONG = 10.0
"""Seconds of fitting from which a second fit is announced."""

HELD_OUT_FROM = 50
"""Real rows from which some are held out to calibrate on. With fewer, only --calibrate
calibrates."""

HELD_OUT_AT_MOST = 5_000
"""Rows held out at most. With more than five times as many, the share is smaller than a fifth."""


def _fit_one(kind: type[Detector], given: dict[str, Any], inputs: FitInputs) -> Artefact:
    """A detector, fitted if it or its hyper-parameters need rows, and calibrated."""
    cache = inputs.train
    if kind.reference_images is not None and given.get("reference") != "virtual":
        cache = inputs.noise or cache
    if cache is not None and "multi-label" in cache.recorded:
        require_multi_label([kind])
    needs = kind.fit_needs(**given)
    fitted_on: dict[str, Any] = {}
    seconds = 0.0
    if not needs:
        detector = kind(**given)
        if cache is not None:
            cache.require(detector.score_needs, detectors.word_for(kind.name))
    elif cache is None:
        raise DetectorError(
            f"{kind.name} must be fitted on a cache", hint="'oodcli extract' writes caches"
        )
    else:
        cache.require(needs, detectors.word_for(kind.name))
        _check_reference(kind, given, cache)
        if kind.needs_ood or (kind.uses_ood and inputs.ood is not None):
            given["ood"] = _ood_rows(kind, inputs, needs)
        given |= _noise_and_pool(kind, inputs)
        raw = cache.provenance.virtual and cache.provenance.matched_accuracy is None
        if kind.widens and raw:
            given.setdefault("widen", RIGHT)
        kept, held = _parted(cache)
        whole = Whole(cache.rows(needs))
        rows: Blocks = whole
        if kind.needs_pool and not inputs.calibrate:  # rows for it, that it is not fitted on
            rows, given["pool"] = cache.rows(needs, kept), cache.rows(kind.needs, held)
        start = time.monotonic()
        detector = kind.fit(rows, **given)
        seconds = time.monotonic() - start
        fitted_on = {
            "file": cache.path.name,
            "source": cache.provenance.source,
            "rows": cache.count,
            "rows_sha256": cache.rows_sha256,
            "kind": _kind_of(cache.provenance),
            "ood": None if not kind.uses_ood or inputs.ood is None else inputs.ood.path.name,
        }
        if fitted_on["kind"] != "noise" and not detector.every_class:
            counts = _counts(cache)
            fitted_on["classes_without_rows"] = _where(counts == 0)
            fitted_on["classes_with_one_row"] = _where(counts == 1)
        if kind.uses_ood and inputs.ood is not None:
            fitted_on["ood_rows_sha256"] = inputs.ood.rows_sha256
        if kind.noise_images is not None and inputs.noise is not None:
            fitted_on["noise"] = inputs.noise.path.name
            fitted_on["noise_rows_sha256"] = inputs.noise.rows_sha256
        if kind.needs_pool:
            pools = inputs.calibrate or [cache]
            fitted_on["pool"] = [each.path.name for each in pools]
            fitted_on["pool_rows_sha256"] = [each.rows_sha256 for each in pools]
    origin = inputs.provenance if cache is None else cache.provenance
    artefact = Artefact(
        detector,
        origin.checkpoint_sha256,
        fitted_on,
        preprocessing=origin.preprocessing,
        recorded=_how_made(origin),
    )
    if inputs.calibrate or inputs.labelled is not None:
        return _calibrate_one(artefact, inputs)
    real = inputs.train is not None and _kind_of(inputs.train.provenance) == "real"
    if kind.reference_images is not None and inputs.train is not None and real:
        # It was fitted on noise, so all real rows are new to it.
        return _calibrate_one(artefact, replace(inputs, calibrate=[inputs.train]))
    if cache is None or cache.provenance.virtual or kind.reference_images is not None:
        return artefact
    everything, held_out = needs | detector.score_needs | {"logits"}, None
    part: Part | None = None
    cache.require(everything, detectors.word_for(kind.name))
    if not needs:
        held_out = [detector.score(block) for block in cache.rows(everything)]
    elif cache.count >= HELD_OUT_FROM:
        # A detector is kinder to the rows that it was fitted on, so another one, fitted
        # without every fifth row, says how rows that it has not seen are scored.
        part = held
        apart = detector
        if not kind.needs_pool:
            if seconds > LONG:
                log.info(
                    f"{kind.name}: fitting again without the held-out rows, to calibrate on those: "
                    f"about {seconds:.0f} s more"
                )
            without = Without(whole, cache.rows(needs, kept), cache.rows(needs, held))
            # The first fit has logged the notes.
            with only_from(logging.WARNING, "oodcli.detectors"):
                apart = kind.fit(without, **given)
        held_out = [apart.score(block) for block in cache.rows(everything, held)]
    if held_out is None:
        return artefact
    counts = class_counts(cache.rows({"logits"}, part), _classes(cache))
    calibration = _with_classes(calibrate(held_out, [], None), counts)
    return replace(artefact, calibrations={"plain": calibration})


def _parted(cache: FeatureCache) -> tuple[Part, Part]:
    """Which rows to fit on, and which to hold out: every fifth, of many rows fewer."""
    every = max(5, cache.count // HELD_OUT_AT_MOST)
    return lambda row: row % every != 0, lambda row: row % every == 0


def _classes(cache: FeatureCache) -> int:
    return len(cache.provenance.class_names)


def _where(found: Tensor) -> list[int]:
    return [int(number) for number in found.nonzero().flatten()]


_COUNTED: WeakKeyDictionary[FeatureCache, Tensor] = WeakKeyDictionary()


def _counts(cache: FeatureCache) -> Tensor:
    """``class_counts`` of all rows, for whichever detectors ask."""
    if cache not in _COUNTED:
        _COUNTED[cache] = class_counts(cache.rows({"logits"}), _classes(cache))
    return _COUNTED[cache]


def class_counts(blocks: Iterable[Features], classes: int) -> Tensor:
    """(classes,) number of rows per class, by label, or by prediction where there is no label."""
    counts = torch.zeros(classes, dtype=torch.int64)
    for block in blocks:
        found = recorded(block.logits).argmax(1)
        if block.label is not None:
            found = torch.where(block.label >= 0, block.label, found)
        counts += torch.bincount(found[found < classes], minlength=classes)
    return counts


def _with_classes(calibration: Calibration, counts: Tensor) -> Calibration:
    return replace(calibration, classes=len(counts), without_rows=tuple(_where(counts == 0)))


def _kind_of(rows: Provenance) -> str:
    if rows.virtual:
        return "virtual"
    return "noise" if rows.source.startswith("noise:") else "real"


def _calibrate_one(artefact: Artefact, inputs: FitInputs) -> Artefact:
    """The artefact after learning from labelled rows and with new calibrations. Old calibrations
    stay as long as the scores do not change."""
    detector, limit = artefact.detector, artefact.threshold
    calibrations, fitted_on = dict(artefact.calibrations), dict(artefact.fitted_on)
    if inputs.labelled is not None:
        detector, limit = _learn(detector, inputs)
        if detector is not artefact.detector:
            calibrations = {}
            seen = (fitted_on.get("ood"), "labelled rows")
            fitted_on["ood"] = ", ".join(dict.fromkeys(filter(None, seen)))
    if inputs.calibrate:
        calibrations = {"plain": _calibrated(detector, inputs.calibrate, mirror=False)}
        if all("mirror" in each.recorded for each in inputs.calibrate):
            calibrations["mirror"] = _calibrated(detector, inputs.calibrate, mirror=True)
    return replace(
        artefact,
        detector=detector,
        fitted_on=fitted_on,
        calibrations=calibrations,
        threshold=limit,
    )


def _check_reference(kind: type[Detector], given: Mapping[str, Any], cache: FeatureCache) -> None:
    """Raises DetectorError for a detector that is standardised on noise and would be fitted on
    other images."""
    if kind.reference_images is None:
        return
    virtual = given.get("reference") == "virtual"
    if virtual != cache.provenance.virtual or not (virtual or _is_of(kind.reference_images, cache)):
        raise DetectorError(
            f"{kind.name} is standardised on {kind.reference_images.partition('?')[0]}, but "
            f"{cache.path} holds {cache.provenance.source}",
            hint=f"extract {kind.reference_images} and give its cache with --noise, or fit on "
            f"virtual images with -p {kind.name}.reference=virtual",
        )


def _is_of(images: str, cache: FeatureCache) -> bool:
    """Whether the rows of a cache are of these images, or of another number of the same kind."""
    return cache.provenance.source.startswith(images.partition("?")[0])


def holds_out(inputs: FitInputs) -> bool:
    """Whether some of the rows to fit on can calibrate instead: there are enough, not of virtual
    images, and no others."""
    train = inputs.train
    return (
        train is not None
        and not inputs.calibrate
        and not train.provenance.virtual
        and train.count >= HELD_OUT_FROM
    )


@dataclass(frozen=True)
class _Joined:
    """Rows of several caches, in blocks that can be read repeatedly."""

    caches: Sequence[FeatureCache]
    needs: frozenset[str]

    def __iter__(self) -> Iterator[Features]:
        for cache in self.caches:
            yield from cache.rows(self.needs)


def _noise_and_pool(kind: type[Detector], inputs: FitInputs) -> dict[str, Any]:
    """Arguments of ``fit`` beside the rows to fit on and OOD rows. Raises DetectorError if one is
    missing, or holds other images."""
    found: dict[str, Sequence[FeatureCache]] = {}
    if kind.noise_images is not None and inputs.noise is not None:
        if not _is_of(kind.noise_images, inputs.noise):
            raise DetectorError(
                f"{kind.name} needs noise images, but {inputs.noise.path} holds "
                f"{inputs.noise.provenance.source}: extract '{kind.noise_images}'"
            )
        found["noise"] = [inputs.noise]
    if kind.needs_pool and inputs.calibrate:
        found["pool"] = inputs.calibrate
    further = further_rows(kind)
    if kind.needs_pool and holds_out(inputs):
        further.pop(POOL, None)
    if len(found) < len(further):
        how = "; ".join(f"{option.split()[1]}: {words}" for option, words in further.items())
        raise DetectorError(
            f"{kind.name} is fitted on more than one cache",
            hint=f"add {' and '.join(further)} ({how})",
        )
    for cache in (each for caches in found.values() for each in caches):
        cache.require(kind.needs, detectors.word_for(kind.name))
    return {name: _Joined(caches, kind.needs) for name, caches in found.items()}


def _ood_rows(kind: type[Detector], inputs: FitInputs, needs: frozenset[str]) -> Any:
    if inputs.ood is None:
        raise DetectorError(
            f"{kind.name} also learns from OOD images", hint="give their cache with --ood"
        )
    inputs.ood.require(needs, detectors.word_for(kind.name))
    return inputs.ood.rows(needs)


def _calibrated(detector: Detector, caches: Sequence[FeatureCache], *, mirror: bool) -> Calibration:
    real: list[Tensor] = []
    pools: list[Tensor] = []
    accuracy, images = None, 0
    counts = torch.zeros(_classes(caches[0]), dtype=torch.int64)
    needs = detector.score_needs | {"logits"} | ({"mirror"} if mirror else set())
    for cache in caches:
        cache.require(needs, detectors.word_for(detector.name))
        scores = [score_views(detector, block, mirror=mirror) for block in cache.rows(needs)]
        counts += _counts(cache)
        if cache.provenance.matched_accuracy is None:
            real += scores
        else:
            pools += scores
            accuracy = cache.provenance.matched_accuracy
            images += len({path for paths, *_ in cache.listing() for path in paths})
    return _with_classes(calibrate(real, pools, accuracy, images), counts)


def _learn(detector: Detector, inputs: FitInputs) -> tuple[Detector, float]:
    """The detector after learning from labelled rows, and the threshold that separates them
    best."""
    cache, marks = inputs.train, inputs.labelled
    if cache is None or marks is None:
        raise DetectorError("--labelled needs the cache of the labelled images")
    blocks, flags = [], []
    for rows in cache.blocks(detector.score_needs | {"logits"}):
        readable = [path for path, error in zip(rows.paths, rows.errors, strict=True) if not error]
        known = torch.tensor([path in marks for path in readable], dtype=torch.bool)
        if rows.features is not None and known.any():
            blocks.append(rows.features.select(known))
            flags += [marks[path] for path in readable if path in marks]
    if not blocks:
        raise DetectorError(f"none of the paths in --labelled is in {cache.path}")
    ood = torch.tensor(flags)
    if not 0 < int(ood.sum()) < len(ood):
        raise DetectorError("--labelled needs rows of both kinds, 0 (ID) and 1 (OOD)")
    detector = detector.learn(blocks, ood)
    return detector, labelled_threshold(torch.cat([detector.score(b) for b in blocks]), ood)
