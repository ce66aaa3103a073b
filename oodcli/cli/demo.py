"""``oodcli demo``: the whole pipeline on a bundled data set; the tutorial."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oodcli.cli import console, evaluate, inspect, prepare, score, show
from oodcli.cli.options import Force, Quiet, Verbose

if TYPE_CHECKING:
    from oodcli.api import DemoStep


def command(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for all files.")
    ] = Path("oodcli-demo"),
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole pipeline on a small network trained on digits."""
    from oodcli.cli.library import api

    made = api.demo(output, force=force, watching=console.stage, finished=_print)
    console.say(
        f"\nEverything is in {made.folder}: digits.safetensors.oodcli/virtual.png shows what the "
        "network remembers, photographs.html the most suspicious photographs, report/report.html "
        "compares the detectors, photographs.csv has a score and a verdict for every image."
    )


def _print(step: DemoStep) -> None:
    """As the command itself prints its result."""
    match step.words[0]:
        case "inspect":
            inspect.emit_facts(step.result)
        case "prepare":
            prepare.say(step.result)
        case "score":
            score.say(step.result)
        case "show":
            show.say(step.result)
        case "evaluate":
            evaluate.emit(step.result)
