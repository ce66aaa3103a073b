"""What score and merge say of verdicts, and of what has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from oodcli.cli import console

if TYPE_CHECKING:
    from oodcli.api import Doubts


def without(count: int) -> str:
    """After a share of verdicts: how many scored images have none."""
    return f" of those with a verdict, {count} without" if count else ""


def say_left_out(left_out: Mapping[str, int]) -> None:
    """Which files are no rows."""
    from oodcli.api import listed

    if left_out:
        count = sum(left_out.values())
        files = "1 file" if count == 1 else f"{count} files"
        console.say(f"{files} left out, not images by their suffix ({listed(left_out)})")


def gate_failed(found: Mapping[str, Doubts], most: float | None) -> bool:
    """Whether more of the images than the share ``most`` are not known to be in-distribution, by
    any detector; the reason is said."""
    failed = {name: each for name, each in found.items() if most is not None and each.share > most}
    for name, each in failed.items():
        console.say(
            f"gate failed: {each.share:.1%} are not known to be in-distribution by {name}, more "
            f"than {most:.1%} ({each.words})"
        )
    return bool(failed)
