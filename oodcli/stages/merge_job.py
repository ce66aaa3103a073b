"""Shards of a job to one file: the whole of ``oodcli merge``."""

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
    """The whole. rows, unreadable: of all shards. unjudged: detector → rows without a verdict.
    ood_fraction: detector → share of the rows with one. left_out: suffix → files that are no
    images. doubts: as of ``Scored``. about: everything that is known of it, by name."""

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
    """Writes the file that the job would have made in one. with_verdicts: raises OodcliError when
    the shards have none."""
    refuse_existing(output, force=force)
    read_made(output)  # raises where what is beside it is somebody else's
    if not shards:
        raise OodcliError("no shard: give all files that were made with --shard")
    parts = parts_of(shards)
    notes.done(log, "the shards")
    rows = parts[0].shard.rows
    if with_verdicts and not parts[0].flags:
        raise OodcliError(
            "--max-ood-fraction counts verdicts, and these shards have none: score with --fpr or "
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
