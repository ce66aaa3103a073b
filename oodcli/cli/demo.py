"""``oodcli demo``: the whole pipeline on an embedded default; the tutorial."""

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
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where everything goes.")
    ] = Path("oodcli-demo"),
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train on digits, forget the data, and detect what is no digit."""
    from oodcli.errors import FileError
    from oodcli.files.atomic import make_folder

    if output.exists() and not force:
        raise FileError(f"{output} exists: choose another -o, or overwrite it with --force")
    with make_folder(output):
        _prepare(output)
    checkpoint, virtual, cache = (
        str(output / name)
        for name in ("digits.safetensors", "digits.virtual.h5", "digits.features.h5")
    )
    artefacts = output / "detectors"
    detectors = [
        word
        for name in (
            artefacts / "c2ir.safetensors",
            artefacts / "c2ir-z.safetensors",
            "msp",
            "energy",
            "odin",
        )
        for word in ("-d", str(name))
    ]
    sets = {
        "photographs": str(output / "photographs"),
        "noise": "noise:uniform?n=500",
        "blobs": "noise:blob?n=500",
    }

    volume = ["--quiet"] if quiet else ["--verbose"] if verbose else []

    def run(story: str, *words: str) -> None:
        _run(story, [*words, *(["--force"] if force else [])], volume)

    run("What is this checkpoint?", "inspect", checkpoint)
    run(
        "Recall images of every class from it.",
        "invert",
        checkpoint,
        "--per-class",
        "30",
        "--no-mirror",
        "-o",
        virtual,
    )
    run("What does the network make of them?", "extract", checkpoint, virtual, "-o", cache)
    run(
        "Fit two detectors on that; no real image was used.",
        "fit",
        cache,
        "-d",
        "c2ir",
        "-d",
        "c2ir-z",
        "-o",
        str(artefacts),
    )
    run(
        "Score digits that the network has not seen,",
        "score",
        checkpoint,
        str(output / "digits-test.npz"),
        *detectors,
        "-o",
        str(output / "digits.csv"),
    )
    for name, images in sets.items():
        run(
            f"and what is no digit: {name}.",
            "score",
            checkpoint,
            images,
            *detectors,
            "-o",
            str(output / f"{name}.csv"),
        )
    ood = [word for name in sets for word in ("--ood", f"{name}={output / name}.csv")]
    run(
        "How well do the scores tell them apart?",
        "evaluate",
        "--id",
        str(output / "digits.csv"),
        *ood,
        "-o",
        str(output / "report"),
    )
    console.say(
        f"\nEverything is in {output}: the contact sheet digits.virtual.png shows what the network "
        "remembers, report/report.html what the detectors can do, photographs.csv a score for "
        "every image."
    )


def _prepare(output: Path) -> None:
    import numpy as np
    from safetensors.torch import save_file

    from oodcli.files.atomic import atomic
    from oodcli.stages.demo import CARD, EPOCHS, TRAINED_ON, digits, photograph_crops, train

    images, labels = digits()
    console.say(f"Training a small network on {TRAINED_ON} of scikit-learn's digits.")
    with console.progress(EPOCHS * TRAINED_ON, "train", EPOCHS) as advance:
        state = train(images[:TRAINED_ON], labels[:TRAINED_ON], advance)
    console.lap("training")
    with atomic(output / "digits.safetensors", force=True) as partial:
        save_file(state, partial)
    (output / "digits.toml").write_text(CARD, encoding="utf-8")
    np.savez_compressed(
        output / "digits-test.npz",
        images=images[TRAINED_ON:],
        labels=labels[TRAINED_ON:],
        classes=np.array([str(index) for index in range(10)]),
    )
    count = photograph_crops(output / "photographs")
    console.say(
        f"Wrote {output}: the checkpoint digits.safetensors and its model card, "
        f"{len(labels) - TRAINED_ON} held-out digits, {count} crops of photographs."
    )


def _run(story: str, words: list[str], volume: list[str]) -> None:
    """Runs a command as a user would, after printing it."""
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
