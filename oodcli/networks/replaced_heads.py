"""Heads that a fine-tuned network has in another place than the architecture: a Dropout before the
linear layer, a framework's ``head.fc`` beside ``backbone.``, and heads that only training uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from oodcli.networks.state_dict import some_of

HEADS = ("fc", "head", "heads", "classifier", "linear", "cls_head")
"""What the head of the classes is called, where others are beside it."""


class Fitted(NamedTuple):
    """A state dict with its head under the architecture's name. notes: what was assumed."""

    state: dict[str, Tensor]
    notes: tuple[str, ...]


def fit_head(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Fitted | None:
    """The state dict with its one linear layer of the backbone's width under the name of the
    architecture's head, and without the layers of other heads. None where the rest differs in its
    names, or several layers could be the head. expected: the architecture's, for any number of
    classes; shapes of the rest are not compared."""
    missing = [k for k in expected if k not in given and not k.endswith("num_batches_tracked")]
    extra = [k for k in given if k not in expected]
    matrices = [k for k in expected if k.endswith("weight") and expected[k].ndim == 2]
    if not extra or not matrices or any(given[key].ndim > 2 for key in extra):
        return None
    head = matrices[-1].removesuffix("weight")
    own = [key for key in (f"{head}weight", f"{head}bias") if key in expected]
    shared = {_top(key) for key in given if key in expected}
    if any(_top(key) in shared and not key.startswith(head) for key in extra):
        return None  # of a deeper network, perhaps
    if not missing:
        return _without(given, extra, len(given[own[0]]))
    if missing != own:
        return None
    width = expected[own[0]].shape[1]
    fitting = [
        key.removesuffix("weight")
        for key in extra
        if key.endswith("weight") and given[key].ndim == 2 and given[key].shape[1] == width
    ]
    alone = [name for name in fitting if _alone(name, head, extra, len(own))]
    named = [name for name in alone if _top(name) in (*HEADS, _top(head))]
    chosen = alone if len(alone) == 1 else named
    if len(chosen) != 1:
        return None
    (name,) = chosen
    taken = {f"{name}{key.removeprefix(head)}": key for key in own}
    state = {taken.get(key, key): value for key, value in given.items()}
    found = _without(state, [k for k in extra if k not in taken], len(state[own[0]]))
    note = f"using {name.rstrip('.')} as the head, {head.rstrip('.')}"
    return found and Fitted(found.state, (note, *found.notes))


def _without(given: Mapping[str, Tensor], extra: list[str], classes: int) -> Fitted | None:
    """The state dict without these; None where one of them works on the head's outputs."""
    if any(given[key].ndim == 2 and given[key].shape[1] == classes for key in extra):
        return None
    notes = (f"{some_of(extra)} part of another head and ignored",) if extra else ()
    return Fitted({k: v for k, v in given.items() if k not in extra}, notes)


def _alone(name: str, head: str, extra: list[str], count: int) -> bool:
    """Whether a linear layer is a head by itself, and not the first layer of one."""
    whole = head if name.startswith(head) else f"{_top(name)}."
    return sum(key.startswith(whole) for key in extra) == count


def _top(key: str) -> str:
    return key.partition(".")[0]
