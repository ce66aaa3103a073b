"""``oodcli fit``: feature caches to a folder of artefacts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oodcli import detectors, notes
from oodcli.detectors import own
from oodcli.detectors.base import Detector
from oodcli.detectors.hyperparameters import parse
from oodcli.errors import DetectorError
from oodcli.files.artefact import Artefact, read_artefact
from oodcli.files.atomic import make_folder
from oodcli.files.cache import open_cache
from oodcli.files.marks import read_marks
from oodcli.stages.chosen import is_artefact
from oodcli.stages.fit import FitInputs, fit_to_folder, holds_out
from oodcli.stages.sources import log_cache
from oodcli.stages.watching import Watch, watched

log = logging.getLogger(__name__)

Parameters = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class FitRequest:
    """What to fit and calibrate. cache: None to calibrate only. detectors: as ``-d``; ``all`` alone
    for every detector that the cache can fit. parameters: detector → key → value. calibrate, ood,
    noise: caches. labelled: a CSV file of labelled rows. output: the folder. command: stored in the
    artefacts."""

    cache: Path | None
    detectors: Sequence[str]
    parameters: Parameters
    calibrate: Sequence[Path] = ()
    ood: Path | None = None
    noise: Path | None = None
    labelled: Path | None = None
    output: Path = Path("detectors")
    force: bool = False
    command: str = ""


@dataclass(frozen=True)
class Fitted:
    """A mapping per detector with ``detector`` and ``file``; with ``reason`` if it could not be
    fitted and ``file`` is None, else with ``fitted_on``, ``calibrated_on``, ``resolution``,
    ``achieved_at_0.05``, ``threshold`` and ``bytes``."""

    artefacts: Sequence[Mapping[str, Any]]

    @property
    def files(self) -> Mapping[str, Path]:
        """Detector → its artefact, of the detectors that were fitted."""
        return {
            each["detector"]: Path(each["file"])
            for each in self.artefacts
            if each["file"] is not None
        }


def fit(request: FitRequest, watch: Watch | None = None) -> Fitted:
    """Fit and calibrate detectors into a folder."""
    given = request.parameters
    with ExitStack() as stack:
        inputs = _inputs(request, stack)
        names = list(dict.fromkeys(request.detectors))
        everything = names == ["all"]
        if everything:
            names = _possible(inputs, given)
        if not names:
            raise DetectorError(
                "no detectors to fit", hint="name them with -d ('oodcli detectors' lists them)"
            )
        chosen, kinds = _chosen(names)
        unused = sorted(given.keys() - kinds.keys())
        if unused:
            raise DetectorError(f"-p {unused[0]}.…: {unused[0]} is not fitted; add -d {unused[0]}")
        if request.noise is not None and not any(map(_takes_noise, kinds.values())):
            raise DetectorError(
                f"--noise {request.noise}: none of {', '.join(names)} is fitted on noise"
            )
        if not everything:
            _tell_superseded(kinds)
        hyperparameters = {name: parse(kind, given.get(name, {})) for name, kind in kinds.items()}
        _log(inputs, chosen, hyperparameters)
        notes.done(log, "caches")
        with make_folder(request.output):
            advance = watched(watch, len(chosen))
            summary = fit_to_folder(
                inputs,
                chosen,
                hyperparameters,
                request.output,
                command=request.command,
                leave_out=everything,
                force=request.force,
                progress=lambda: advance(1),
            )
    notes.done(log, "fitting")
    return Fitted(summary)


def _inputs(request: FitRequest, stack: ExitStack) -> FitInputs:
    def opened(path: Path) -> Any:
        return stack.enter_context(open_cache(path))

    return FitInputs(
        train=None if request.cache is None else opened(request.cache),
        calibrate=[opened(path) for path in request.calibrate],
        ood=None if request.ood is None else opened(request.ood),
        labelled=None if request.labelled is None else read_marks(request.labelled),
        noise=None if request.noise is None else opened(request.noise),
    )


def _chosen(
    names: Sequence[str],
) -> tuple[list[type[Detector] | Artefact], dict[str, type[Detector]]]:
    """Detectors to fit or calibrate, in order; and by name, those to fit."""
    found = {word: own.find(word) for word in names if not is_artefact(word)}
    artefacts = {word: read_artefact(Path(word)) for word in names if word not in found}
    given_fitted = {each.detector.name for each in artefacts.values()}
    found = {  # beside an artefact of it, FILE.py:CLASS is only the artefact's code
        word: kind
        for word, kind in found.items()
        if not (detectors.is_code(word) and kind.name in given_fitted)
    }
    either: dict[str, type[Detector] | Artefact] = {**found, **artefacts}
    kinds = {kind.name: kind for kind in found.values()}
    return [either[word] for word in names if word in either], kinds


def _tell_superseded(kinds: Mapping[str, type[Detector]]) -> None:
    for name, kind in kinds.items():
        if kind.superseded_by:
            better = kind.superseded_by
            notes.say(log, f"{better} supersedes {name}: fit {better} where the network allows it")


def _takes_noise(kind: type[Detector]) -> bool:
    return kind.reference_images is not None or kind.noise_images is not None


def _possible(inputs: FitInputs, given: Parameters) -> list[str]:
    """Detectors that the given files can fit. A note lists what the others lack."""
    if inputs.train is None:
        return []
    possible, lacking = [], []
    for kind in map(detectors.get, detectors.names()):
        if not kind.fitted:
            continue
        lacks = _lacks(kind, inputs, given, inputs.train.recorded)
        if lacks is None:
            possible.append(kind.name)
        else:
            lacking.append(f"{kind.name} ({lacks})")
    if lacking:
        notes.say(log, f"detectors skipped, and what they need: {', '.join(lacking)}")
    return possible


def _lacks(
    kind: type[Detector], inputs: FitInputs, given: Parameters, recorded: frozenset[str]
) -> str | None:
    """What a detector lacks to be fitted, as text; None if nothing."""
    needs = kind.fit_needs(**parse(kind, given.get(kind.name, {})))
    if kind.reference_images is not None and inputs.noise is None:
        return "--noise; or let score fit it"
    if kind.noise_images is not None and inputs.noise is None:
        return "--noise"
    if kind.needs_pool and not inputs.calibrate and not holds_out(inputs):
        return "--calibrate"
    if kind.needs_ood and inputs.ood is None:
        return "--ood"
    return None if needs <= recorded else ", ".join(sorted(needs - recorded))


def _log(
    inputs: FitInputs,
    chosen: Sequence[type[Detector] | Artefact],
    hyperparameters: Mapping[str, Mapping[str, Any]],
) -> None:
    """Log the caches, and the needs of each detector."""
    caches = (("fit on", inputs.train), ("OOD rows", inputs.ood), ("noise", inputs.noise))
    for use, cache in (*caches, *(("calibrate on", each) for each in inputs.calibrate)):
        if cache is not None:
            log_cache(use, cache)
    if inputs.labelled is not None:
        log.debug("labelled: %d rows, %d OOD", len(inputs.labelled), sum(inputs.labelled.values()))
    for each in chosen:
        if isinstance(each, Artefact):
            log.debug("%s: already fitted, %s", each.detector.name, each.path)
            continue
        given = hyperparameters.get(each.name, {})
        needs = ", ".join(sorted(each.fit_needs(**given))) or "nothing"
        pairs = ", ".join(f"{name}={value}" for name, value in given.items())
        log.debug("%s: fitting needs %s; %s", each.name, needs, pairs or "default parameters")
    log.debug("calibration: %s", _calibration(inputs))


def _calibration(inputs: FitInputs) -> str:
    if inputs.calibrate:
        return f"on the rows of {', '.join(str(cache.path) for cache in inputs.calibrate)}"
    if inputs.labelled is not None:
        return "none: the labelled rows give a threshold"
    if inputs.train is None or inputs.train.provenance.virtual:
        return "none: without --calibrate it needs real rows"
    return "on held-out rows of the cache"
