"""``oodcli evaluate``: metrics, tables and figures from scores files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oodcli.cli import console
from oodcli.cli.options import Force, Json, Quiet, complete_detectors

if TYPE_CHECKING:
    from oodcli.report.evaluation import Evaluation


def command(
    id_file: Annotated[
        Path,
        typer.Option("--id", metavar="F", help="Scores of in-distribution images."),
    ],
    ood: Annotated[
        list[str],
        typer.Option("--ood", metavar="NAME=F", help="Scores of an OOD set. Repeatable."),
    ],
    detector: Annotated[
        list[str] | None,
        typer.Option(
            "--detector",
            "-d",
            metavar="NAME",
            help="Only this column. Repeatable.",
            autocompletion=complete_detectors,
            show_default="all",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="For report.html, tables, figures.",
            show_default=False,
        ),
    ] = None,
    resamples: Annotated[
        int, typer.Option(min=0, help="Bootstrap resamples for 95 % intervals; 0 for none.")
    ] = 1000,
    min_auroc: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Exit with 4 when the mean AUROC of a detector is lower.",
            show_default=False,
        ),
    ] = None,
    thumbnails: Annotated[
        bool,
        typer.Option("--thumbnails/--no-thumbnails", help="Small images in the page of -o."),
    ] = True,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Compare how well scores tell in-distribution from OOD images."""
    from oodcli.files.scores import read_scores
    from oodcli.report import refuse_existing_report, write_report
    from oodcli.report.evaluation import evaluate_files
    from oodcli.report.tables import as_json

    named = _named(ood)
    if output is not None:
        refuse_existing_report(output, force=force)
    id_scores = read_scores(id_file)
    ood_scores = {name: read_scores(path) for name, path in named.items()}
    if detector:
        id_scores = id_scores.only(detector)
        ood_scores = {name: scores.only(detector) for name, scores in ood_scores.items()}
    evaluation = replace(
        evaluate_files(id_scores, ood_scores, resamples=resamples, seed=seed),
        command=console.command_line(),
    )
    written = []
    if output is not None:
        written = write_report(
            evaluation, id_scores, ood_scores, output, force=force, thumbnails=thumbnails
        )
    for note in evaluation.notes:
        console.say(f"note: {note}")
    if json:
        console.emit_json(as_json(evaluation))
    else:
        _print(evaluation)
    if written:
        console.say(f"wrote {len(written)} files into {output}: report.html shows them")
    if min_auroc is not None:
        _gate(evaluation, min_auroc)


def _named(ood: list[str]) -> dict[str, Path]:
    from oodcli.errors import OodcliError

    named: dict[str, Path] = {}
    for text in ood:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise OodcliError(f"--ood {text}: expected NAME=FILE, such as textures=textures.csv")
        if name in named:
            raise OodcliError(f"--ood {name} is given twice: every set has one name")
        named[name] = Path(path)
    return named


def _print(evaluation: Evaluation) -> None:
    from oodcli.cli.tables import evaluation_table
    from oodcli.report.tables import accuracy_line

    console.emit_table(evaluation_table(evaluation, console.width()))
    for line in (evaluation.footnote, accuracy_line(evaluation)):
        if line:
            console.emit(line)


def _gate(evaluation: Evaluation, least: float) -> None:
    from oodcli.metrics import MEAN

    means = {name: evaluation.get(name, MEAN, "auroc").value for name in evaluation.detectors}
    failed = [f"{name} {value:.4f}" for name, value in means.items() if value < least]
    if failed:
        console.say(f"gate failed: mean AUROC below {least:g}: {', '.join(failed)}")
        raise typer.Exit(4)
