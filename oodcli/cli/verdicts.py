"""Lines that score and merge print about verdicts and rows without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from oodcli.cli import console

if TYPE_CHECKING:
    from oodcli.api import Doubts


def counted(*counts: tuple[int, str], before: str = "; ") -> str:
    """``; 3 unreadable, 1 without …``; counts of zero are left out, and with them the text."""
    found = ", ".join(f"{count} {what}" for count, what in counts if count)
    return before + found if found else ""


def without(count: int) -> str:
    """The number of scored images without a verdict, to print after the share of OOD ones."""
    return f" of those with a verdict, {count} without" if count else ""


def say_left_out(left_out: Mapping[str, int]) -> None:
    """Print how many files were not read as images."""
    from oodcli.api import listed

    if left_out:
        count = sum(left_out.values())
        files = "1 file" if count == 1 else f"{count} files"
        console.say(f"{files} left out: no suffix of an image ({listed(left_out)})")


def gate_failed(found: Mapping[str, Doubts], most: float | None) -> bool:
    """Whether by any detector more than the share ``most`` of the images are OOD or without a
    verdict; prints the reason."""
    failed = {name: each for name, each in found.items() if most is not None and each.share > most}
    for name, each in failed.items():
        console.say(
            f"gate failed: {each.share:.1%} are not known to be in-distribution by {name}, more "
            f"than {most:.1%} ({each.words})"
        )
    return bool(failed)
