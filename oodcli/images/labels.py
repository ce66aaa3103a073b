"""Names or numbers that came with the images → indices of the network's classes.

All or nothing: where one name is not among the network's classes, the set is taken to have classes
of its own and every label is unknown. A silently wrong label would spoil every accuracy after it.
WordNet ids are the exception: a set may hold more than ImageNet's 1,000 classes, so where most ids
are among these, the labels of the others alone are unknown.

Names that are numbers can be read in more than one way. Then ``Labels`` holds all readings, and
``oodcli.stages.labels`` asks the network which one is right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from oodcli.images.words import printable

UNKNOWN = -1
CLASSES_OF_IMAGENET = 1000
_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)
_WNID = re.compile(r"n[0-9]{8}", re.ASCII)
_OVERRIDE = "give --class-names if that is wrong"


@dataclass(frozen=True)
class Labels:
    """One reading of the labels. values: (n,) int64, -1 = unknown. note: what was assumed, for the
    user. others: the other readings that are possible. what, words, option: of a sentence that
    compares readings: what is read, how, and the ``--class-names`` that read it so. by_number: the
    names are class numbers. of_imagenet: it rests on the order of ImageNet's classes."""

    values: Tensor
    note: str | None = None
    others: tuple[Labels, ...] = ()
    what: str = ""
    words: str = ""
    option: str = ""
    by_number: bool = False
    of_imagenet: bool = False

    @property
    def readings(self) -> tuple[Labels, ...]:
        """This one, which is in force until another is chosen, and the others."""
        return (replace(self, others=()), *self.others)

    def at(self, index: Tensor) -> Labels:
        """The labels of rows. index: (N,), for each row its place among ``values``, -1 = none."""
        return replace(
            self,
            values=torch.cat([self.values, torch.tensor([UNKNOWN])])[index],  # -1 finds the last
            others=tuple(other.at(index) for other in self.others),
        )


def unknown(count: int, note: str | None = None) -> Labels:
    """No label for any of ``count`` rows."""
    return Labels(torch.full((count,), UNKNOWN), note)


def match(
    names: Sequence[str],
    class_names: Sequence[str],
    what: str,
    *,
    own: bool = False,
    certain: bool = False,
    numbers: bool = False,
) -> Labels:
    """The class of each of the distinct ``names``: all -1 where they are not the network's.

    Where nobody named the network's classes, as many names as classes are taken in the order
    given. what: for the note, e.g. "sub-folders". own: the names come in an order of their own, by
    which the file or dataset numbers them; otherwise they are sorted as text. certain: that order
    is the one that a training with this dataset has used. numbers: they may be class numbers by
    definition, of which nothing has to be said.
    """
    plain = is_plain(class_names)
    if list(names) == list(class_names):  # also right when two classes share a name
        return Labels(torch.arange(len(names)))
    index = {name: position for position, name in enumerate(class_names)}
    named = len(index) == len(class_names) and all(name in index for name in names)
    if named and not plain:
        return Labels(torch.tensor([index[name] for name in names], dtype=torch.int64))
    in_order = plain and len(names) == len(class_names)
    if not (in_order and certain):
        found = _by_number(names, class_names, what, own, numbers) or _by_wnid(
            names, class_names, what, own
        )
        if found is not None:
            return found
    if in_order:
        last = len(names) - 1
        return Labels(
            torch.arange(len(names)),
            f"the network's classes have no names: {what} read in their order as classes 0 "
            f"({printable(names[0])}) to {last} ({printable(names[-1])}); {_OVERRIDE}",
        )
    strangers = [name for name in names if name not in index] or list(names)
    return unknown(
        len(names),
        f"{what} ({', '.join(printable(name) for name in strangers[:3])}"
        f"{', …' if len(strangers) > 3 else ''}) are not the network's classes: labels unknown",
    )


def _by_number(
    names: Sequence[str], class_names: Sequence[str], what: str, own: bool, usual: bool
) -> Labels | None:
    """Names that are numbers: by value, and where it differs, by their order as text, which is how
    torchvision's ImageFolder numbers folders. None where they are no numbers, or beyond the
    classes."""
    if not names or not all(_NUMBER.fullmatch(name) for name in names):
        return None
    plain, classes = is_plain(class_names), len(class_names)
    values = [int(name) for name in names]
    ordered: Sequence[str] = ()
    if max(values) < classes:
        ordered = [str(number) for number in range(classes)]
        found = values
    elif min(values) == 1 and max(values) == classes:
        ordered = [str(number) for number in range(1, classes + 1)]
        found = [value - 1 for value in values]
    elif plain and len(set(values)) == len(names) == classes:
        ordered = sorted(names, key=int)
        found = [ordered.index(name) for name in names]
    else:
        return None
    as_text: Sequence[str] = sorted(ordered)
    how = "as text, as ImageFolder sorts them"
    if own and len(names) == classes:
        as_text, how = names, "in the order in which they are listed"
    place = {name: number for number, name in enumerate(as_text)}
    place = {name: number for number, name in enumerate(as_text)}
    # "007" is not among them: as text they are in order.
    by_text = [place[name] for name in names] if all(name in place for name in names) else found
    # The first and the last are often the same both ways, so one that is not is shown with them.
    differing = [i for i, pair in enumerate(zip(found, by_text, strict=True)) if len({*pair}) > 1]
    first = _reading("by number", names, found, ordered, differing[:1])
    if found == values and (usual or (plain and list(map(str, values)) == list(names))):
        note = None
    else:
        have = "the network's classes have no names: " if plain else ""
        note = f"{have}{what} read {first.words}; {_OVERRIDE}"
    first = replace(first, note=note, what=what, by_number=True)
    # ImageNet's classes are numbered in one way alone, and classes with names in lists mostly.
    if not differing or (not plain and (usual or of_imagenet(class_names))):
        return first
    other = _reading(how, names, by_text, as_text, differing[:1])
    note = f"{what} are numbers, read {first.words}, not {other.words}; {_OVERRIDE}"
    other = replace(
        other,
        what=what,
        note=f"{what} are numbers, read {other.words}, not {first.words}; {_OVERRIDE}",
    )
    return replace(first, note=note, others=(other,))


def _reading(
    how: str,
    names: Sequence[str],
    found: Sequence[int],
    ordered: Sequence[str],
    more: Sequence[int] = (),
) -> Labels:
    """found: the class of each name. ordered: the name of each class. more: which names to show
    beside those of the first and of the last class."""
    shown = {found.index(min(found)), found.index(max(found)), *more}
    pairs = [
        f"{printable(names[i])} is class {found[i]}" for i in sorted(shown, key=found.__getitem__)
    ]
    option = ",".join(ordered[:4]) + (",…" if len(ordered) > 4 else "")
    return Labels(
        torch.tensor(found, dtype=torch.int64),
        words=f"{how} ({', '.join(pairs)})",
        option=f"--class-names {option}",
    )


def _by_wnid(
    names: Sequence[str], class_names: Sequence[str], what: str, own: bool
) -> Labels | None:
    """WordNet ids, where the network has ImageNet's 1,000 classes: those that are among them, or
    1,000 others in their order. None where most names are no such ids."""
    like = [name for name in names if _WNID.fullmatch(name)]
    if 2 * len(like) <= len(names) or not of_imagenet(class_names):
        return None
    table = wnids()
    found = [table.get(name, UNKNOWN) for name in names]
    known = [number for number in found if number != UNKNOWN]
    if 2 * len(known) > len(names):
        words = _reading("as ImageNet's classes", names, found, ()).words
        strange = [name for name in names if name not in table]
        more = (
            f", but {len(strange)} of {len(names)} ({', '.join(map(printable, strange[:3]))}"
            f"{', …' if len(strange) > 3 else ''}) are not among them: the labels of their images "
            "are unknown"
            if strange
            else ""
        )
        if strange:
            inside = [name for name in names if name in table]
            words = _reading("as ImageNet's classes", inside, known, ()).words
        note = f"{what} read {words}{more}; {_OVERRIDE}"
        return Labels(torch.tensor(found, dtype=torch.int64), note, of_imagenet=True)
    if len(like) == len(names) == CLASSES_OF_IMAGENET and not own:
        note = (
            f"{what} are 1,000 WordNet ids, though not ImageNet's: read in their order as classes "
            f"0 ({names[0]}) to 999 ({names[-1]}); {_OVERRIDE}"
        )
        return Labels(torch.arange(len(names)), note, of_imagenet=True)
    return None


@cache
def wnids() -> dict[str, int]:
    """WordNet id → class of ILSVRC-2012."""
    text = files("oodcli.images").joinpath("ilsvrc2012.txt").read_text(encoding="ascii")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {wnid: number for number, wnid in enumerate(lines)}


@cache
def _categories() -> tuple[str, ...]:
    from oodcli.networks.architectures import categories

    found = categories("torchvision:resnet18", CLASSES_OF_IMAGENET)
    assert found is not None
    return found


def of_imagenet(class_names: Sequence[str]) -> bool:
    """Whether these can be ImageNet's 1,000 classes in their order: without names, or most of them
    with the names that weights of it come with, as a rule the first of several synonyms."""
    if len(class_names) != CLASSES_OF_IMAGENET:
        return False
    if is_plain(class_names) or tuple(class_names) == tuple(wnids()):
        return True
    agree = sum(
        name.partition(",")[0].strip().lower() == known.lower()
        for name, known in zip(class_names, _categories(), strict=True)
    )
    return 2 * agree > CLASSES_OF_IMAGENET


def named(
    names: Sequence[str | None], class_names: Sequence[str], what: str, *, numbers: bool = False
) -> Labels:
    """The label of each row by its class's name, None = unknown. numbers: as of ``match``."""
    distinct = sorted({name for name in names if name is not None})
    if not distinct:
        return unknown(len(names))
    place: dict[str | None, int] = {name: number for number, name in enumerate(distinct)}
    rows = torch.tensor([place.get(name, -1) for name in names], dtype=torch.int64)
    return match(distinct, class_names, what, numbers=numbers).at(rows)


def numbered(labels: Tensor, num_classes: int, what: str, *, exact: bool = False) -> Labels:
    """Labels that are class numbers already, -1 = unknown: kept if all are classes of the network.
    Those that go from 1 to ``num_classes`` are one less, unless they are ``exact``. labels: (N,)
    int64."""
    low, high = int(labels.min()), int(labels.max())
    if low >= UNKNOWN and high < num_classes:
        return Labels(labels)
    least = int(labels[labels != UNKNOWN].min())
    if least == 1 and high == num_classes and not exact:
        return Labels(
            torch.where(labels == UNKNOWN, labels, labels - 1),
            f"{what} go from 1 to {high}: read as the network's classes 0 to {high - 1} in their "
            f"order; {_OVERRIDE}",
        )
    wrong = high if high >= num_classes else low
    return unknown(
        len(labels),
        f"{what} ({wrong}) are not the network's {num_classes} classes: labels unknown",
    )


def written(labels: Sequence[str | None], class_names: Sequence[str], what: str) -> Labels:
    """Labels as text, class names or class numbers, -1 = unknown."""
    known = set(class_names)
    return named(
        [None if label == "-1" and label not in known else label for label in labels],
        class_names,
        what,
        numbers=True,
    )


def by_folder(parents: Sequence[tuple[str, ...]], class_names: Sequence[str]) -> Labels:
    """Labels from sub-folders. parents: the folders above each image, from the root downwards.

    The outermost folders are the classes; where there is one only and it is no class (the root of
    an archive, an ``images`` folder, a number above folders with names of classes), those inside
    it.
    """
    alone: Labels | None = None
    for depth in range(max((len(folders) for folders in parents), default=0)):
        names = [folders[depth] if len(folders) > depth else None for folders in parents]
        labels = named(names, class_names, "sub-folders")
        known = bool((labels.values >= 0).any())
        if alone is not None and (labels.by_number or not known):
            return alone
        if len(set(names)) == 1 and labels.by_number and not is_plain(class_names):
            alone = labels
        elif known or len(set(names)) > 1:
            return labels
    return unknown(len(parents)) if alone is None else alone


def is_plain(class_names: Sequence[str]) -> bool:
    """Whether the classes have no names but their numbers."""
    return all(name == str(position) for position, name in enumerate(class_names))
