"""``oodcli fit``: detectors from a cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from oodcli.cli import console
from oodcli.cli.completions import complete_detectors
from oodcli.cli.options import Force, Json, Parameters, Quiet, Verbose, parameters


def command(
    cache: Annotated[
        Path | None,
        typer.Argument(
            metavar="CACHE.h5",
            help="Cache written by extract. Leave it out to calibrate detectors that need no "
            "fitting.",
        ),
    ] = None,
    detector: Annotated[
        list[str] | None,
        typer.Option(
            "--detector",
            "-d",
            metavar="NAME|FILE",
            help="Detector: a name, an artefact's path, or FILE.py:CLASS for your own; 'all' for "
            "every detector that CACHE.h5 can fit. Repeatable.",
            autocompletion=complete_detectors,
        ),
    ] = None,
    param: Parameters = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="F.h5",
            help="Cache to calibrate 'score --fpr' on: real images, accuracy-matched virtual "
            "images (extract --match-accuracy), or both. Repeatable.",
            show_default="every fifth row of CACHE.h5, at most 5,000, if it holds real images",
        ),
    ] = None,
    ood: Annotated[
        Path | None,
        typer.Option(
            metavar="F.h5", help="Cache of OOD images, for detectors that learn from them."
        ),
    ] = None,
    noise: Annotated[
        Path | None,
        typer.Option(
            metavar="F.h5", help="Cache of noise images, for 1c-sum, c2ir-peak, duo and trio."
        ),
    ] = None,
    labelled: Annotated[
        Path | None,
        typer.Option(
            metavar="F.csv",
            help="Labels of rows of CACHE.h5: a table with the columns path and ood (0 or 1).",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the artefacts.")
    ] = Path("detectors"),
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fit and calibrate detectors on virtual or real images."""
    from oodcli.cli.library import api

    api.limit_threads()
    with console.stage("fit") as progress:
        fitted = api.fit(
            cache,
            detector or (),
            output,
            parameters=parameters(param),
            calibrate=calibrate or (),
            ood=ood,
            noise=noise,
            labelled=labelled,
            force=force,
            progress=progress,
            command=console.command_line(),
        )
    if json:
        console.emit_json(fitted.artefacts)
    for each in fitted.artefacts:
        console.say(
            f"{each['detector']} is not fitted: {each['reason']}"
            if each["file"] is None
            else sentence(each)
        )
    if any(each["file"] is None for each in fitted.artefacts):
        raise typer.Exit(3)


def sentence(artefact: Mapping[str, Any]) -> str:
    """What is in an artefact, by an item of ``Fitted.artefacts``."""
    fitted_on = artefact["fitted_on"]
    words = [f"wrote {artefact['file']}"]
    if "rows" in fitted_on:
        words.append(f"fitted on {fitted_on['rows']} {fitted_on['kind']} images")
    if fitted_on.get("ood"):
        words.append(f"and on OOD images ({fitted_on['ood']})")
    if artefact["calibrated_on"]:
        low, high = artefact["achieved_at_0.05"]
        words.append(
            f"calibrated on {artefact['calibrated_on']} (smallest p-value "
            f"{artefact['resolution']:.2g}; expect {100 * low:.1f}–{high:.1%} false alarms at "
            "--fpr 0.05)"
        )
    if artefact["threshold"] is not None:
        words.append(f"threshold from labels {artefact['threshold']:.6g}")
    return ": ".join([words[0], ", ".join(words[1:])]) if len(words) > 1 else words[0]
