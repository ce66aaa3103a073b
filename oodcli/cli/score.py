"""``oodcli score``: scores of images or of a cache, as CSV."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oodcli.cli import console, verdicts
from oodcli.cli.options import (
    Detectors,
    Force,
    Json,
    MaxOodFraction,
    MaxPixels,
    ModelOptions,
    OptionalImages,
    Parameters,
    Quiet,
    Restart,
    Shard,
    Timeout,
    Verbose,
    parameters,
    takes_model,
    verdict,
)
from oodcli.errors import OodcliError

if TYPE_CHECKING:
    from oodcli.api import Scored


@takes_model
def command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT|CACHE.h5",
            help="Checkpoint, followed by IMAGES; or a cache written by extract.",
        ),
    ],
    images: OptionalImages = None,
    detector: Detectors = None,
    param: Parameters = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Scores file: .csv, .jsonl or .parquet. Without it, CSV on standard output.",
        ),
    ] = None,
    fpr: Annotated[
        float | None,
        verdict(
            metavar="RATE",
            min=0,
            max=1,
            help="False-alarm rate of the verdicts, by the artefacts' calibration. Adds NAME.p and "
            "NAME.ood.",
        ),
    ] = None,
    threshold: Annotated[
        list[str] | None,
        verdict(
            metavar="NAME=NUMBER",
            help="Threshold above which a score is OOD. Adds NAME.ood. Repeatable. Or 'split' for "
            "the two groups with the least variance within (Otsu), or 'labelled' for the "
            "threshold of fit --labelled.",
        ),
    ] = None,
    contamination: Annotated[
        float | None,
        verdict(
            metavar="SHARE",
            min=0,
            max=1,
            help="Expected share of OOD images: the highest scores are OOD.",
        ),
    ] = None,
    max_ood_fraction: MaxOodFraction = None,
    mirror: Annotated[
        bool,
        typer.Option(
            "--mirror",
            help="Add the score of the mirrored image. Not for classes that mirroring changes.",
        ),
    ] = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Add NAME[stream], which borrows from the scores of similar images in this job. "
            "For whole jobs of 100 images or more.",
        ),
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Explain scores in NAME.why, where the detector can.")
    ] = False,
    json: Json = False,
    force: Force = False,
    restart: Restart = False,
    timeout: Timeout = None,
    max_pixels: MaxPixels = None,
    shard: Shard = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="ray|ray://HOST:PORT",
            help="Ray cluster to score on. IMAGES may also be an address such as s3://…, a pattern "
            "of .tar files, or Parquet.",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="PAGE.html", help="Also write the page of 'oodcli show'.")
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    *,
    model: ModelOptions,
) -> None:
    """Score images: higher = more out of distribution."""
    from oodcli.cli.library import api

    if json and output is None:
        raise OodcliError(
            "--json prints the summary on standard output: write the scores to a file with -o"
        )
    if html is not None and output is None:
        raise OodcliError("--html shows a scores file: write one with -o")
    decides = fpr is not None or bool(threshold) or contamination is not None
    if max_ood_fraction is not None and not decides:
        raise OodcliError(
            "--max-ood-fraction counts verdicts: add --fpr, --threshold or --contamination"
        )
    with console.stage("score") as progress:
        scored = api.score(
            model.checkpoint(checkpoint),
            images,
            sys.stdout if output is None else output,
            detector or (),
            parameters=parameters(param),
            fpr=fpr,
            threshold=threshold or (),
            contamination=contamination,
            mirror=mirror,
            stream=stream,
            explain=explain,
            force=force,
            restart=restart,
            timeout=timeout,
            shard=shard,
            engine=engine,
            html=html,
            **model.running(),
            progress=progress,
            command=console.command_line(),
        )
    if scored is None:
        return
    if json:
        console.emit_json(_summary(scored))
    say(scored)
    if html is not None:
        console.say(f"wrote {html}: open it in a browser")
    if verdicts.gate_failed(scored.doubts, max_ood_fraction):
        raise typer.Exit(4)
    if scored.unreadable and not console.who:  # torchrun reports it as a crash
        raise typer.Exit(3)


def _summary(scored: Scored) -> dict[str, Any]:
    names = ("rows", "unreadable", "infinite", "flagged", "thresholds", "unjudged")
    more = ("ood_fraction", "left_out", "fitted_on", "saw_ood")
    return {name: getattr(scored, name) for name in (*names, *more)}


def say(scored: Scored) -> None:
    # The name of a column such as knn[real] contains what it was fitted on.
    names = ", ".join(
        f"{name} ({rows})" if rows and not name.endswith(f"[{rows}]") else name
        for name, rows in scored.fitted_on.items()
    )
    faults = verdicts.counted(
        (scored.unreadable, "unreadable"), (scored.infinite, "with an infinite score (OOD)")
    )
    written = f"; wrote {scored.output}" if scored.output else ""
    console.say(f"{scored.rows} images scored by {names}{faults}{written}")
    for name, data in scored.saw_ood.items():
        console.say(f"{name} has learnt from {data}")
    for name, part in scored.ood_fraction.items():
        without = verdicts.without(scored.unjudged[name])
        console.say(f"{name}: {part:.1%} OOD{without} ({scored.bases[name]})")
    verdicts.say_left_out(scored.left_out)
