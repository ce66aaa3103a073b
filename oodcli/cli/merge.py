"""``oodcli merge``: the shards of a job to one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oodcli.cli import console, verdicts
from oodcli.cli.options import Force, Json, Quiet, Verbose


def command(
    shards: Annotated[
        list[Path],
        typer.Argument(
            metavar="SHARD",
            help="All files that invert, extract or score made with --shard, in any order.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The whole.", show_default=False)],
    max_ood_fraction: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=1,
            help="Exit with 4 when by any detector more than this share is OOD, without a verdict, "
            "unreadable or left out.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Put together what several jobs made with --shard."""
    from oodcli.errors import OodcliError
    from oodcli.files.atomic import refuse_existing
    from oodcli.files.made import read_made
    from oodcli.stages.merge import merge_to_file, parts_of
    from oodcli.stages.score import doubts

    refuse_existing(output, force=force)
    read_made(output)  # raises where what is beside it is somebody else's
    parts = parts_of(shards)
    console.lap("the shards")
    rows = parts[0].shard.rows
    if max_ood_fraction is not None and not parts[0].flags:
        raise OodcliError(
            "--max-ood-fraction counts verdicts, and these shards have none: score with --fpr or "
            "--threshold"
        )
    with console.progress(rows, "merge") as advance:
        summary = merge_to_file(
            parts, output, console.command_line(), force=force, progress=advance
        )
    console.lap("merging")
    flagged, unjudged = summary.get("flagged", {}), summary.get("unjudged", {})
    left_out = summary.get("left_out", {})
    scored = rows - summary["unreadable"]
    fractions = {
        name: count / max(scored - unjudged.get(name, 0), 1) for name, count in flagged.items()
    }
    if json:
        console.emit_json({**summary, "ood_fraction": fractions})
    console.say(
        f"wrote {output}: {rows} rows of {len(parts)} shards, {summary['unreadable']} unreadable"
    )
    for name, share in fractions.items():
        console.say(f"{name}: {share:.1%} OOD{verdicts.without(unjudged.get(name, 0))}")
    verdicts.say_left_out(left_out)
    found = doubts(rows, summary["unreadable"], flagged, unjudged, left_out)
    if verdicts.gate_failed(found, max_ood_fraction):
        raise typer.Exit(4)
    if summary["unreadable"]:
        raise typer.Exit(3)
