"""``oodcli detectors``: the list of detectors, and what each of them is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from oodcli.cli import completions, console
from oodcli.cli.facts import facts_table
from oodcli.cli.options import Json

if TYPE_CHECKING:
    from oodcli.detectors.base import Detector


def _complete(incomplete: str) -> list[str]:
    from oodcli import detectors

    return completions.words(*detectors.names())(incomplete)


def command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="Detectors to describe with their settings: names, or FILE.py:CLASS for your own. "
            "By default all are listed.",
            autocompletion=_complete,
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List every detector with its source and its needs."""
    from oodcli import detectors

    kinds = [detectors.find(name) for name in names or detectors.names()]
    if json:
        console.emit_json([_as_json(kind) for kind in kinds])
    elif names:
        for index, kind in enumerate(kinds):
            if index:
                print()
            _describe(kind)
    else:
        _list(kinds)


def _as_json(kind: type[Detector]) -> dict[str, Any]:
    from oodcli.detectors import facts

    return {
        "name": kind.name,
        "source": kind.source,
        "needs": facts.records(kind),
        "fitted": kind.fitted,
        "fitted_on": facts.fitted_on(kind),
        "about": kind.about,
        "explanation": facts.explanation(kind),
        "formula": facts.equations(kind),
        "settings": facts.settings(kind),
    }


def _list(kinds: list[type[Detector]]) -> None:
    from rich.table import Table

    from oodcli.detectors import facts

    table = Table(box=None, pad_edge=False)
    for column, width in (("name", None), ("fitted on", 10), ("needs", 17), ("about", None)):
        table.add_column(column, overflow="fold", width=width)
    for kind in kinds:
        needs = " ".join(facts.records(kind))
        source = f" ({kind.source})" if kind.source else ""
        table.add_row(kind.name, facts.fitted_on(kind), needs, f"{kind.about}{source}")
    console.emit_table(table)


def _describe(kind: type[Detector]) -> None:
    from rich.table import Table

    from oodcli.detectors import facts

    about = {
        "name": kind.name,
        "about": kind.about,
        "score": facts.explanation(kind).replace("``", ""),
        "source": kind.source,
        "needs": " ".join(facts.records(kind)),
        "fitted on": facts.fitted_on(kind),
    }
    console.emit_table(facts_table({key: value for key, value in about.items() if value}))
    settings = facts.settings(kind)
    if not settings:
        return
    print()
    table = Table(box=None, pad_edge=False)
    for column in ("setting", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for key, each in settings.items():
        table.add_row(f"{kind.name}.{key}", as_given(each["default"]), each["meaning"])
    console.emit_table(table)


def as_given(default: Any) -> str:
    """A setting's default as ``-p`` takes it; ``none`` where it is found while fitting."""
    plain = default is None or isinstance(default, bool)
    return str(default).lower() if plain else str(default)
