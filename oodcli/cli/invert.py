"""``oodcli invert``: virtual images from a checkpoint alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from oodcli.cli import console
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
    mirroring,
    takes_model,
)


@takes_model
def command(
    checkpoint: Checkpoint,
    per_class: Annotated[
        int, typer.Option(min=1, help="Virtual images per class; the paper uses 2500.")
    ] = 100,
    total: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Virtual images in all, in place of --per-class. With fewer than classes, they "
            "are of classes spread over all, and --seed 1 continues with the next ones.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write, by default CHECKPOINT.virtual.h5."),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="Objective: kl (ours), short (ours, for many classes), patches (for networks "
            "without BatchNorm), paper (C2IR, eq. 5) or deepinversion.",
            autocompletion=words("kl", "short", "patches", "paper", "deepinversion"),
        ),
    ] = "kl",
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Optimisation steps per image.",
            show_default="50 for kl, 30 for patches, 24 for short, otherwise 2000",
        ),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="0-4,7", help="Classes to invert.", show_default="all")
    ] = None,
    mirror: Annotated[bool | None, mirroring("off for paper, deepinversion")] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the step. Compiled and uncompiled images differ in the last digits.",
            show_default="if the job is long and that is faster",
        ),
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option(
            help="Measure the sensitivities that c2ir needs, which costs as much as 7 steps.",
        ),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print how long the job would run, and exit.")
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
    """Make virtual images of every class from the checkpoint alone."""
    from oodcli.cli.library import api

    given: dict[str, Any] = {
        "per_class": per_class,
        "total": total,
        "objective": objective,
        "steps": steps,
        "classes": classes,
        "mirror": mirror,
        "compiled": compiled,
        "sensitivity": sensitivity,
        "force": force,
        "shard": shard,
        **model.running(),
    }
    if dry_run:
        estimate = api.estimate_inversion(model.checkpoint(checkpoint), output, **given)
        if json:
            console.emit_json(vars(estimate))
        return
    with console.stage("invert") as progress:
        inverted = api.invert(
            model.checkpoint(checkpoint),
            output,
            **given,
            restart=restart,
            progress=progress,
            command=console.command_line(),
        )
    if inverted is None:
        return
    if json:
        console.emit_json(vars(inverted))
        return
    gaps = inverted.batchnorm_gap
    worst = max(gaps, key=lambda name: gaps[name], default=None)
    said = (
        f"the network predicts the target class on {inverted.agreement:.1%}, cross entropy "
        f"{inverted.cross_entropy:.3g} nats"
    )
    if worst is not None:
        mean = sum(gaps.values()) / len(gaps)
        said += f"; BatchNorm gap (KL, nats) mean {mean:.3f}, worst {gaps[worst]:.3f} ({worst})"
    console.say(said)
    console.say(f"wrote {inverted.file} and {inverted.contact_sheet}")
