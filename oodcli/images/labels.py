"""Names or numbers that came with the images → indices of the network's classes.

All or nothing: where one name is not among the network's classes, the set is taken to have classes
of its own and every label is unknown. A silently wrong label would spoil every accuracy after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oodcli.images.source import printable

UNKNOWN = -1


def match(names: Sequence[str], class_names: Sequence[str], what: str) -> tuple[Tensor, str | None]:
    """The class of each of the distinct ``names``: (len(names),) int64, all -1 where they are not
    the network's; and a note when something was assumed.

    Where nobody named the network's classes, as many names as classes are taken in the order
    given. what: for the note, e.g. "sub-folders".
    """
    if list(names) == list(class_names):  # also right when two classes share a name
        return torch.arange(len(names)), None
    index = {name: position for position, name in enumerate(class_names)}
    if len(index) == len(class_names) and all(name in index for name in names):
        return torch.tensor([index[name] for name in names], dtype=torch.int64), None
    if _plain(class_names) and len(names) == len(class_names):
        last = len(names) - 1
        return torch.arange(len(names)), (
            f"the network's classes have no names: {what} taken in their order as classes 0 "
            f"({printable(names[0])}) to {last} ({printable(names[-1])}); give --class-names if "
            "that is wrong"
        )
    strangers = [name for name in names if name not in index] or list(names)
    return torch.full((len(names),), UNKNOWN), (
        f"{what} ({', '.join(printable(name) for name in strangers[:3])}"
        f"{', …' if len(strangers) > 3 else ''}) are not the network's classes: labels unknown"
    )


def named(
    names: Sequence[str | None], class_names: Sequence[str], what: str
) -> tuple[Tensor, str | None]:
    """The label of each row by its class's name, None = unknown: (N,) int64, and a note."""
    distinct = sorted({name for name in names if name is not None})
    if not distinct:
        return torch.full((len(names),), UNKNOWN), None
    classes, note = match(distinct, class_names, what)
    index: dict[str | None, int] = dict(zip(distinct, classes.tolist(), strict=True))
    return torch.tensor([index.get(name, UNKNOWN) for name in names], dtype=torch.int64), note


def numbered(labels: Tensor, num_classes: int, what: str) -> tuple[Tensor, str | None]:
    """Labels that are class numbers already, -1 = unknown: kept if all are classes of the network.
    labels: (N,) int64."""
    low, high = int(labels.min()), int(labels.max())
    if low >= UNKNOWN and high < num_classes:
        return labels, None
    wrong = high if high >= num_classes else low
    return torch.full_like(labels, UNKNOWN), (
        f"{what} ({wrong}) are not the network's {num_classes} classes: labels unknown"
    )


def written(
    labels: Sequence[str | None], class_names: Sequence[str], what: str
) -> tuple[Tensor, str | None]:
    """Labels as text, class names or class numbers: (N,) int64, and a note."""
    given = {label for label in labels if label is not None}
    if given - set(class_names) and all(_integer(label) for label in given):
        numbers = [UNKNOWN if label is None else int(label) for label in labels]
        # Python's integers have no bound, int64 has: both clip to something that is no class.
        numbers = [min(max(number, -2), 2**62) for number in numbers]
        return numbered(torch.tensor(numbers, dtype=torch.int64), len(class_names), what)
    return named(labels, class_names, what)


def by_folder(
    parents: Sequence[tuple[str, ...]], class_names: Sequence[str]
) -> tuple[Tensor, str | None]:
    """Labels from sub-folders. parents: the folders above each image, from the root downwards.

    The outermost folders are the classes; where there is one only and it is no class (the root of
    an archive, an ``images`` folder), those inside it.
    """
    unknown = torch.full((len(parents),), UNKNOWN)
    for depth in range(max((len(folders) for folders in parents), default=0)):
        names = [folders[depth] if len(folders) > depth else None for folders in parents]
        labels, note = named(names, class_names, "sub-folders")
        if bool((labels >= 0).any()) or len(set(names)) > 1:
            return labels, note
    return unknown, None


def _plain(class_names: Sequence[str]) -> bool:
    return all(name == str(position) for position, name in enumerate(class_names))


def _integer(text: str) -> bool:
    return text.removeprefix("-").isascii() and text.removeprefix("-").isdigit()
