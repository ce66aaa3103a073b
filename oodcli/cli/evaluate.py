"""``oodcli evaluate``: metrics, tables and figures from scores files; figures from caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oodcli.cli import console
from oodcli.cli.completions import complete_detectors
from oodcli.cli.options import Force, Json, Quiet, Verbose
from oodcli.errors import OodcliError

if TYPE_CHECKING:
    from oodcli.api import Evaluated

_of_layers = partial(typer.Option, rich_help_panel="Figures of layers, from feature caches")


def command(
    *,
    id_file: Annotated[
        Path | None,
        typer.Option(
            "--id", metavar="F", help="Scores of in-distribution images (.csv, .jsonl or .parquet)."
        ),
    ] = None,
    ood: Annotated[
        list[str],
        typer.Option(
            "--ood",
            metavar="NAME=F",
            help="Scores of an OOD set; with --layers, its feature cache. Repeatable.",
        ),
    ],
    detector: Annotated[
        list[str] | None,
        typer.Option(
            "--detector",
            "-d",
            metavar="NAME|FILE",
            help="Detector to compare. Repeatable. With --layers, an artefact of lsgm whose "
            "transitions to draw.",
            autocompletion=complete_detectors,
            show_default="all",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder for report.html, tables and figures."
        ),
    ] = None,
    resamples: Annotated[
        int, typer.Option(min=0, help="Bootstrap resamples for 95% intervals; 0 for none.")
    ] = 1000,
    min_auroc: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Gate: exit with 4 when the mean AUROC of a detector is lower."
        ),
    ] = None,
    thumbnails: Annotated[
        bool, typer.Option("--thumbnails/--no-thumbnails", help="Show thumbnails in report.html.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    layers: Annotated[
        Path | None,
        _of_layers(
            metavar="F.h5",
            help="Feature cache of in-distribution images: draw the papers' figures instead.",
        ),
    ] = None,
    virtual: Annotated[
        Path | None, _of_layers(metavar="F.h5", help="Feature cache of virtual images.")
    ] = None,
    images: Annotated[
        Path | None, _of_layers(metavar="F.h5", help="Virtual images to show beside real ones.")
    ] = None,
    method: Annotated[
        str | None,
        _of_layers("--map", help="Projection of the features: pca or tsne.", show_default="pca"),
    ] = None,
) -> None:
    """Compare how well detectors separate ID from OOD images."""
    if layers is not None:
        _refuse("--layers", {"--id": id_file, "--min-auroc": min_auroc})
        _draw(
            *(layers, _named(ood), output, detector or []),
            virtual=virtual,
            images=images,
            method=method or "pca",
            seed=seed,
            json=json,
            force=force,
        )
    elif id_file is not None:
        _refuse("--id", {"--virtual": virtual, "--images": images, "--map": method})
        evaluated = _compare(
            *(id_file, _named(ood), output, detector or []),
            resamples=resamples,
            thumbnails=thumbnails,
            seed=seed,
            json=json,
            force=force,
        )
        if min_auroc is not None:
            _gate(evaluated, min_auroc)
    else:
        raise typer.BadParameter("give scores with --id, or feature caches with --layers")


def _refuse(mode: str, others: Mapping[str, object]) -> None:
    """Raises OodcliError for an option that ``mode`` does not accept."""
    for option, value in others.items():
        if value is not None:
            raise OodcliError(
                f"{option} cannot be used with {mode}: --id compares scores, --layers draws "
                "figures of feature caches"
            )


def _compare(
    id_file: Path,
    named: Mapping[str, Path],
    output: Path | None,
    detectors: Sequence[str],
    *,
    json: bool,
    **given: Any,
) -> Evaluated:
    from oodcli.stages.evaluate import evaluate  # oodcli.api imports torch, for a second

    with console.stage("evaluate") as watch:
        evaluated = evaluate(
            id_file,
            named,
            detectors=detectors,
            output=output,
            **given,
            watch=watch,
            command=console.command_line(),
        )
    emit(evaluated, json=json)
    return evaluated


def _draw(
    layers: Path,
    ood: Mapping[str, Path],
    output: Path | None,
    artefacts: Sequence[str],
    *,
    json: bool,
    **given: Any,
) -> None:
    from oodcli.cli.library import api

    if output is None:
        raise OodcliError("--layers draws figures: give a folder for them with -o DIR")
    if len(artefacts) > 1:
        raise OodcliError("--layers draws the transitions of one artefact: give -d once")
    lsgm = Path(artefacts[0]) if artefacts else None
    report = api.draw_layers(layers, ood, output, lsgm=lsgm, **given)
    if json:
        console.emit_json(
            {
                "files": [str(path) for path in report.paths],
                "notes": report.notes,
                "distance_from_batchnorm": report.curves and report.curves.from_batchnorm,
                "distance_from_id_class": report.curves and report.curves.from_id_class,
                "indicators": report.boxes or None,
                "ablation": report.ablation or None,
            }
        )
    console.say(f"wrote {len(report.paths)} files to {output}")


def _named(ood: list[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for text in ood:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise OodcliError(f"--ood {text}: expected NAME=FILE, such as textures=textures.csv")
        if name in named:
            raise OodcliError(f"--ood {name} is given twice: use a different name for each set")
        named[name] = Path(path)
    return named


def emit(evaluated: Evaluated, *, json: bool = False) -> None:
    from oodcli.cli.tables import evaluation_table
    from oodcli.report.tables import accuracy_line, as_json

    evaluation, files = evaluated.evaluation, evaluated.files
    if json:
        console.emit_json(as_json(evaluation))
    else:
        console.emit_table(evaluation_table(evaluation, console.width()))
        for line in (evaluation.footnote, accuracy_line(evaluation)):
            if line:
                console.emit(line)
    if files:
        console.say(f"wrote {len(files)} files to {files[0].parent}: open report.html")


def _gate(evaluated: Evaluated, least: float) -> None:
    means = evaluated.mean_auroc
    failed = [f"{name} {value:.4f}" for name, value in means.items() if value < least]
    if failed:
        console.say(f"gate failed: mean AUROC below {least:g}: {', '.join(failed)}")
        raise typer.Exit(4)
