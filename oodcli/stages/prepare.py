"""``oodcli prepare``: everything that ``score`` needs of a checkpoint, in one folder."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from oodcli import notes
from oodcli.detectors.c2ir_z import MANY_CLASSES
from oodcli.errors import FileError, OodcliError
from oodcli.files.artefact import read_artefact
from oodcli.files.atomic import claimed, make_folder
from oodcli.files.hdf5 import format_of
from oodcli.files.prepared import (
    NAME,
    STEPS,
    DoneStep,
    PreparedFolder,
    folder_beside,
    read_prepared,
    read_steps,
    write_prepared,
    write_steps,
)
from oodcli.files.virtual import FORMAT as VIRTUAL
from oodcli.images import ImageSource, open_images
from oodcli.jobs.kept import is_complete
from oodcli.jobs.torchrun import Team, part_of, stage
from oodcli.networks.classifier import Classifier
from oodcli.recording.recorder import recordable
from oodcli.stages.extract_job import Extracted, ExtractRequest, extract
from oodcli.stages.fit_job import Fitted, fit
from oodcli.stages.invert_job import InvertRequest, invert
from oodcli.stages.model import Checkpoint, Model
from oodcli.stages.prepare_plan import (
    FIVE_PERCENT_FROM,
    Choice,
    Effort,
    Places,
    Situation,
    Step,
    choose,
    effort,
    options_of,
    steps_of,
)
from oodcli.stages.prepare_time import Clock
from oodcli.stages.record import LISTED, file_state
from oodcli.stages.verdict import off_by
from oodcli.stages.watching import Watch, Watching, unwatched

log = logging.getLogger(__name__)

LOCK = ".lock"
RATES = (0.05, 0.1, 0.2, 0.5)
"""False-alarm rates of the command to type next: the first that the calibration allows."""


@dataclass(frozen=True)
class PrepareRequest:
    """What to prepare. accuracy: the published one, in (0, 1). images: real in-distribution images.
    per_class: None for 50, or with many classes for a number in all. steps, mirror: as of
    ``invert``. output: None for CHECKPOINT.oodcli. command: stored in the folder."""

    model: Model
    accuracy: float | None = None
    images: str | None = None
    per_class: int | None = None
    steps: int | None = None
    mirror: bool | None = None
    output: Path | None = None
    force: bool = False
    restart: bool = False
    command: str = ""

    @property
    def folder(self) -> Path:
        return self.output or folder_beside(self._checkpoint)

    @property
    def _checkpoint(self) -> Path:
        if self.model.path is None:
            raise OodcliError("the network is a loaded classifier: give the path of its checkpoint")
        return self.model.path


@dataclass(frozen=True)
class PlannedStep:
    """A step of the plan. command: the same by hand. output: its first file. seconds: how long it
    ran, or an estimate. done: whether it was there before."""

    command: str
    output: Path
    seconds: float
    done: bool


@dataclass(frozen=True)
class Prepared:
    """Summary of ``prepare``. folder: for ``score -d``. detector: what ``score`` uses. files:
    detector → its artefact. calibrated_on: basis of the verdicts; None without a calibration.
    resolution: the smallest p-value. false_alarms: interval of the rate to expect at ``--fpr
    0.05``. unreadable: real images that could not be read. not_fitted: detector → reason. notes:
    what can be promised. next: the command to type next. planned: nothing was made, as with
    ``--dry-run``."""

    folder: Path
    detector: str
    files: Mapping[str, Path]
    steps: Sequence[PlannedStep]
    next: str
    notes: Sequence[str] = ()
    calibrated_on: str | None = None
    resolution: float | None = None
    false_alarms: tuple[float, float] | None = None
    unreadable: int = 0
    not_fitted: Mapping[str, str] = field(default_factory=dict)
    planned: bool = False

    @property
    def seconds(self) -> float:
        """Of the steps that were not there before."""
        return sum(step.seconds for step in self.steps if not step.done)


def prepare(
    request: PrepareRequest, watch: Watch | None = None, watching: Watching | None = None
) -> Prepared | None:
    """Make what is not there yet; None in a process of torchrun that writes no file. watch: called
    with the number of steps done and their total. watching: opens a progress callback per step."""
    _refuse(request)
    _, team = part_of(None, request.images)
    plan = _plan(request)
    for sentence in plan.warnings:
        notes.say(log, sentence)
    with _owned(request.folder, team):
        return _Run(request, plan, team, watch, watching or unwatched).all()


def plan(request: PrepareRequest) -> Prepared | None:
    """What prepare would do, with an estimate by short trials. Makes nothing. None in processes of
    torchrun but the first."""
    _refuse(request)
    _, team = part_of(None, request.images)
    if team is not None and not team.leads:
        return None
    found = _plan(request)
    done = {} if request.force else _done(request.folder, found)
    steps, clock = [], Clock(found.classifier)
    for step in found.steps:
        known = done.get(step.name)
        shared = 1 if team is None or step.name == "fit" else team.size
        seconds = clock.seconds(step.request) / shared if known is None else known.seconds
        steps.append(_planned(step, request.folder, seconds, done=known is not None))
    default = found.choice.names[0]
    return Prepared(
        request.folder,
        default,
        _files(request.folder, found.choice.names if found.choice.artefacts else ()),
        steps,
        _next(request, _rate(found.resolution)),
        found.warnings,
        planned=True,
    )


def _refuse(request: PrepareRequest) -> None:
    """Raises OodcliError for options that make no sense."""
    if request.accuracy is not None and not 0 < request.accuracy < 1:
        raise OodcliError(
            f"--accuracy {request.accuracy:g}: expected a share between 0 and 1, such as 0.917"
        )
    if request.per_class is not None and request.per_class < 1:
        raise OodcliError(f"--per-class {request.per_class}: expected at least 1")
    if request.images == "-":
        raise OodcliError("--images -: the list is read more than once: give a file with the list")
    if request.images is not None and format_of(Path(request.images)) == VIRTUAL:
        raise OodcliError(f"--images {request.images} holds virtual images: give real ones")


# --- the plan ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """keys: step → what decides its outputs, without paths. warnings: what cannot be promised, and
    what is not used. resolution: the smallest p-value to expect; None without a calibration."""

    classifier: Classifier
    choice: Choice
    steps: Sequence[Step]
    keys: Mapping[str, str]
    warnings: Sequence[str]
    resolution: float | None


def _plan(request: PrepareRequest) -> _Plan:
    classifier = request.model.load()
    model = replace(request.model, loaded=classifier)
    source = None
    if request.images is not None:
        source = open_images(request.images, classifier.preprocessing, classifier.class_names)
    virtual = effort(
        classifier.num_classes,
        classifier.preprocessing.input_size,
        *(request.per_class, request.steps, request.mirror),
        batchnorm=bool(classifier.batchnorms),
        accuracy=request.accuracy,
    )
    given = Situation(
        recordable(classifier),
        bool(classifier.batchnorms),
        classifier.num_classes,
        request.accuracy,
        0 if source is None else len(source),
        source is None or _complete(source, classifier.num_classes),
    )
    choice = choose(given)
    if request.per_class == 1 and choice.virtual and given.classes <= MANY_CLASSES:
        raise OodcliError(
            "--per-class 1: the spread within a class needs two virtual images of it or more (only "
            f"with over {MANY_CLASSES} classes is it that of all images)"
        )

    def steps(where: Places) -> list[Step]:
        return steps_of(choice, where, virtual, request.accuracy)

    found = steps(Places(model, request.folder, request.images or ""))
    anywhere = Checkpoint(Path("CHECKPOINT"))
    running = replace(model.running, device="auto")
    nowhere = Places(Model(anywhere, running), Path("DIR"), "IMAGES")
    keys: dict[str, str] = {}
    for step in steps(nowhere):
        before = [keys[name] for name in step.inputs]
        images = _listing(source) if source and step.name == "images.features" else ""
        text = json.dumps([step.words, _network(request.model, classifier), images, before])
        keys[step.name] = hashlib.sha256(text.encode()).hexdigest()
    warnings = list(_warnings(request, given, choice, virtual))
    alone = choice.images and not choice.pool
    resolution = (1 / (given.rows + 1) if alone else 0.0) if choice.calibrated else None
    return _Plan(classifier, choice, found, keys, warnings, resolution)


def _complete(source: ImageSource, classes: int) -> bool:
    """Whether no class is known to lack rows: unlabelled images may be of any class."""
    known = source.known
    if known is None or not source.labels_are_of_rows:
        return True
    values = known.values[known.values >= 0]
    counts = values[values < classes].bincount(minlength=classes)
    return len(values) == 0 or int(counts.min()) >= 2


def _network(model: Model, classifier: Classifier) -> dict[str, Any]:
    """What decides the network's outputs."""
    return {
        "checkpoint": classifier.sha256,
        "arch": classifier.arch,
        "averaged": classifier.averaged,
        "preprocessing": classifier.preprocessing.to_dict(),
        "class_names": classifier.class_names,
        **model.job(),
    }


def _listing(source: ImageSource) -> str:
    """SHA-256 of the paths of a source, relative to it, and of the sizes of their files; where it
    is one file, of its size and time."""
    found = hashlib.sha256(file_state(Path(source.name)).encode())
    for start in range(0, len(source), LISTED):
        stop = min(start + LISTED, len(source))
        for path in source.paths(start, stop):
            found.update(f"{path.removeprefix(source.name)}\0".encode())
        if sizes := source.sizes(start, stop):
            found.update(repr(sizes).encode())
    return found.hexdigest()


def _warnings(
    request: PrepareRequest, given: Situation, choice: Choice, virtual: Effort
) -> Iterator[str]:
    """Sentences about what the verdicts rest on, and what would be better."""
    if (choice.virtual or choice.pool) and virtual.total is not None:
        yield (
            f"{virtual.total} virtual images in all, of classes spread over all {given.classes:,}; "
            "--per-class makes images of every class"
        )
    if request.accuracy is not None and not choice.pool:
        if "multi-label" in given.available:
            why = "the network has several labels per image"
        else:
            purpose = "fit and calibrate on" if choice.fitted_on else "calibrate on"
            why = f"the {given.rows} real images are enough to {purpose}"
        yield f"--accuracy is not used: {why}"
    if choice.pool and not given.rows:
        yield (
            "the verdicts rest on virtual images alone: in our tests their rates of false alarms "
            f"were off by {off_by(given.classes)} points; --images with a few real ones is better"
        )
    if given.rows and not choice.pool and given.rows < FIVE_PERCENT_FROM:
        yield (
            f"with {given.rows} images no p-value is below {1 / (given.rows + 1):.2g}: --fpr 0.05 "
            f"needs {FIVE_PERCENT_FROM} or more"
        )
    one_label = "multi-label" not in given.available
    if not choice.calibrated and given.batchnorm and one_label:
        yield (
            "no calibration, so no verdicts: thresholds on raw virtual images accepted 47 to 72 % "
            "of real images where 95 % were wanted; --accuracy or --images gives verdicts"
        )
    elif not choice.calibrated:
        ways = "--accuracy, or --images" if one_label else "--images"
        yield (
            "without BatchNorm statistics and images there is nothing to fit on: "
            f"{choice.names[0]} ranks images, but gives no verdicts; {ways} with 19 or more real "
            "ones, gives them"
        )


# --- what is there ----------------------------------------------------------------------------


def _done(folder: Path, plan: _Plan) -> dict[str, DoneStep]:
    """Steps that need not run again. One whose batches could not be removed runs to remove
    them."""
    steps = read_steps(folder) or {}
    return {
        step.name: steps[step.name]
        for step in plan.steps
        if step.name in steps
        and steps[step.name].key == plan.keys[step.name]
        and steps[step.name].is_in(folder)
        and not is_complete(folder / step.outputs[0])
    }


@contextmanager
def _owned(folder: Path, team: Team | None) -> Iterator[None]:
    """Makes the folder and locks it; in the first process of a team for all of them."""
    if team is not None and not team.leads:
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(make_folder(folder))
        except FileError as error:
            raise FileError(f"{error}: name another folder with -o DIR") from error
        try:
            stack.enter_context(claimed(folder / LOCK, folder))
        except OSError as error:
            raise FileError(
                f"{folder} cannot be written: {error.strerror or error}: name another folder with "
                "-o DIR"
            ) from error
        stack.callback(_forget, folder / LOCK)
        yield


def _forget(path: Path) -> None:
    """Remove a file that does no harm where the disk refuses."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Run:
    request: PrepareRequest
    plan: _Plan
    team: Team | None
    watch: Watch | None
    watching: Watching

    @property
    def leads(self) -> bool:
        return self.team is None or self.team.leads

    def all(self) -> Prepared | None:
        """Run the steps that are not done, then write prepared.json."""
        done = self._agreed("done", self._begin)
        steps = [step for step in self.plan.steps if step.name not in done]
        for number, step in enumerate(self.plan.steps):
            self._tell(number)
            if step in steps:
                self._agreed(f"begin/{step.name}", partial(self._clear, step))
                self._run(step, number)
        self._tell(len(self.plan.steps))
        if self.team is not None:
            self.team.gather(lambda count: None)
        return self._finish(set(done)) if self.leads else None

    def _agreed(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return make() if self.team is None else self.team.agree(f"prepare/{name}", make)

    def _tell(self, done: float) -> None:
        if self.watch is not None:
            self.watch(done, len(self.plan.steps))

    def _begin(self) -> dict[str, Any]:
        """The names of the steps that are done. Raises FileError for files of someone else."""
        folder = self.request.folder
        force = self.request.force and (self.team is None or self.team.first_try())
        done = {} if force else _done(folder, self.plan)
        ours = force or read_steps(folder) is not None
        for step in self.plan.steps:
            for name in step.outputs:
                if not ours and (folder / name).exists():
                    raise FileError(
                        f"{folder / name} exists, but prepare has not made it: choose another -o, "
                        "or overwrite it with --force"
                    )
        if len(done) < len(self.plan.steps):
            write_steps(folder, done)
        for step in self.plan.steps:
            if step.name in done:
                notes.say(log, f"{folder / step.outputs[0]} is there already", word="")
        return dict.fromkeys(done, True)

    def _clear(self, step: Step) -> dict[str, Any]:
        """Remove what the step is going to make anew. The artefacts stay in use until then."""
        folder = self.request.folder
        names = set(step.outputs)
        if step.name == "fit":
            names |= {NAME, *self._old_artefacts()}
        for name in names:
            try:
                (folder / name).unlink(missing_ok=True)
            except OSError as error:
                reason = error.strerror or error
                raise FileError(f"{folder / name} could not be replaced: {reason}") from error
        return {}

    def _old_artefacts(self) -> set[str]:
        """Files of the detectors that were prepared before."""
        try:
            before = read_prepared(self.request.folder)
        except FileError:  # damaged, and --force is given
            before = None
        return set() if before is None else {name for name in before.detectors.values() if name}

    def _run(self, step: Step, number: int) -> None:
        """Run a step as its command would, and record it."""
        command = shlex.join(["oodcli", *step.words])
        notes.say(log, f"$ {command}", word="")
        start = time.monotonic()
        with stage(step.name), self.watching(step.words[0]) as told:

            def watch(done: float, total: int) -> None:
                told(done, total)
                self._tell(number + (min(done / total, 1.0) if total else 0))

            facts = _call(step, command, watch, restart=self.request.restart, leads=self.leads)
        if not self.leads:
            return
        seconds, folder = time.monotonic() - start, self.request.folder
        outputs = {
            name: (folder / name).stat().st_size
            for name in step.outputs
            if (folder / name).exists()
        }
        steps = read_steps(folder) or {}
        key = self.plan.keys[step.name]
        steps[step.name] = DoneStep(step.name, command, outputs, key, seconds, facts)
        write_steps(folder, steps)
        took = f"{seconds:.1f} s" if seconds < 10 else notes.duration(seconds)
        notes.say(log, f"wrote {', '.join(outputs)} in {took}", word="")

    def _finish(self, before: set[str]) -> Prepared:
        """Write prepared.json, last."""
        folder, classifier = self.request.folder, self.plan.classifier
        done = read_steps(folder) or {}
        steps = [done[step.name] for step in self.plan.steps]
        files: dict[str, str | None] = {self.plan.choice.names[0]: None}
        if self.plan.choice.artefacts:
            made = done["fit"].outputs
            files = {name.removesuffix(".safetensors"): name for name in made}
        prepared = PreparedFolder(
            folder,
            next(iter(files)),
            files,
            classifier.sha256,
            classifier.averaged,
            classifier.preprocessing,
            self.request.accuracy,
            steps,
            self.request.command,
        )
        existing = None if self.request.force else read_prepared(folder)
        if existing is None or replace(existing, command=prepared.command) != prepared:
            write_prepared(prepared)
        _forget(folder / STEPS)
        return _summary(self.request, self.plan, prepared, before)


def _call(step: Step, command: str, watch: Watch, *, restart: bool, leads: bool) -> dict[str, Any]:
    """Run the stage; returns the facts to record."""
    request = step.request
    if isinstance(request, InvertRequest):
        invert(replace(request, command=command, restart=restart), watch)
        return {}
    if isinstance(request, ExtractRequest):
        extracted = extract(replace(request, command=command, restart=restart), watch)
        return {} if extracted is None else _of_cache(step, extracted)
    return _of_fit(fit(replace(request, command=command), watch)) if leads else {}


def _of_cache(step: Step, extracted: Extracted) -> dict[str, Any]:
    if step.name != "images.features":
        return {}
    accuracy = extracted.accuracy
    if accuracy is not None:
        notes.say(
            log,
            f"{extracted.images} images; accuracy {accuracy:.2%} on the labelled ones: if the "
            "published one is far higher, check the preprocessing",
            word="",
        )
    return {"images": extracted.images, "unreadable": extracted.unreadable, "accuracy": accuracy}


def _of_fit(fitted: Fitted) -> dict[str, Any]:
    reasons = {
        each["detector"]: each["reason"] for each in fitted.artefacts if each["file"] is None
    }
    for name, reason in reasons.items():
        notes.say(log, f"{name} is not fitted: {reason}")
    return {"not_fitted": reasons}


# --- the summary ------------------------------------------------------------------------------


def _planned(step: Step, folder: Path, seconds: float, *, done: bool) -> PlannedStep:
    command = shlex.join(["oodcli", *step.words])
    return PlannedStep(command, folder / step.outputs[0], seconds, done)


def _files(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    return {name: folder / f"{name}.safetensors" for name in names}


def _summary(
    request: PrepareRequest, plan: _Plan, prepared: PreparedFolder, before: set[str]
) -> Prepared:
    done = {step.name: step for step in prepared.steps}
    file = prepared.detectors[prepared.default]
    calibration = None
    if file is not None:
        calibration = read_artefact(prepared.path / file).calibrations.get("plain")
    return Prepared(
        prepared.path,
        prepared.default,
        {name: prepared.path / each for name, each in prepared.detectors.items() if each},
        [
            _planned(step, prepared.path, done[step.name].seconds, done=step.name in before)
            for step in plan.steps
        ],
        _next(request, _rate(None if calibration is None else calibration.resolution)),
        plan.warnings,
        None if calibration is None else calibration.words,
        None if calibration is None else calibration.resolution,
        None if calibration is None else calibration.achieved(0.05),
        sum(step.facts.get("unreadable", 0) for step in prepared.steps),
        {k: v for step in prepared.steps for k, v in step.facts.get("not_fitted", {}).items()},
    )


def _rate(resolution: float | None) -> float | None:
    """The false-alarm rate to try first. resolution: the smallest p-value; None without any."""
    if resolution is None:
        return None
    return next((rate for rate in RATES if rate >= resolution), None)


def _next(request: PrepareRequest, rate: float | None) -> str:
    """The command to type next."""
    model, folder = request.model, request.folder
    words = ["oodcli", "score", str(model.path), "IMAGES"]
    if model.path is not None and folder != folder_beside(model.path):
        words += ["-d", str(folder)]
    if rate is not None:
        words += ["--fpr", f"{rate:g}"]
    return shlex.join([*words, "-o", "scores.csv", *options_of(model)])
