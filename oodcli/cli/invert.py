"""``oodcli invert``: virtual images from a checkpoint alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from oodcli.cli import console
from oodcli.cli.options import (
    Checkpoint,
    Force,
    Json,
    ModelOptions,
    Quiet,
    beside,
    takes_model,
)


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
        str, typer.Option(help="kl (ours), paper (C2IR eq. 5) or deepinversion.")
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
    quiet: Quiet = False,
    *,
    model: ModelOptions,
) -> None:
    """Recall virtual images from the statistics of BatchNorm layers."""
    from oodcli.errors import OodcliError
    from oodcli.files.atomic import refuse_existing, refuse_suffix
    from oodcli.inversion.invert import Plan, prepare, refuse_without_batchnorm, wanted_classes
    from oodcli.inversion.objective import OBJECTIVES
    from oodcli.stages.invert import invert_to_file
    from oodcli.stages.record import provenance

    path = output or beside(checkpoint, ".virtual.h5")
    refuse_suffix(path, ".h5", ".hdf5")
    refuse_existing(path, force=force)
    refuse_existing(path.with_suffix(".png"), force=force)
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
    if len(plan.classes) < min(classifier.num_classes, plan.batch_size):
        console.say(
            f"note: batches hold {len(plan.classes)} of {classifier.num_classes} classes, so their "
            "statistics match the network's less well"
        )
    plan, step, seconds = prepare(classifier, plan, compiled=compiled)
    batches = plan.batches()
    count = len(plan.classes) * plan.per_class
    halved = f" ({plan.half_steps} at half the side)" if plan.half_steps else ""
    console.say(
        f"{count} images of {len(plan.classes)} classes; steps: {plan.total_steps}{halved}, "
        f"batches: {len(batches)} of {len(batches[0])}; {plan.precision} on {classifier.device}, "
        f"{step.path}: about {console.duration(seconds)}"
    )
    if dry_run:
        return
    with console.progress(count * plan.total_steps, "invert", plan.total_steps) as advance:
        summary = invert_to_file(
            classifier,
            plan,
            path,
            provenance(
                classifier,
                source=str(checkpoint),
                command=console.command_line(),
                seed=model.seed,
                precision=plan.precision,
                virtual=True,
            ),
            step=step,
            force=force,
            progress=advance,
        )
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
