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
        f"\nEverything is in {output}: the contact sheet digits.virtual.png shows what the network "
        "remembers, report/report.html compares the detectors, photographs.csv has a score for "
        "every image."
    )


def _pipeline(output: Path) -> list[tuple[str, list[str]]]:
    """Questions, and the commands that answer them."""
    checkpoint, virtual, cache = (
        str(output / name)
        for name in ("digits.safetensors", "digits.virtual.h5", "digits.features.h5")
    )
    artefacts = output / "detectors"
    fitted = (artefacts / "c2ir.safetensors", artefacts / "c2ir-z.safetensors")
    detectors = [word for each in (*fitted, "msp", "energy", "odin") for word in ("-d", str(each))]
    recall = ("invert", checkpoint, "--per-class", "30", "--no-mirror", "-o", virtual)
    fit = ("fit", cache, "-d", "c2ir", "-d", "c2ir-z", "-o", str(artefacts))
    sets = {
        "photographs": str(output / "photographs"),
        "noise": "noise:uniform?n=500",
        "blobs": "noise:blob?n=500",
    }

    def score(images: str, name: str) -> list[str]:
        return ["score", checkpoint, images, *detectors, "-o", str(output / f"{name}.csv")]

    ood = [word for name in sets for word in ("--ood", f"{name}={output / name}.csv")]
    scores = ("evaluate", "--id", str(output / "digits.csv"), *ood)
    return [
        ("What is this checkpoint?", ["inspect", checkpoint]),
        ("Invert it: recall images of every class.", list(recall)),
        (
            "Record the network's activations on them.",
            ["extract", checkpoint, virtual, "-o", cache],
        ),
        ("Fit two detectors on the recording. No real image is used.", list(fit)),
        (
            "Score digits that the network has not seen.",
            score(str(output / "digits-test.npz"), "digits"),
        ),
        *(
            (f"Score images that are not digits: {name}.", score(images, name))
            for name, images in sets.items()
        ),
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
