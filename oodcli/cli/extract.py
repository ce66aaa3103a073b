"""``oodcli extract``: cache activations and gradients of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oodcli.cli import console, verdicts
from oodcli.cli.completions import complete_detector_list, complete_records
from oodcli.cli.options import (
    Checkpoint,
    Force,
    Images,
    Json,
    MaxPixels,
    ModelOptions,
    Parameters,
    Quiet,
    Restart,
    Shard,
    Timeout,
    Verbose,
    parameters,
    takes_model,
)
from oodcli.records import ON_REQUEST


@takes_model
def command(
    checkpoint: Checkpoint,
    images: Images,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Cache to write, by default IMAGES.features.h5."),
    ] = None,
    record: Annotated[
        str | None,
        typer.Option(
            metavar="RECORD,RECORD",
            help=f"Records to store: {', '.join(ON_REQUEST)}, or all.",
            show_default="what a forward pass gives; for virtual images also the gradients",
            autocompletion=complete_records,
        ),
    ] = None,
    for_detectors: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="NAME,NAME",
            help="Detectors whose records to store; FILE.py:CLASS for your own.",
            autocompletion=complete_detector_list,
        ),
    ] = None,
    match_accuracy: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Published test accuracy of the network: degrade virtual images with patches of "
            "others until the network has this accuracy on them. Use the cache with fit "
            "--calibrate.",
        ),
    ] = None,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="Record the mirrored images as well.")
    ] = False,
    param: Parameters = None,
    json: Json = False,
    force: Force = False,
    restart: Restart = False,
    timeout: Timeout = None,
    max_pixels: MaxPixels = None,
    shard: Shard = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    *,
    model: ModelOptions,
) -> None:
    """Run the network over images once and cache what detectors need."""
    from oodcli.cli.library import api

    with console.stage("extract") as progress:
        extracted = api.extract(
            model.checkpoint(checkpoint),
            images,
            output,
            record=None if record is None else _words(record),
            for_detectors=_words(for_detectors),
            parameters=parameters(param),
            match_accuracy=match_accuracy,
            mirror=mirror,
            force=force,
            restart=restart,
            timeout=timeout,
            shard=shard,
            **model.running(),
            progress=progress,
            command=console.command_line(),
        )
    if extracted is None:
        return
    if json:
        console.emit_json(vars(extracted))
    accuracy = extracted.accuracy
    unreadable = verdicts.counted((extracted.unreadable, "unreadable"), before=", ")
    right = "" if accuracy is None else f"; accuracy {accuracy:.2%} on the labelled ones"
    console.say(f"wrote {extracted.file}: {extracted.images} images{unreadable}{right}")
    verdicts.say_left_out(extracted.left_out)
    if extracted.unreadable and not console.who:  # torchrun reports it as a crash
        raise typer.Exit(3)


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]
