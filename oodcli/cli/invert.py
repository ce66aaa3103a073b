"""``oodcli invert``: virtual images from a checkpoint alone."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oodcli.cli import console, details
from oodcli.cli.completions import words
from oodcli.cli.options import (
    Checkpoint,
    Force,
    Json,
    ModelOptions,
    Quiet,
    Restart,
    Shard,
    Verbose,
    beside,
    takes_model,
)

if TYPE_CHECKING:
    from oodcli.inversion.invert import Plan
    from oodcli.inversion.step import Step


@takes_model
def command(
    checkpoint: Checkpoint,
    per_class: Annotated[
        int, typer.Option(min=1, help="Virtual images of each class (the paper: 2500).")
    ] = 100,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Default: NAME.virtual.h5", show_default=False),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="kl (ours), paper (C2IR eq. 5) or deepinversion.",
            autocompletion=words("kl", "paper", "deepinversion"),
        ),
    ] = "kl",
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of an image: 50 for kl, else 2000.", show_default=False),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="0-4,7", help="Only these.", show_default="all")
    ] = None,
    mirror: Annotated[
        bool | None,
        typer.Option(
            help="Mirror at random while inverting; not for classes that change under it, such "
            "as text, hands or medical sides.",
            show_default="as the objective: kl mirrors",
        ),
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the step, or not; the images differ in their last digits.",
            show_default="if the job is long and that is faster",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how long it would take, and stop.")
    ] = False,
    json: Json = False,
    force: Force = False,
    restart: Restart = False,
    shard: Shard = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    *,
    model: ModelOptions,
) -> None:
    """Recall virtual images from the statistics of BatchNorm layers."""
    from oodcli.cli import torchrun
    from oodcli.errors import OodcliError
    from oodcli.files.atomic import refuse_existing, refuse_suffix
    from oodcli.files.journal import is_complete, journal, refuse_output
    from oodcli.inversion.invert import (
        Plan,
        decisions,
        prepare,
        refuse_without_batchnorm,
        wanted_classes,
    )
    from oodcli.inversion.objective import OBJECTIVES
    from oodcli.jobs.shards import WHOLE
    from oodcli.stages.invert import invert_to_file, shard_of_plan
    from oodcli.stages.record import Work, job_of, provenance

    share, team = torchrun.part(shard)
    path = output or beside(checkpoint, ".virtual.h5")
    refuse_suffix(path, ".h5", ".hdf5")
    refuse_output(path, force=force)
    refuse_existing(path.with_suffix(".png"), force=force or is_complete(path))
    if objective not in OBJECTIVES:
        raise OodcliError(f"--objective {objective}: expected one of {', '.join(OBJECTIVES)}")
    recipe = OBJECTIVES[objective]
    if mirror is not None:
        recipe = replace(recipe, mirror=mirror)
    classifier = model.load(checkpoint)
    refuse_without_batchnorm(classifier)
    height, width = classifier.preprocessing.input_size
    plan = Plan(
        classes=wanted_classes(classes, classifier.num_classes),
        per_class=per_class,
        objective=recipe,
        steps=steps,
        batch_size=model.batch_size or max(25, min(100, 100 * 64 * 64 // (height * width))),
        precision=model.resolved_precision(fast=True),
        seed=model.seed,
    )
    details.say_plan(plan)
    if len(plan.classes) < min(classifier.num_classes, plan.batch_size):
        console.say(
            f"note: batches hold {len(plan.classes)} of {classifier.num_classes} classes, so their "
            "statistics match the network's less well"
        )
    if dry_run:
        plan, step, seconds = prepare(classifier, plan, compiled=compiled)
        part = Work(None, share, team).part(len(plan.batches()))
        mine = plan.images(part)
        _say_estimate(plan, step, seconds, mine)
        if json:
            whole = len(plan.classes) * plan.per_class
            console.emit_json({"images": mine, "seconds": seconds * mine / whole})
        return
    made = provenance(
        classifier,
        source=str(checkpoint),
        command=console.command_line(),
        seed=model.seed,
        precision=plan.precision,
        virtual=True,
        shard=shard_of_plan(plan, share),
    )
    settings = {
        **model.job(),
        "--objective": asdict(recipe),
        "--steps": plan.total_steps,
        "--per-class": per_class,
        "--classes": plan.classes,
        "--batch-size": plan.batch_size,
        "--compile": compiled,
    }
    with ExitStack() as stack:
        kept = stack.enter_context(
            journal(
                path,
                job_of(made, **settings),
                made.command,
                restart=restart and (team is None or team.first_try()),
                share=WHOLE if team is None else team.share,
            )
        )
        decided = kept.about.decided
        if team is not None:

            def decide() -> dict[str, Any]:
                return decisions(*prepare(classifier, plan, compiled=compiled)[:2])

            decided = team.agree("decisions", decided, decide)
        plan, step, seconds = prepare(classifier, plan, compiled=compiled, decided=decided)
        kept.about.decided.update(decisions(plan, step))
        details.say_journal(kept)
        console.lap("a trial step")
        work = Work(kept, share, team)
        mine = plan.images(work.part(len(plan.batches())))
        _say_estimate(plan, step, seconds, mine, kept.rows)
        advance = stack.enter_context(
            console.progress(
                mine * plan.total_steps,
                "invert",
                plan.total_steps,
                before=kept.rows * plan.total_steps,
            )
        )
        summary = invert_to_file(
            classifier, plan, path, made, step=step, force=force, progress=advance, work=work
        )
    console.lap("inversion")
    if summary is None:
        return
    if json:
        console.emit_json(summary)
        return
    gaps = summary["batchnorm_gap"]
    worst = max(gaps, key=lambda name: gaps[name])
    console.say(
        f"cross entropy {summary['cross_entropy']:.3g} nats; the network agrees with the target "
        f"class on {summary['agreement']:.1%}; BatchNorm gap (KL, nats) "
        f"{sum(gaps.values()) / len(gaps):.3f} on average, {gaps[worst]:.3f} at worst ({worst})"
    )
    console.say(f"wrote {path} and {path.with_suffix('.png')}")


def _say_estimate(plan: Plan, step: Step, seconds: float, mine: int, done: int = 0) -> None:
    """mine: how many of its images this process makes."""
    batches = plan.batches()
    count = len(plan.classes) * plan.per_class
    left = mine - done
    halved = f" ({plan.half_steps} at half the side)" if plan.half_steps else ""
    console.say(
        f"{count} images of {len(plan.classes)} classes; steps: {plan.total_steps}{halved}, "
        f"batches: {len(batches)} of {len(batches[0])}; {plan.precision} on "
        f"{step.classifier.device}, {step.path}: about "
        f"{console.duration(seconds * left / count)}"
        + (f" for the {left} that are left" if done else f" for {left}" if left < count else "")
    )
