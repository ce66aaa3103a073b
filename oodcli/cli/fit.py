"""``oodcli fit``: detectors from a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oodcli.cli import console
from oodcli.cli.options import Detectors, Force, Json, Parameters, Quiet, parameters


def command(
    cache: Annotated[
        Path,
        typer.Argument(metavar="CACHE.h5", help="Made by extract.", show_default=False),
    ],
    detector: Detectors = None,
    param: Parameters = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the artefacts go.")
    ] = Path("detectors"),
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Fit detectors on the features of virtual or real images."""
    from oodcli import detectors
    from oodcli.errors import DetectorError
    from oodcli.files.atomic import make_folder
    from oodcli.files.cache import open_cache
    from oodcli.stages import fit_to_folder

    names = list(dict.fromkeys(detector or ()))
    given = parameters(param)
    with open_cache(cache) as opened:
        if names == ["all"]:
            kinds = [detectors.get(name) for name in detectors.names()]
            names = [
                kind.name
                for kind in kinds
                if kind.fitted
                and kind.fit_needs(**kind.parse(given.get(kind.name, {}))) <= opened.recorded
            ]
        if not names:
            raise DetectorError(
                "nothing to fit: name detectors with -d ('oodcli detectors' lists them)"
            )
        chosen = [detectors.get(name) for name in names]
        unused = sorted(given.keys() - set(names))
        if unused:
            raise DetectorError(f"-p {unused[0]}.…: {unused[0]} is not among -d")
        hyperparameters = {kind.name: kind.parse(given.get(kind.name, {})) for kind in chosen}
        with make_folder(output):
            summary = fit_to_folder(opened, chosen, hyperparameters, output, force=force)
    if json:
        console.emit_json(summary)
    for artefact in summary:
        fitted_on = artefact["fitted_on"]
        console.say(
            f"wrote {artefact['file']}: fitted on {fitted_on['rows']} {fitted_on['kind']} images"
        )
