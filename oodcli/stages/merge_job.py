"""``oodcli merge``: merge the shards of a job into one file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oodcli import notes
from oodcli.errors import OodcliError
from oodcli.files.atomic import refuse_existing
from oodcli.files.made import read_made
from oodcli.stages.merge import merge_to_file, parts_of
from oodcli.stages.score import Doubts, doubts
from oodcli.stages.watching import Watch, watched

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """Summary of the merged file. rows, unreadable: totals of all shards. unjudged: detector → rows
    without a verdict. ood_fraction: detector → share of OOD rows among those with a verdict.
    left_out: suffix → number of files that are not images. doubts: as in ``Scored``. about: its
    metadata."""

    file: Path
    shards: int
    rows: int
    unreadable: int
    unjudged: Mapping[str, int]
    ood_fraction: Mapping[str, float]
    left_out: Mapping[str, int]
    doubts: Mapping[str, Doubts]
    about: Mapping[str, Any]


def merge(
    shards: Sequence[Path],
    output: Path,
    *,
    with_verdicts: bool = False,
    force: bool = False,
    watch: Watch | None = None,
    command: str = "",
) -> Merged:
    """Write the file that the whole job would have written. with_verdicts: raise OodcliError if the
    shards have no verdicts."""
    refuse_existing(output, force=force)
    read_made(output)  # raises if the file beside it is not ours
    if not shards:
        raise OodcliError("no shards: give every file that was written with --shard")
    parts = parts_of(shards)
    notes.done(log, "the shards")
    rows = parts[0].shard.rows
    if with_verdicts and not parts[0].flags:
        raise OodcliError(
            "--max-ood-fraction counts verdicts, but these shards have none: score with --fpr or "
            "--threshold"
        )
    summary = merge_to_file(parts, output, command, force=force, progress=watched(watch, rows))
    notes.done(log, "merging")
    flagged, unjudged = summary.get("flagged", {}), summary.get("unjudged", {})
    left_out, unreadable = summary.get("left_out", {}), summary["unreadable"]
    scored = rows - unreadable
    fractions = {
        name: count / max(scored - unjudged.get(name, 0), 1) for name, count in flagged.items()
    }
    return Merged(
        file=output,
        shards=len(parts),
        rows=rows,
        unreadable=unreadable,
        unjudged=unjudged,
        ood_fraction=fractions,
        left_out=left_out,
        doubts=doubts(rows, unreadable, flagged, unjudged, left_out),
        about={**summary, "ood_fraction": fractions},
    )
