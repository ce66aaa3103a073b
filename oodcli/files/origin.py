"""The network that a file belongs to, and the error message if two files belong to different
ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oodcli.errors import FileError, OodcliError

if TYPE_CHECKING:
    from oodcli.networks.preprocessing import Preprocessing

ALIKE = "use the same options or model card for both"
"""Next step for different preprocessing."""


def weights_of(averaged: bool) -> str:
    """Which of a checkpoint's weights are used, as text."""
    return f"{'averaged' if averaged else 'plain'} weights"


@dataclass(frozen=True)
class Words:
    """Parts of the message about a difference: ``{mine} the checkpoint 012…, but {theirs} 345…:
    {hint}``. weights: replaces ``{theirs} its`` before ``plain weights``. inputs: replaces both
    before settings of the preprocessing. hint, inputs_hint: next step for another checkpoint, or
    another preprocessing."""

    mine: str
    theirs: str
    weights: str = ""
    inputs: tuple[str, str] | None = None
    hint: str = "use one checkpoint"
    inputs_hint: str = ALIKE


@dataclass(frozen=True)
class Origin:
    """The network behind a file. averaged, preprocessing: None if unknown, and not compared."""

    checkpoint_sha256: str
    averaged: bool | None = None
    preprocessing: Preprocessing | None = None

    def require_same(
        self, other: Origin, words: Words, *, kind: type[OodcliError] = FileError
    ) -> None:
        """Raises an error of that kind for different checkpoints, weights or preprocessing."""
        mine, theirs = self.checkpoint_sha256, other.checkpoint_sha256
        if mine != theirs:
            raise kind(
                f"{words.mine} the checkpoint {mine[:12]}…, but {words.theirs} {theirs[:12]}…: "
                f"{words.hint}"
            )
        require_same_weights(self.averaged, other.averaged, words, kind=kind)
        if self.preprocessing is None or other.preprocessing is None:
            return
        unlike = self.preprocessing.unlike(other.preprocessing)
        if unlike is not None:
            begins, goes_on = words.inputs or (words.mine, words.theirs)
            raise kind(f"{begins} {unlike[0]}, but {goes_on} {unlike[1]}: {words.inputs_hint}")


def require_same_weights(
    mine: bool | None, theirs: bool | None, words: Words, *, kind: type[OodcliError] = FileError
) -> None:
    """Raises an error of that kind for different weights."""
    if mine is not None and theirs is not None and mine != theirs:
        raise kind(
            f"{words.mine} the {weights_of(mine)} of the checkpoint, but "
            f"{words.weights or f'{words.theirs} its'} {weights_of(theirs)}",
            hint="give --ema to both or to neither",
        )
