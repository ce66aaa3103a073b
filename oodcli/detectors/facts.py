"""What a detector's class says of it, for the listing and for its page in the docs."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from oodcli.detectors.hyperparameters import hyperparameters
from oodcli.errors import DetectorError

if TYPE_CHECKING:
    from oodcli.detectors.base import Detector


def records(kind: type[Detector]) -> list[str]:
    """What must be recorded to fit and score with the default settings."""
    return sorted(kind.needs | kind.fit_needs())


def fitted_on(kind: type[Detector]) -> str:
    """The images that a detector is fitted on, for a table."""
    if not kind.fitted:
        return "nothing"
    if kind.reference_images is not None:
        return "noise"
    if kind.needs_pool:
        return "virtual images, a matched pool, noise"
    if kind.needs_ood:
        return "ID and OOD images"
    if "layers.sensitivity" in kind.fit_needs():  # measured while images are inverted
        return "virtual images"
    return "virtual or real images" + (", OOD if given" if kind.uses_ood else "")


GROUPS: Mapping[str, str] = {
    "checkpoint": "With a checkpoint alone",
    "virtual": "With virtual images: oodcli invert makes them",
    "real": "With real in-distribution images: virtual ones usually do worse",
    "ood": "With in-distribution and OOD images",
}
"""What one must have for a detector → heading of the listing."""


def group(kind: type[Detector]) -> str:
    """The key of ``GROUPS``: what one must have to use a detector well."""
    if not kind.fitted or kind.reference_images is not None:
        return "checkpoint"
    if kind.needs_ood:
        return "ood"
    return "real" if kind.better_on_real else "virtual"


def selected(
    kinds: Iterable[type[Detector]], needs: Collection[str] = (), search: str = ""
) -> list[type[Detector]]:
    """Detectors of some groups, by default of all, with a word in their name, explanation or
    source. Raises DetectorError for an unknown group, or where none is left."""
    unknown = sorted(set(needs) - set(GROUPS))
    if unknown:
        raise DetectorError(f"--needs {unknown[0]}: expected one of {', '.join(GROUPS)}")
    found = [
        kind
        for kind in kinds
        if (not needs or group(kind) in needs) and search.casefold() in _text(kind).casefold()
    ]
    if not found:
        asked = [f"--needs {each}" for each in needs] + ([f"--search {search}"] if search else [])
        less = "leave out one of them" if asked[1:] else "'oodcli detectors' lists all"
        raise DetectorError(f"no detector matches {' '.join(asked)}: {less}")
    return found


def _text(kind: type[Detector]) -> str:
    return " ".join((kind.name, summary(kind), explanation(kind), kind.source))


def summary(kind: type[Detector]) -> str:
    """What it is, and what supersedes it, for a table."""
    return kind.about + (f"; superseded by {kind.superseded_by}" if kind.superseded_by else "")


def explanation(kind: type[Detector]) -> str:
    """The first paragraph of the class's docstring, on one line; empty without a docstring."""
    text = inspect.cleandoc(vars(kind).get("__doc__") or "").partition("\n\n")[0]
    written = not text.startswith(f"{kind.__name__}(")  # else dataclass has filled it in
    return " ".join(text.split()) if written else ""


def equations(kind: type[Detector]) -> list[str]:
    """The formula as LaTeX, an equation each."""
    return [" ".join(each.split()) for each in kind.formula.split("\n\n") if each.strip()]


def settings(kind: type[Detector]) -> Mapping[str, Mapping[str, Any]]:
    """Key → type in words, default and meaning of each hyper-parameter."""
    return {
        key: {"type": _words(each.type), "default": each.default, "meaning": each.meaning}
        for key, each in hyperparameters(kind).items()
    }


def _words(kind: Any) -> str:
    """``float or auto`` for float | Literal["auto"]; None is not mentioned."""
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    options = [each for each in get_args(kind) or (kind,) if each is not type(None)]
    if len(options) > 1:
        return " or ".join(_words(each) for each in options)
    return _words(options[0]) if options[0] is not kind else str(getattr(kind, "__name__", kind))
