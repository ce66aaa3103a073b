"""``oodcli show``: a scores file to a page."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from oodcli import notes
from oodcli.errors import FileError
from oodcli.files.atomic import atomic, refuse_existing, refuse_suffix
from oodcli.files.scores import score_rows
from oodcli.report.listing import LISTED, read_listing
from oodcli.stages.watching import Watch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShowRequest:
    """scores: the file. output: the page, by default beside the scores. images: IMAGES of
    ``score``, if they cannot be opened under the paths of the scores. detectors: those to show, by
    default all; the page starts with the first. command: stored in the page."""

    scores: Path
    output: Path | None = None
    images: str | None = None
    detectors: Sequence[str] = ()
    thumbnails: bool = True
    force: bool = False
    command: str = ""

    @property
    def page(self) -> Path:
        """Where to write. Raises FileError for scores from a pipe without an output."""
        if self.output is not None:
            return self.output
        if self.scores.exists() and not (self.scores.is_file() or self.scores.is_dir()):
            raise FileError(f"{self.scores} is not a regular file: name the page with -o")
        return self.scores.with_suffix(".html")


@dataclass(frozen=True)
class Shown:
    """Summary of ``show``. output: the page. rows: all images. unreadable: those without scores.
    listed: rows that the page lists. thumbnails: images that it shows. flagged: detector → images
    above the threshold with which the page starts; None without a verdict. sentence: what the page
    says first."""

    output: Path
    rows: int
    unreadable: int
    listed: int
    thumbnails: int
    flagged: Mapping[str, int | None]
    sentence: str


def refuse_page(page: Path, *, force: bool) -> None:
    """Raises FileError for a page that would not be one, or that exists."""
    refuse_suffix(page, ".html", ".htm")
    refuse_existing(page, force=force)


def show(request: ShowRequest, watch: Watch | None = None) -> Shown:
    """Write the page. watch: called with the number of thumbnails done and their total. Raises
    FileError for scores that cannot be read and for an existing page, ImagesError for images that
    do not exist."""
    from oodcli.report.scores_page import overviews, scores_page, sentence
    from oodcli.report.thumbnails import open_source

    page = request.page
    opened = score_rows(request.scores)
    refuse_page(page, force=request.force)
    source = None if request.images is None else open_source(request.images)
    listing = read_listing(opened, request.detectors, LISTED)
    notes.done(log, "scores")
    found = overviews(listing)
    text, pictures = scores_page(
        listing,
        found,
        thumbnails=request.thumbnails,
        source=source,
        progress=watch,
        command=request.command,
    )
    notes.done(log, "thumbnails")
    with atomic(page, force=request.force) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    if request.thumbnails and listing.readable and not pictures:
        notes.say(log, "no image could be opened for a thumbnail: say where they are with --images")
    return Shown(
        page,
        listing.rows,
        listing.unreadable,
        len(listing.listed),
        pictures,
        {one.name: None if one.threshold.value is None else one.flagged for one in found},
        sentence(listing, found[0]).replace("\u00a0", " "),
    )
