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
        ),
    ] = None,
    needs: Annotated[
        list[str] | None,
        typer.Option(
            help="Only detectors for which you need this: checkpoint (alone), virtual, real or ood "
            "images. Repeatable.",
            autocompletion=completions.words("checkpoint", "virtual", "real", "ood"),
        ),
    ] = None,
    search: Annotated[
        str,
        typer.Option(
            metavar="WORD",
            help="Only detectors with this text in their name, explanation or source.",
        ),
    ] = "",
    json: Json = False,
) -> None:
    """List every detector with its source, by the images it needs."""
    from oodcli import detectors
    from oodcli.detectors import facts, own

    listed = [own.find(name) for name in names or detectors.names()]
    kinds = facts.selected(listed, needs or (), search)
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
        "group": facts.group(kind),
        "about": kind.about,
        "superseded_by": kind.superseded_by,
        "explanation": facts.explanation(kind),
        "formula": facts.equations(kind),
        "settings": facts.settings(kind),
    }


def _list(kinds: list[type[Detector]]) -> None:
    from rich.table import Table

    from oodcli.detectors import facts

    width = max(len(kind.name) for kind in kinds)
    groups = {key: [kind for kind in kinds if facts.group(kind) == key] for key in facts.GROUPS}
    for index, (key, members) in enumerate((k, m) for k, m in groups.items() if m):
        if index:
            print()
        print(f"{facts.GROUPS[key]} ({key})")
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(width=width + 2)
        table.add_column(overflow="fold")
        for kind in members:
            source = f" ({kind.source})" if kind.source else ""
            table.add_row(f"  {kind.name}", f"{facts.summary(kind)}{source}")
        console.emit_table(table)


def _describe(kind: type[Detector]) -> None:
    from rich.table import Table

    from oodcli.detectors import facts

    about = {
        "name": kind.name,
        "about": kind.about,
        "superseded by": kind.superseded_by,
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
