"""What a family of architectures is: one module of this package, and one line in ``FAMILIES``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn


class Family(Protocol):
    """Architectures whose checkpoints have the same keys. A module of this package is one; a new
    one needs these three functions and its usual names in ``architectures.FAMILIES``."""

    def build(self, name: str, num_classes: int, channels: int = 3) -> nn.Module | None:
        """The network of that name with random weights; None where the name is not of this family.
        name: without ``+grey``, which is ``channels`` = 1."""

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict with the keys of the networks that ``build`` makes, from every layout in
        which checkpoints of this family are published."""

    def guess(self, state: Mapping[str, Tensor]) -> tuple[str, int] | None:
        """The name, with ``+grey`` for one input channel, and the number of classes that a state
        dict suggests, in any of its layouts; None where it is of another family. Whether every key
        and shape fits is not asked here: the caller compares."""


def named(
    name: str, state: Mapping[str, Tensor], first: str = "conv1.weight", last: str = "linear.weight"
) -> tuple[str, int] | None:
    """What ``guess`` returns, by the weights of the first convolution and of the last linear layer;
    None where a renamed state dict has no such weights."""
    if first not in state or last not in state:
        return None
    if (state[first].ndim, state[last].ndim) != (4, 2):
        return None
    return name + "+grey" * (state[first].shape[1] == 1), state[last].shape[0]
