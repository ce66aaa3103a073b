"""``oodcli demo``: the whole pipeline on a bundled data set; the tutorial."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from oodcli.cli import console
from oodcli.cli.options import Force, Quiet, Verbose


def command(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for all files.")
    ] = Path("oodcli-demo"),
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole pipeline on a small network trained on digits."""
    from oodcli.errors import FileError
    from oodcli.files.atomic import make_folder

    if output.exists() and not force:
        raise FileError(f"{output} exists: choose another -o, or overwrite it with --force")
    with make_folder(output):
        _prepare(output)
    volume = ["--quiet"] if quiet else ["--verbose"] if verbose else []
    for story, words in _pipeline(output):
        _run(story, [*words, *(["--force"] if force else [])], volume)
    console.say(
        f"\nEverything is in {output}: digits.safetensors.oodcli/virtual.png shows what the "
        "network remembers, photographs.html the most suspicious photographs, report/report.html "
        "compares the detectors, photographs.csv has a score and a verdict for every image."
    )


ACCURACY = "0.99"
"""What the network would have been published with."""

DETECTORS = ("c2ir-peak", "c2ir-z", "knn", "energy", "msp")


def _pipeline(output: Path) -> list[tuple[str, list[str]]]:
    """Questions, and the commands that answer them."""
    checkpoint = str(output / "digits.safetensors")
    how = ["--accuracy", ACCURACY, "--no-mirror"]
    detectors = [word for name in DETECTORS for word in ("-d", name)]
    sets = {
        "photographs": str(output / "photographs"),
        "noise": "noise:uniform?n=500",
        "blobs": "noise:blob?n=500",
    }

    def score(images: str, name: str) -> list[str]:
        to = ["--fpr", "0.05", "-o", str(output / f"{name}.csv")]
        return ["score", checkpoint, images, *detectors, *to]

    ood = [word for name in sets for word in ("--ood", f"{name}={output / name}.csv")]
    scores = ["evaluate", "--id", str(output / "digits.csv"), *ood]
    return [
        ("What is this checkpoint?", ["inspect", checkpoint]),
        (
            "Prepare it: virtual images, detectors and their calibration. No real image is used.",
            ["prepare", checkpoint, *how],
        ),
        (
            "Score digits that the network has not seen.",
            score(str(output / "digits-test.npz"), "digits"),
        ),
        *(
            (f"Score images that are not digits: {name}.", score(images, name))
            for name, images in sets.items()
        ),
        ("Look at the photographs.", ["show", str(output / "photographs.csv")]),
        ("How well do the scores separate them?", [*scores, "-o", str(output / "report")]),
    ]


def _prepare(output: Path) -> None:
    from oodcli.stages.demo import EPOCHS, TRAINED_ON, write_data

    console.say(f"Training a small network on {TRAINED_ON} of scikit-learn's digits.")
    with console.progress(EPOCHS * TRAINED_ON, "train", EPOCHS) as advance:
        held_out, crops = write_data(output, advance)
    console.say(
        f"Wrote {output}: the checkpoint digits.safetensors and its model card, "
        f"{held_out} held-out digits, {crops} crops of photographs."
    )


def _run(story: str, words: list[str], volume: list[str]) -> None:
    """Print a command, then run it as a user would."""
    from oodcli.cli import app

    console.say(f"\n# {story}\n$ {shlex.join(['oodcli', *words])}")
    given = sys.argv
    sys.argv = ["oodcli", *words]  # what the files record as their command
    try:
        status = app([*words, *volume], standalone_mode=False)
    finally:
        sys.argv = given
    if status:  # 130 when it was interrupted
        raise typer.Exit(status)
