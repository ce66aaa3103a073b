"""``oodcli fit``: detectors from a cache."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oodcli.cli import console, details
from oodcli.cli.options import (
    Force,
    Json,
    Parameters,
    Quiet,
    Verbose,
    complete_detectors,
    parameters,
)

if TYPE_CHECKING:
    from oodcli.detectors.base import Detector
    from oodcli.files.artefact import Artefact
    from oodcli.stages.fit import FitInputs


def command(
    cache: Annotated[
        Path | None,
        typer.Argument(
            metavar="CACHE.h5",
            help="Made by extract. Not needed to calibrate detectors that need no fitting.",
            show_default=False,
        ),
    ] = None,
    detector: Annotated[
        list[str] | None,
        typer.Option(
            "--detector",
            "-d",
            metavar="NAME|FILE",
            help="A detector's name, an artefact's path, or FILE.py:CLASS, one of your own; 'all' "
            "for every one that can be fitted on CACHE.h5. Repeatable.",
            autocompletion=complete_detectors,
            show_default=False,
        ),
    ] = None,
    param: Parameters = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="F.h5",
            help="Rows for the verdicts of score --fpr: real images, virtual ones matched to the "
            "published accuracy, or (repeated) both.",
            show_default="every fifth row (at most 5,000), where CACHE.h5 holds real images",
        ),
    ] = None,
    ood: Annotated[
        Path | None,
        typer.Option(
            metavar="F.h5", help="OOD rows, for detectors that learn from them.", show_default=False
        ),
    ] = None,
    noise: Annotated[
        Path | None,
        typer.Option(
            metavar="F.h5",
            help="Rows of noise, for 1c-sum, c2ir-peak, duo and trio; the others are fitted on "
            "CACHE.h5.",
            show_default=False,
        ),
    ] = None,
    labelled: Annotated[
        Path | None,
        typer.Option(
            metavar="F.csv",
            help="Columns path and ood (0 or 1): rows of CACHE.h5 that somebody marked.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the artefacts go.")
    ] = Path("detectors"),
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fit and calibrate detectors on virtual or real images."""
    from oodcli import detectors
    from oodcli.detectors.hyperparameters import parse
    from oodcli.errors import DetectorError
    from oodcli.files.artefact import read_artefact
    from oodcli.files.atomic import make_folder
    from oodcli.files.cache import open_cache
    from oodcli.files.marks import read_marks
    from oodcli.stages.chosen import is_artefact
    from oodcli.stages.fit import FitInputs, fit_to_folder

    given = parameters(param)
    with ExitStack() as stack:
        inputs = FitInputs(
            train=None if cache is None else stack.enter_context(open_cache(cache)),
            calibrate=[stack.enter_context(open_cache(path)) for path in calibrate or []],
            ood=None if ood is None else stack.enter_context(open_cache(ood)),
            labelled=None if labelled is None else read_marks(labelled),
            noise=None if noise is None else stack.enter_context(open_cache(noise)),
        )
        names = list(dict.fromkeys(detector or ()))
        everything = names == ["all"]
        if everything:
            names = _possible(inputs, given)
        if not names:
            raise DetectorError(
                "nothing to fit: name detectors with -d ('oodcli detectors' lists them)"
            )
        found = {word: detectors.find(word) for word in names if not is_artefact(word)}
        artefacts = {word: read_artefact(Path(word)) for word in names if word not in found}
        given_fitted = {each.detector.name for each in artefacts.values()}
        found = {  # beside an artefact of it, FILE.py:CLASS is only the artefact's code
            word: kind
            for word, kind in found.items()
            if not (detectors.is_code(word) and kind.name in given_fitted)
        }
        either: dict[str, type[Detector] | Artefact] = {**found, **artefacts}
        chosen = [either[word] for word in names if word in either]
        kinds = {kind.name: kind for kind in found.values()}
        unused = sorted(given.keys() - kinds.keys())
        if unused:
            raise DetectorError(f"-p {unused[0]}.…: {unused[0]} is not among -d")
        if noise is not None and not any(map(_takes_noise, kinds.values())):
            raise DetectorError(f"--noise {noise}: none of {', '.join(names)} is fitted on noise")
        hyperparameters = {name: parse(kind, given.get(name, {})) for name, kind in kinds.items()}
        details.say_fit(inputs, chosen, hyperparameters)
        console.lap("caches")
        with make_folder(output), console.steps(len(chosen), "fit", "detectors") as advance:
            summary = fit_to_folder(
                inputs,
                chosen,
                hyperparameters,
                output,
                command=console.command_line(),
                leave_out=everything,
                force=force,
                progress=advance,
            )
    console.lap("fitting")
    if json:
        console.emit_json(summary)
    failed = [each for each in summary if each["file"] is None]
    for each in summary:
        console.say(
            f"{each['detector']} is not fitted: {each['reason']}"
            if each["file"] is None
            else _sentence(each)
        )
    if failed:
        raise typer.Exit(3)


def _takes_noise(kind: type[Detector]) -> bool:
    return kind.reference_images is not None or kind.noise_images is not None


def _possible(inputs: FitInputs, given: dict[str, dict[str, str]]) -> list[str]:
    """Detectors that can be fitted on the cache as it is, without more files; what the others lack
    is said."""
    from oodcli import detectors
    from oodcli.detectors.hyperparameters import parse

    if inputs.train is None:
        return []
    recorded = inputs.train.recorded
    possible, lacking = [], []
    for kind in map(detectors.get, detectors.names()):
        if not kind.fitted:
            continue
        needs = kind.fit_needs(**parse(kind, given.get(kind.name, {})))
        if kind.reference_images is not None and inputs.noise is None:
            lacking.append(f"{kind.name} (--noise; score fits it on the spot)")
        elif kind.noise_images is not None and inputs.noise is None:
            lacking.append(f"{kind.name} (--noise)")
        elif kind.needs_pool and not inputs.calibrate:
            lacking.append(f"{kind.name} (--calibrate)")
        elif kind.needs_ood and inputs.ood is None:
            lacking.append(f"{kind.name} (--ood)")
        elif not needs <= recorded:
            lacking.append(f"{kind.name} ({', '.join(sorted(needs - recorded))})")
        else:
            possible.append(kind.name)
    if lacking:
        console.say(f"note: left out, with what they lack: {', '.join(lacking)}")
    return possible


def _sentence(artefact: dict[str, Any]) -> str:
    fitted_on = artefact["fitted_on"]
    words = [f"wrote {artefact['file']}"]
    if "rows" in fitted_on:
        words.append(f"fitted on {fitted_on['rows']} {fitted_on['kind']} images")
    if fitted_on.get("ood"):
        words.append(f"and on OOD images ({fitted_on['ood']})")
    if artefact["calibrated_on"]:
        low, high = artefact["achieved_at_0.05"]
        words.append(
            f"calibrated on {artefact['calibrated_on']} (p-values from "
            f"{artefact['resolution']:.2g}; a nominal 5 % achieves {low:.1%} to {high:.1%})"
        )
    if artefact["threshold"] is not None:
        words.append(f"labelled rows part at {artefact['threshold']:.6g}")
    return ": ".join([words[0], ", ".join(words[1:])]) if len(words) > 1 else words[0]
