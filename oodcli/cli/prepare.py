"""``oodcli prepare``: all that score needs, with one command."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oodcli import notes
from oodcli.cli import console
from oodcli.cli.options import (
    Checkpoint,
    Force,
    Json,
    ModelOptions,
    Quiet,
    Restart,
    Verbose,
    mirroring,
    takes_model,
)

if TYPE_CHECKING:
    from oodcli.api import Prepared


@takes_model
def command(
    checkpoint: Checkpoint,
    accuracy: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Published test accuracy, such as 0.917. Gives verdicts without real images.",
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="ID_IMAGES",
            help="Real in-distribution images that the network was not trained on, labelled or "
            "not: a folder, an .npz …, as IMAGES of score.",
        ),
    ] = None,
    per_class: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Virtual images per class.",
            show_default="50; with over 100 classes a number in all, by the image size",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Optimisation steps per virtual image.",
            show_default="50; with over 100 classes 24",
        ),
    ] = None,
    mirror: Annotated[bool | None, mirroring("on")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for all files.",
            show_default="CHECKPOINT.oodcli, where score finds it",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the steps with estimated times, and exit.")
    ] = False,
    json: Json = False,
    force: Force = False,
    restart: Restart = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    *,
    model: ModelOptions,
) -> None:
    """Make everything that score needs of a checkpoint."""
    from oodcli.cli.library import api

    given: dict[str, Any] = {
        "accuracy": accuracy,
        "images": images,
        "per_class": per_class,
        "steps": steps,
        "mirror": mirror,
        "force": force,
        **model.running(),
    }
    if dry_run:
        planned = api.plan_preparation(model.checkpoint(checkpoint), output, **given)
        if planned is not None and json:
            console.emit_json(_summary(planned))
        elif planned is not None:
            _emit_plan(planned)
        return
    prepared = api.prepare(
        model.checkpoint(checkpoint),
        output,
        **given,
        restart=restart,
        watching=console.stage,
        command=console.command_line(),
    )
    if prepared is None:
        return
    if json:
        console.emit_json(_summary(prepared))
    say(prepared)
    if (prepared.unreadable or prepared.not_fitted) and not console.who:
        raise typer.Exit(3)


def _summary(prepared: Prepared) -> dict[str, Any]:
    return {**asdict(prepared), "seconds": prepared.seconds}


def _emit_plan(planned: Prepared) -> None:
    """Commands that can be run, with times as comments."""
    for step in planned.steps:
        about = "there already" if step.done else f"about {notes.duration(step.seconds)}"
        console.emit(f"{step.command}  # {about}")
    total = notes.duration(planned.seconds)
    console.emit(f"# {planned.detector}; in all about {total}")
    for sentence in planned.notes:
        console.say(f"note: {sentence}")


def say(prepared: Prepared) -> None:
    basis = "no calibration, so no verdicts"
    if prepared.calibrated_on is not None and prepared.false_alarms is not None:
        low, high = prepared.false_alarms
        basis = f"calibrated on {prepared.calibrated_on}; " + (
            f"expect {100 * low:.1f}–{high:.1%} false alarms at --fpr 0.05"
            if high > 0
            else f"smallest p-value {prepared.resolution:.2g}"
        )
    if prepared.unreadable:
        console.say(f"{prepared.unreadable} real images could not be read")
    console.say(f"{prepared.folder} is prepared: score uses {prepared.detector} ({basis})")
    console.say(f"next:\n$ {prepared.next}")
