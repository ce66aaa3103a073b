"""``oodcli inspect``: describe a file; for a checkpoint, list the detectors it allows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oodcli.cli import console
from oodcli.cli.options import Force, Json, ModelOptions, Quiet, Verbose, takes_model

if TYPE_CHECKING:
    from rich.table import Table

    from oodcli.files.describe import Kind


@takes_model
def command(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Checkpoint, virtual images, cache, artefact, scores, metrics or a folder of "
            "prepare.",
        ),
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="CHECKPOINT", help="Checkpoint that FILE should come from; with --verify."
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Recompute the checksums of FILE and print which of them match."
        ),
    ] = False,
    write_card: Annotated[
        bool,
        typer.Option("--write-card", help="Write the findings to the checkpoint's model card."),
    ] = False,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    *,
    model: ModelOptions,
) -> None:
    """Describe a checkpoint or an output of oodcli."""
    from oodcli.cli.facts import facts_table, of_file
    from oodcli.errors import OodcliError
    from oodcli.files.describe import describe_file, kind_of
    from oodcli.files.hub import card_path

    if checkpoint is not None and not verify:
        raise OodcliError(
            f"{checkpoint} is only used with --verify: add --verify, or leave the checkpoint out"
        )
    kind = kind_of(file)
    if write_card and (verify or kind != "checkpoint"):
        raise OodcliError("--write-card needs a checkpoint, and excludes --verify")
    if verify:
        _verify(file, kind, checkpoint, json)
        return
    if kind != "checkpoint":
        found = describe_file(file, kind)
        if json:
            console.emit_json(found)
        else:
            console.emit_table(facts_table(of_file(found)))
        return
    from oodcli.cli.library import api

    card = card_path(file) if write_card else None
    found = api.inspect(model.checkpoint(file), card=card, force=force, **model.running())
    if json:
        console.emit_json(found)
    else:
        emit_facts(found)
    if card is not None:
        console.say(f"wrote {card}")


def _verify(file: Path, kind: Kind, checkpoint: Path | None, json: bool) -> None:
    from oodcli.files.verify import verify

    checks = []
    for what, found in verify(file, kind, checkpoint):
        checks.append({"what": what, "found": found})
        if not json:
            console.emit(console.harmless(f"{what:<12}{found}"))
    if json:
        console.emit_json({"file": str(file), "kind": kind, "checks": checks})


def emit_facts(found: dict[str, Any]) -> None:
    from rich.table import Table

    from oodcli.cli.facts import facts_table, input_of, mean_std

    head, embedding = found["head"], found["embedding"]
    no_head = "none: the last layer is not linear"
    if embedding and not found["retrained_head"]:
        no_head += f"; the embedding is the input of {embedding}"
    names = found["class_names"]
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    facts = {
        "checkpoint": found["checkpoint"],
        "architecture": found["arch"],
        "parameters": f"{found['parameters']:,}",
        "classes": f"{found['num_classes']}: {shown}",
        "input": input_of(found["preprocessing"]),
        "mean, std": mean_std(found["preprocessing"]),
        "BatchNorm": f"{len(found['batchnorm_layers'])} layers with running statistics",
        "head": f"{head['name']}, {head['width']} features"
        if head
        else found["retrained_head"] or no_head,
        "sha256": found["sha256"],
    }
    console.emit_table(facts_table(facts))
    layers = _layers(found["taps"])
    if layers.row_count:
        console.emit("")
        console.emit_table(layers)
    verdicts = Table(box=None, pad_edge=False)
    for column in ("detector", "possible", "how"):
        verdicts.add_column(column, overflow="fold")
    for detector in found["detectors"]:
        how = "fit it first" if detector["fitted"] else "needs no fitting"
        if not detector["allowed"]:
            how = f"lacks {', '.join(detector['lacks'])}"
        verdicts.add_row(detector["name"], "yes" if detector["allowed"] else "no", how)
    console.emit("")
    console.emit_table(verdicts)


def _layers(taps: list[dict[str, Any]]) -> Table:
    """The recorded layers. BatchNorm layers are left out: some networks have hundreds."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("kind")
    table.add_column("channels", justify="right")
    table.add_column("positions", justify="right")
    table.add_column("records")
    for tap in taps:
        if tap["kind"] != "batchnorm":
            records = ", ".join(word.removeprefix("layers.") for word in tap["records"])
            numbers = (str(tap["channels"]), str(tap["positions"]))
            table.add_row(Text(console.harmless(tap["name"])), tap["kind"], *numbers, records)
    return table
