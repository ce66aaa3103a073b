"""``oodcli detectors``: the list of detectors."""

from __future__ import annotations

from oodcli.cli import console
from oodcli.cli.options import Json


def command(json: Json = False) -> None:
    """Every detector: where it comes from, what it needs, what it is fitted on."""
    from oodcli import detectors

    found = [
        {
            "name": kind.name,
            "source": kind.source,
            "needs": sorted(kind.needs | kind.fit_needs()),
            "fitted": kind.fitted,
            "about": kind.about,
        }
        for kind in map(detectors.get, detectors.names())
    ]
    if json:
        console.emit_json(found)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("name", "fitted on", "needs", "about", "source"):
        table.add_column(column, overflow="fold")
    for row in found:
        needs = row["needs"]
        assert isinstance(needs, list)
        table.add_row(
            str(row["name"]),
            "virtual or real images" if row["fitted"] else "nothing",
            " ".join(needs),
            str(row["about"]),
            str(row["source"]),
        )
    console.emit_table(table)
