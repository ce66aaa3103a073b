"""Of which network a file tells, and the sentence where two files tell of different ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oodcli.errors import FileError, OodcliError

if TYPE_CHECKING:
    from oodcli.networks.preprocessing import Preprocessing

ALIKE = "use the same options or model card for both"
"""What to do about different preprocessing."""


def weights_of(averaged: bool) -> str:
    """Which of a checkpoint's weights were taken, in words."""
    return f"{'averaged' if averaged else 'plain'} weights"


@dataclass(frozen=True)
class Words:
    """How the sentence on a difference begins and goes on: ``{mine} the checkpoint 012…, but
    {theirs} 345…: {hint}``. weights: in place of ``{theirs} its`` before ``plain weights``.
    inputs: in place of both before settings of the preprocessing. hint, inputs_hint: what to do
    about another checkpoint, or another preprocessing."""

    mine: str
    theirs: str
    weights: str = ""
    inputs: tuple[str, str] | None = None
    hint: str = "use one checkpoint"
    inputs_hint: str = ALIKE


@dataclass(frozen=True)
class Origin:
    """The network that something was made with. averaged, preprocessing: None where that is not
    known, and not compared."""

    checkpoint_sha256: str
    averaged: bool | None = None
    preprocessing: Preprocessing | None = None

    def require_same(
        self, other: Origin, words: Words, *, kind: type[OodcliError] = FileError
    ) -> None:
        """Raises an error of that kind where the two are of different checkpoints, weights or
        preprocessing."""
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
    """The same of the weights alone."""
    if mine is not None and theirs is not None and mine != theirs:
        raise kind(
            f"{words.mine} the {weights_of(mine)} of the checkpoint, but "
            f"{words.weights or f'{words.theirs} its'} {weights_of(theirs)}",
            hint="give --ema to both or to neither",
        )
