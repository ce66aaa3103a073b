"""Which part of a job this process does: --shard, or torchrun's processes together."""

from __future__ import annotations

from oodcli.cli import console
from oodcli.errors import OodcliError
from oodcli.jobs.shards import Share
from oodcli.jobs.torchrun import Team


def part(shard: str | None, images: str | None = None) -> tuple[Share, Team | None]:
    """What ``--shard`` says, and who shares the job. All but the first process are quiet, but for
    errors. Raises OodcliError when the two are given together, or when images are to be listed on a
    standard input that no process has."""
    share = Share.parse(shard)
    team = Team.assemble()
    if team is None:
        return share, None
    console.who = f"rank {team.rank}"
    if not team.leads:
        console.quiet = True
    if shard is not None:
        raise OodcliError(
            f"--shard {shard} is for jobs without a launcher: torchrun's processes share the work "
            "by themselves"
        )
    if images == "-":
        raise OodcliError(
            "-: torchrun's processes have no standard input of their own: give a file with the list"
        )
    return share, team
