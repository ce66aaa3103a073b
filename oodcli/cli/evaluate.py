"""``oodcli evaluate``: metrics, tables and figures from scores files; figures from caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oodcli.cli import console
from oodcli.cli.options import Force, Json, Quiet, Verbose, complete_detectors
from oodcli.errors import OodcliError

if TYPE_CHECKING:
    from oodcli.report.evaluation import Evaluation

_LAYERS = "Figures of layers, from what extract wrote"


def command(
    *,
    id_file: Annotated[
        Path | None,
        typer.Option(
            "--id", metavar="F", help="Scores of in-distribution images.", show_default=False
        ),
    ] = None,
    ood: Annotated[
        list[str],
        typer.Option(
            "--ood",
            metavar="NAME=F",
            help="Scores of an OOD set; with --layers, its features. Repeatable.",
        ),
    ],
    detector: Annotated[
        list[str] | None,
        typer.Option(
            "--detector",
            "-d",
            metavar="NAME|FILE",
            help="Only this column. Repeatable. With --layers, an artefact of lsgm, whose "
            "transitions are drawn.",
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
    verbose: Verbose = False,
    layers: Annotated[
        Path | None,
        typer.Option(
            metavar="F.h5",
            help="Features of in-distribution images: draw the papers' figures instead.",
            show_default=False,
            rich_help_panel=_LAYERS,
        ),
    ] = None,
    virtual: Annotated[
        Path | None,
        typer.Option(
            metavar="F.h5",
            help="Features of virtual images.",
            show_default=False,
            rich_help_panel=_LAYERS,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="F.h5",
            help="The virtual images themselves, to be shown beside real ones.",
            show_default=False,
            rich_help_panel=_LAYERS,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--map",
            help="Of the features: pca or tsne.",
            show_default="pca",
            rich_help_panel=_LAYERS,
        ),
    ] = None,
) -> None:
    """Compare how well scores tell in-distribution from OOD images."""
    if layers is not None:
        _refuse("--layers", {"--id": id_file, "--min-auroc": min_auroc})
        artefacts = [Path(name) for name in detector or ()]
        caches = _Caches(layers, _named(ood), virtual, images, artefacts)
        _draw(caches, output, method=method or "pca", seed=seed, json=json, force=force)
    elif id_file is not None:
        _refuse("--id", {"--virtual": virtual, "--images": images, "--map": method})
        _compare(
            id_file,
            _named(ood),
            detector,
            output,
            resamples=resamples,
            min_auroc=min_auroc,
            thumbnails=thumbnails,
            seed=seed,
            json=json,
            force=force,
        )
    else:
        raise typer.BadParameter("give scores with --id, or features with --layers")


def _refuse(mode: str, others: Mapping[str, object]) -> None:
    """Raises OodcliError for an option that does not go with ``mode``."""
    for option, value in others.items():
        if value is not None:
            raise OodcliError(
                f"{option} does not go with {mode}: --id compares scores, --layers draws figures "
                "of feature caches"
            )


def _compare(
    id_file: Path,
    named: Mapping[str, Path],
    detector: list[str] | None,
    output: Path | None,
    *,
    resamples: int,
    min_auroc: float | None,
    thumbnails: bool,
    seed: int,
    json: bool,
    force: bool,
) -> None:
    from oodcli.files.scores import read_scores
    from oodcli.report import refuse_existing_report, write_report
    from oodcli.report.evaluation import evaluate_files
    from oodcli.report.tables import as_json

    if output is not None:
        refuse_existing_report(output, force=force)
    id_scores = read_scores(id_file)
    ood_scores = {name: read_scores(path) for name, path in named.items()}
    for name, scores in {"ID": id_scores, **ood_scores}.items():
        console.detail(
            f"{name}: {scores.source}, {len(scores.paths)} rows, {scores.unreadable} unreadable, "
            f"detectors {', '.join(scores.detectors)}"
        )
    console.lap("scores")
    if detector:
        id_scores = id_scores.only(detector)
        ood_scores = {name: scores.only(detector) for name, scores in ood_scores.items()}
    with console.steps(len(id_scores.detectors), "evaluate", "detectors") as advance:
        evaluation = evaluate_files(
            id_scores,
            ood_scores,
            resamples=resamples,
            seed=seed,
            progress=lambda done, total: advance(),
        )
    evaluation = replace(evaluation, command=console.command_line())
    console.lap("metrics")
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


@dataclass(frozen=True)
class _Caches:
    """Files that figures of layers are drawn from. artefacts: of lsgm, at most one."""

    id: Path
    ood: Mapping[str, Path]
    virtual: Path | None
    images: Path | None
    artefacts: Sequence[Path]


def _draw(
    caches: _Caches, output: Path | None, *, method: str, seed: int, json: bool, force: bool
) -> None:
    from oodcli.files.artefact import read_artefact
    from oodcli.files.cache import open_cache
    from oodcli.report.layer_figures import refuse_existing_figures, write_layer_figures
    from oodcli.report.layers import LayerInputs

    if output is None:
        raise OodcliError("--layers draws figures: say where they go, with -o DIR")
    if len(caches.artefacts) > 1:
        raise OodcliError("--layers draws the transitions of one artefact: give -d once")
    refuse_existing_figures(output, force=force)
    with ExitStack() as stack:
        inputs = LayerInputs(
            id=stack.enter_context(open_cache(caches.id)),
            ood={name: stack.enter_context(open_cache(path)) for name, path in caches.ood.items()},
            virtual=stack.enter_context(open_cache(caches.virtual)) if caches.virtual else None,
            images=caches.images,
            lsgm=read_artefact(caches.artefacts[0]) if caches.artefacts else None,
        )
        report = write_layer_figures(inputs, output, method=method, seed=seed, force=force)
    for note in report.notes:
        console.say(f"note: {note}")
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
    console.say(f"wrote {len(report.paths)} files into {output}")


def _named(ood: list[str]) -> dict[str, Path]:
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
