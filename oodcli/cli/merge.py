"""``oodcli merge``: merge the shards of a job into one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oodcli.cli import console, verdicts
from oodcli.cli.options import Force, Json, MaxOodFraction, Quiet, Verbose


def command(
    shards: Annotated[
        list[Path],
        typer.Argument(
            metavar="SHARD",
            help="Every file that invert, extract or score wrote with --shard, in any order.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Merged file.")],
    max_ood_fraction: MaxOodFraction = None,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Merge the outputs of sharded jobs."""
    from oodcli.cli.library import api

    with console.stage("merge") as progress:
        merged = api.merge(
            shards,
            output,
            with_verdicts=max_ood_fraction is not None,
            force=force,
            progress=progress,
            command=console.command_line(),
        )
    if json:
        console.emit_json(merged.about)
    unreadable = verdicts.counted((merged.unreadable, "unreadable"), before=", ")
    console.say(f"wrote {output}: {merged.rows} rows of {merged.shards} shards{unreadable}")
    for name, share in merged.ood_fraction.items():
        console.say(f"{name}: {share:.1%} OOD{verdicts.without(merged.unjudged.get(name, 0))}")
    verdicts.say_left_out(merged.left_out)
    if verdicts.gate_failed(merged.doubts, max_ood_fraction):
        raise typer.Exit(4)
    if merged.unreadable:
        raise typer.Exit(3)
