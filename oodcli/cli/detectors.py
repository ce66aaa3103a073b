"""``oodcli detectors``: the list of detectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oodcli.cli import console
from oodcli.cli.options import Json

if TYPE_CHECKING:
    from oodcli.detectors.base import Detector


def command(json: Json = False) -> None:
    """List every detector with its source and its needs."""
    from oodcli import detectors

    kinds = [detectors.get(name) for name in detectors.names()]
    if json:
        console.emit_json(
            [
                {
                    "name": kind.name,
                    "source": kind.source,
                    "needs": sorted(kind.needs | kind.fit_needs()),
                    "fitted": kind.fitted,
                    "fitted_on": fitted_on(kind),
                    "about": kind.about,
                }
                for kind in kinds
            ]
        )
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column, width in (("name", None), ("fitted on", 10), ("needs", 17), ("about", None)):
        table.add_column(column, overflow="fold", width=width)
    for kind in kinds:
        needs = sorted(kind.needs | kind.fit_needs())
        table.add_row(kind.name, fitted_on(kind), " ".join(needs), f"{kind.about} ({kind.source})")
    console.emit_table(table)


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
