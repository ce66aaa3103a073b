"""``oodcli invert``: a checkpoint to virtual images."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from oodcli import notes
from oodcli.errors import OodcliError
from oodcli.files.atomic import refuse_existing, refuse_suffix
from oodcli.files.hdf5 import Provenance
from oodcli.files.hub import stem_of
from oodcli.inversion.invert import (
    SMALL_BATCH,
    Plan,
    decisions,
    prepare,
    refuse_without_batchnorm,
    wanted_classes,
)
from oodcli.inversion.objective import OBJECTIVES
from oodcli.inversion.step import Step
from oodcli.jobs.kept import is_complete, kept_work, refuse_output
from oodcli.jobs.torchrun import Team, part_of
from oodcli.networks.classifier import Classifier
from oodcli.stages.invert import invert_to_file, shard_of_plan
from oodcli.stages.model import Model
from oodcli.stages.record import Work, job_of, provenance
from oodcli.stages.sources import log_kept
from oodcli.stages.watching import Watch, watched

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InvertRequest:
    """What to invert, and how. output: None for CHECKPOINT.virtual.h5 in the working directory.
    total: images in all, instead of per_class. steps, mirror: None for the default of the
    objective. classes: ``0-4,7``; None for all. compiled: compile the step; None to compile if that
    is faster. sensitivity: measure what ``c2ir`` needs. command: stored in the file."""

    model: Model
    output: Path | None = None
    per_class: int = 100
    total: int | None = None
    objective: str = "kl"
    steps: int | None = None
    classes: str | None = None
    mirror: bool | None = None
    compiled: bool | None = None
    sensitivity: bool = True
    force: bool = False
    restart: bool = False
    shard: str | None = None
    command: str = ""

    @property
    def path(self) -> Path:
        if self.output is not None:
            return self.output
        if self.model.path is None:
            raise OodcliError(
                "the network is a loaded classifier, not a path: give the output file"
            )
        return Path(stem_of(self.model.path) + ".virtual.h5")


@dataclass(frozen=True)
class Inverted:
    """Summary of ``invert``. file: the virtual images. contact_sheet: a PNG of some of them.
    images, classes: their numbers. path: how a step was computed. cross_entropy: in nats.
    agreement: the share on which the network predicts the target class. batchnorm_gap: layer → KL
    divergence, in nats."""

    file: Path
    contact_sheet: Path
    images: int
    classes: int
    objective: str
    steps: int
    precision: str
    device: str
    path: str
    cross_entropy: float
    agreement: float
    batchnorm_gap: Mapping[str, float]


@dataclass(frozen=True)
class InvertEstimate:
    """Estimate for a job. images: images that this process inverts. seconds: time for these."""

    images: int
    seconds: float


def estimate(request: InvertRequest) -> InvertEstimate:
    """Estimate the time of a job by a trial. Writes nothing."""
    share, team = part_of(request.shard)
    _, classifier, plan = _planned(request)
    plan, step, seconds = prepare(classifier, plan, compiled=request.compiled)
    mine = plan.images(Work(None, share, team).part(len(plan.batches())))
    _say_estimate(plan, step, seconds, mine)
    return InvertEstimate(mine, seconds * mine / plan.count)


def seconds_of(request: InvertRequest) -> float:
    """The estimate for all images, wherever the output will be. A step is not compiled for it,
    which takes a minute or more, unless the request asks for that."""
    classifier, plan = _plan(request)
    return prepare(classifier, plan, compiled=bool(request.compiled))[2]


def invert(request: InvertRequest, watch: Watch | None = None) -> Inverted | None:
    """Write virtual images to a file; None in a process of torchrun that writes no file."""
    share, team = part_of(request.shard)
    path, classifier, plan = _planned(request)
    made = provenance(
        classifier,
        source=str(request.model.path or request.model.name),
        command=request.command,
        seed=plan.seed,
        precision=plan.precision,
        virtual=True,
        shard=shard_of_plan(plan, share),
    )
    with ExitStack() as stack:
        kept = stack.enter_context(
            kept_work(
                path,
                _job(request, plan, made),
                made.command,
                restart=request.restart and (team is None or team.first_try()),
                team=team,
            )
        )
        decided = kept.about.decided
        if team is not None:
            decided = _agreed(team, decided, classifier, plan, request.compiled)
        plan, step, seconds = prepare(classifier, plan, compiled=request.compiled, decided=decided)
        kept.about.decided.update(decisions(plan, step))
        log_kept(kept)
        log.debug("batches made at once: %d", plan.at_once)
        notes.done(log, "a trial step")
        work = Work(kept, share, team)
        batches = len(plan.batches())
        mine, before = plan.images(work.part(batches)), work.rows(batches)
        _say_estimate(plan, step, seconds, mine, before)
        summary = invert_to_file(
            *(classifier, plan, path, made),
            step=step,
            force=request.force,
            progress=watched(watch, mine, before=before, each=plan.total_steps),
            work=work,
        )
    notes.done(log, "inversion")
    if summary is None:
        return None
    return Inverted(**{**summary, "file": path, "contact_sheet": path.with_suffix(".png")})


def _planned(request: InvertRequest) -> tuple[Path, Classifier, Plan]:
    """The output, the network to invert, and the plan of the images."""
    path = request.path
    refuse_suffix(path, ".h5", ".hdf5")
    refuse_output(path, force=request.force)
    refuse_existing(path.with_suffix(".png"), force=request.force or is_complete(path))
    return path, *_plan(request)


def _plan(request: InvertRequest) -> tuple[Classifier, Plan]:
    """The network to invert, and the plan of the images."""
    if request.objective not in OBJECTIVES:
        raise OodcliError(
            f"--objective {request.objective}: expected one of {', '.join(OBJECTIVES)}"
        )
    recipe = OBJECTIVES[request.objective].in_steps(request.steps)
    if request.mirror is not None:
        recipe = replace(recipe, mirror=request.mirror)
    model = request.model
    classifier = model.load()
    refuse_without_batchnorm(classifier, recipe)
    height, width = classifier.preprocessing.input_size
    plan = Plan(
        classes=wanted_classes(request.classes, classifier.num_classes),
        per_class=request.per_class,
        total=request.total,
        sensitivity=request.sensitivity and bool(classifier.batchnorms),
        objective=recipe,
        steps=request.steps,
        batch_size=model.running.batch_size
        or max(SMALL_BATCH, min(100, 100 * 64 * 64 // (height * width))),
        precision=model.precision("auto"),
        seed=model.running.seed,
    )
    pairs = ", ".join(f"{name}={value}" for name, value in asdict(recipe).items())
    log.debug("objective %s", pairs)
    log.debug(
        "%d images of %d classes, in batches of at most %d, %d steps each",
        *(plan.count, len(plan.classes), plan.batch_size, plan.total_steps),
    )
    if len(plan.classes) < min(classifier.num_classes, plan.batch_size):
        notes.say(
            log,
            f"batches hold only {len(plan.classes)} of {classifier.num_classes} classes, so their "
            "statistics match the network's less closely",
        )
    return classifier, plan


def _job(request: InvertRequest, plan: Plan, made: Provenance) -> dict[str, Any]:
    """Settings that decide the images."""
    settings = {
        **request.model.job(),
        "--objective": asdict(plan.objective),
        "--steps": plan.total_steps,
        "--per-class": plan.per_class if plan.total is None else None,
        **({} if plan.total is None else {"--total": plan.total}),
        **({} if plan.sensitivity else {"--no-sensitivity": True}),
        "--classes": plan.classes,
        "--batch-size": plan.batch_size,
        "--compile": request.compiled,
    }
    return job_of(made, **settings)


def _agreed(
    team: Team,
    decided: dict[str, Any],
    classifier: Classifier,
    plan: Plan,
    compiled: bool | None,
) -> dict[str, Any]:
    """The plan on which all processes of torchrun agree."""

    def decide() -> dict[str, Any]:
        return decided or decisions(*prepare(classifier, plan, compiled=compiled)[:2])

    return team.agree("decisions", decide)


def _say_estimate(plan: Plan, step: Step, seconds: float, mine: int, done: int = 0) -> None:
    """mine: number of the images that this process inverts."""
    batches = plan.batches()
    count = plan.count
    left = mine - done
    halved = f" ({plan.half_steps} at half the side)" if plan.half_steps else ""
    notes.say(
        log,
        f"{count} images of {plan.inverted} classes; steps: {plan.total_steps}{halved}, "
        f"batches: {len(batches)} of {len(batches[0])}; {plan.precision} on "
        f"{step.classifier.device}, {step.path}: about {notes.duration(seconds * left / count)}"
        + (f" for the remaining {left}" if done else f" for {left}" if left < count else ""),
        word="",
    )
