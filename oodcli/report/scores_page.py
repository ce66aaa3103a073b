"""The page of ``show``: ``scores.html.jinja`` with the numbers that its script needs."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from oodcli._version import __version__
from oodcli.report import html
from oodcli.report.html import Cell, Shown, TableRows
from oodcli.report.listing import Column, Listing
from oodcli.report.overview import Classes, Overview, overview, rows_by_class
from oodcli.report.thumbnails import noise_of, read_thumbnails

if TYPE_CHECKING:
    from oodcli.images.source import ImageSource

MOST, LEAST = 48, 12
"""Images shown of the first detector."""
MOST_OF_OTHERS, LEAST_OF_OTHERS = 24, 6
PICTURES = 240
"""Thumbnails on a page."""
NOTHING = (
    "None of these images could be opened under the paths in the scores: run 'oodcli show' with "
    "--images."
)


def overviews(listing: Listing) -> list[Overview]:
    """One of each detector, in their order."""
    classes = rows_by_class(listing)
    return [
        overview(
            listing,
            column,
            classes,
            most=MOST_OF_OTHERS if place else MOST,
            least=LEAST_OF_OTHERS if place else LEAST,
        )
        for place, column in enumerate(listing.columns)
    ]


def scores_page(
    listing: Listing,
    found: Sequence[Overview],
    *,
    thumbnails: bool = True,
    source: ImageSource | None = None,
    progress: Callable[[int, int], None] | None = None,
    command: str = "",
) -> tuple[str, int]:
    """The page, and the number of its thumbnails. found: of ``overviews``. source: images, where
    they cannot be opened under the paths of the scores. progress: called with the number of
    thumbnails done and their total."""
    columns = {column.name: column for column in listing.columns}
    first = found[0]
    shown = list(dict.fromkeys(row for one in found for row in (*one.most, *one.least)))
    others = [row for row in shown if row not in {*first.most, *first.least}]
    paths = [listing.listed[row].path for row in shown]
    chosen = paths[:PICTURES] if thumbnails else []
    pictures = read_thumbnails(chosen, *noise_of(listing.made, source), progress)
    prefix = html.shared_folder([texts.path for texts in listing.listed.values()])
    classes = rows_by_class(listing)
    label = _labels(listing)
    text = html.render(
        "scores.html.jinja",
        ("base.css", "scores.css"),
        ("tables.js", "strips.js", "scores.js"),
        source=listing.source,
        images=str((listing.made or {}).get("source", "")) or listing.source,
        prefix=prefix,
        sentence=sentence(listing, first),
        more=expectation(listing, first),
        several=len(found) > 1,
        names=[one.name for one in found],
        notes=[*_notes(listing, found, columns), *([NOTHING] if chosen and not pictures else [])],
        most=_figures(listing, first, columns, first.most, pictures),
        least=_figures(listing, first, columns, first.least, pictures),
        others=_figures(listing, first, columns, others, pictures),
        pictures=len(pictures),
        judged=first.threshold.value is not None,
        classes=_class_table(classes, first),
        listed=len(listing.listed),
        readable=listing.readable,
        complete=listing.complete,
        unreadable=listing.unreadable,
        errors=listing.errors,
        made=_made(listing, command),
        data=html.json_in_html(
            {
                "prefix": prefix,
                "rows": listing.readable,
                "complete": listing.complete,
                "names": list(listing.names),
                "paths": [texts.path[len(prefix) :] for texts in listing.listed.values()],
                "predicted": listing.predicted[_listed(listing)].tolist(),
                "labels": label,
                "classes": [
                    [int(listing.predicted[rows[0]]) if name is not None else -1, len(rows)]
                    for name, rows in classes
                ],
                "detectors": [
                    _detector(listing, one, columns[one.name], sentence(listing, one))
                    for one in found
                ],
            }
        ),
    )
    return text, len(pictures)


def _listed(listing: Listing) -> NDArray[np.int64]:
    return np.fromiter(listing.listed, np.int64, len(listing.listed))


def _labels(listing: Listing) -> list[int] | None:
    found = [texts.label for texts in listing.listed.values()]
    return found if any(label >= 0 for label in found) else None


# --- sentences --------------------------------------------------------------------------------


def sentence(listing: Listing, one: Overview) -> str:
    """What the page says first."""
    if not listing.rows:
        return f"{listing.source} has no rows."
    if not listing.readable:
        return f"None of {html.counted(listing.rows, 'image')} could be read."
    judged = listing.readable - one.silent
    images = html.counted(listing.readable, "image")
    if one.threshold.value is None:
        return f"{images} scored by {one.name}; no threshold says which are out of distribution."
    share = one.flagged / max(judged, 1)
    words = (
        f"{one.flagged:,} of {html.counted(judged, 'image')} ({_percent(share)}) "
        f"{'is' if one.flagged == 1 else 'are'} flagged as out of distribution by {one.name}"
    )
    if one.threshold.rate is not None:
        return f"{words} at a false-alarm rate of {_percent(one.threshold.rate)}."
    return f"{words}, with scores above {one.threshold.value:.4g}."


def expectation(listing: Listing, one: Overview) -> str:
    """What the sentence would be by chance, and what it leaves out."""
    judged = listing.readable - one.silent
    parts = []
    if listing.readable and one.threshold.rate is not None:
        expected = one.threshold.rate * judged
        count = int(float(f"{expected:.2g}")) if expected >= 100 else round(expected)
        parts.append(
            f"If all were in distribution, about {html.counted(count, 'image')} would be flagged."
        )
    if listing.readable and one.threshold.value is None:
        parts.append("Move the threshold to count images, or score with --fpr for verdicts.")
    if one.calibration is not None:
        parts.append(f"Calibrated on {one.calibration.images}.")
    others = [
        (one.silent, "without a verdict"),
        (listing.unreadable, "unreadable"),
        (one.infinite, "with an infinite score"),
    ]
    left = ", ".join(f"{count:,} {what}" for count, what in others if count)
    if left and listing.readable:
        parts.append(f"{left}.")
    return " ".join(parts)


def _percent(share: float) -> str:
    """With a space that does not break."""
    return f"{100 * share:.{2 if share < 0.1 else 3}g}\u00a0%"


def _notes(listing: Listing, found: Sequence[Overview], columns: Mapping[str, Column]) -> list[str]:
    notes = [
        f"{one.name} has learnt from {columns[one.name].saw}."
        for one in found
        if columns[one.name].saw
    ]
    notes += [
        f"No single threshold of {one.name} flags exactly the images that the file flags."
        for one in found
        if not one.threshold.exact
    ]
    if not listing.complete:
        notes.append(
            f"The list and the thumbnails are of the {len(listing.listed):,} images with the "
            "highest scores; all counts are of all images, and the threshold moves in steps."
        )
    return notes


# --- parts ------------------------------------------------------------------------------------


def _figures(
    listing: Listing,
    one: Overview,
    columns: Mapping[str, Column],
    rows: Iterable[int],
    pictures: Mapping[str, bytes],
) -> list[dict[str, object]]:
    column = columns[one.name]
    place = {row: number for number, row in enumerate(listing.listed)}
    threshold = one.threshold.value
    found = []
    for row in rows:
        path = listing.listed[row].path
        score = float(column.scores[row])
        p = "" if column.p_values is None else _short(float(column.p_values[row]))
        silent = column.flags is not None and bool(np.isnan(column.flags[row]))
        over = math.isinf(score) or (threshold is not None and score > threshold)
        found.append(
            {
                "image": Shown(
                    path,
                    listing.names[listing.predicted[row]],
                    score,
                    html.jpeg(pictures[path]) if path in pictures else "",
                    p,
                    column.why.get(row, ""),
                ),
                "row": place[row],
                "flagged": over and not silent,
            }
        )
    return found


def _short(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def _class_table(classes: Classes, one: Overview) -> dict[str, object]:
    rows: TableRows = []
    for (name, members), flagged, median in zip(
        classes, one.class_flagged, one.class_medians, strict=True
    ):
        share = flagged / len(members)
        rows.append(
            (
                "other classes" if name is None else name or "(none)",
                [
                    Cell(f"{len(members):,}", str(len(members))),
                    Cell(f"{flagged:,}", str(flagged)),
                    Cell(f"{100 * share:.1f}", f"{share:.6g}"),
                    Cell(f"{median:.4g}", f"{min(median, 1e308):.9g}"),
                ],
            )
        )
    return {
        "header": ["Predicted class", "Images", "Flagged", "Flagged, %", "Median score"],
        "rows": rows,
    }


def _detector(listing: Listing, one: Overview, column: Column, words: str) -> dict[str, Any]:
    listed = _listed(listing)
    place = {int(row): number for number, row in enumerate(listed)}
    silent = [] if column.flags is None else np.flatnonzero(np.isnan(column.flags[listed])).tolist()
    return {
        "name": one.name,
        "sentence": words,
        "more": expectation(listing, one),
        "threshold": _number(one.threshold.value),
        "rate": one.threshold.rate,
        "quantiles": None
        if one.calibration is None
        else [_number(each) for each in one.calibration.quantiles.tolist()],
        "calibrated": None if one.calibration is None else one.calibration.images,
        "judged": listing.readable - one.silent,
        "low": one.low,
        "high": one.high,
        "bins": one.bins,
        "expected": one.expected,
        "steps": one.steps,
        "above": one.above,
        "medians": [_number(each) for each in one.class_medians],
        "scores": [_number(each) for each in column.scores[listed].tolist()],
        "p": None
        if column.p_values is None
        else [_short(each) for each in column.p_values[listed].tolist()],
        "silent": silent,
        "why": {place[row]: text for row, text in column.why.items() if row in place},
        "most": [place[row] for row in one.most],
        "least": [place[row] for row in one.least],
    }


def _number(value: float | None) -> float | None:
    """For JSON, which has no infinity: null."""
    return None if value is None or not math.isfinite(value) else value


def _made(listing: Listing, command: str) -> list[tuple[str, str]]:
    facts = [
        ("Command", command),
        ("Scores", listing.source),
        ("How they were made", "" if listing.made is None else html.origin(listing.made)),
        ("Versions", f"oodcli {__version__}, Python {platform.python_version()}"),
    ]
    return [fact for fact in facts if fact[1]]
