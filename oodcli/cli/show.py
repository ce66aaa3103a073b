"""``oodcli show``: a page to look at scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oodcli.cli import console
from oodcli.cli.completions import complete_detectors
from oodcli.cli.options import Force, Json, Quiet, Verbose

if TYPE_CHECKING:
    from oodcli.api import Shown


def command(
    scores: Annotated[
        Path,
        typer.Argument(
            metavar="SCORES", help="Scores file of score or merge: .csv, .jsonl or .parquet."
        ),
    ],
    images: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGES",
            help="Images that were scored, if they have moved: a folder, a list of paths, an .npz, "
            ".tar or .zip file, or the .h5 of invert. Also noise:KIND?… and torchvision:DATASET?….",
            show_default="the paths in SCORES",
        ),
    ] = None,
    detector: Annotated[
        list[str] | None,
        typer.Option(
            "--detector",
            "-d",
            metavar="NAME",
            help="Detector to show. Repeatable; the page starts with the first.",
            autocompletion=complete_detectors,
            show_default="all",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="PAGE.html", help="Page.", show_default="SCORES as .html"
        ),
    ] = None,
    thumbnails: Annotated[
        bool, typer.Option("--thumbnails/--no-thumbnails", help="Show thumbnails.")
    ] = True,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show scores on one HTML page, with thumbnails."""
    from oodcli.cli.library import api

    with console.stage("show") as progress:
        shown = api.show(
            scores,
            output,
            images,
            detectors=detector or (),
            thumbnails=thumbnails,
            force=force,
            progress=progress,
            command=console.command_line(),
        )
    if json:
        console.emit_json(vars(shown))
    say(shown)


def say(shown: Shown) -> None:
    console.say(shown.sentence)
    console.say(f"wrote {shown.output}: open it in a browser")
