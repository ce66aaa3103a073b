"""``oodcli score``: scores of images or of a cache, as CSV."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oodcli.cli import console
from oodcli.cli.options import (
    Detectors,
    Force,
    Json,
    ModelOptions,
    Parameters,
    Quiet,
    parameters,
    takes_model,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from oodcli.detectors.base import Detector
    from oodcli.features import Rows

    Opened = tuple[
        frozenset[str],
        str,
        tuple[str, ...],
        Callable[[Sequence[Detector]], Iterable[Rows]],
    ]
    """What can be recorded, the checkpoint's hash, class names, and the rows for some detectors."""

DEFAULT = "energy"
"""The strongest detector that needs nothing but the checkpoint, by mean AUROC on ResNet-20."""


@takes_model
def command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT|CACHE.h5",
            help="A checkpoint, followed by IMAGES; or a cache made by extract, alone.",
            show_default=False,
        ),
    ],
    images: Annotated[
        str | None,
        typer.Argument(
            metavar="[IMAGES]",
            help="A folder, a text list, .npz, .tar, .zip, a virtual .h5, torchvision:DATASET?…, "
            "noise:KIND?…, or - for a list on standard input.",
            show_default=False,
        ),
    ] = None,
    detector: Detectors = None,
    param: Parameters = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help=".csv, .jsonl or .parquet; CSV on standard output without it.",
            show_default=False,
        ),
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help="Scores above it are OOD: adds the column NAME.ood. Repeatable.",
            show_default=False,
        ),
    ] = None,
    max_ood_fraction: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Exit with 4 when a larger share is OOD by any --threshold.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    *,
    model: ModelOptions,
) -> None:
    """Score images: higher = more out of distribution, for every detector."""
    from oodcli.errors import OodcliError
    from oodcli.files.atomic import refuse_existing
    from oodcli.files.scores import format_of
    from oodcli.stages import choose_detectors, score_to_file

    if output is not None:
        refuse_existing(output, force=force)
        format_of(output)
    if json and output is None:
        raise OodcliError("--json prints the summary on standard output: name a file with -o")
    wanted = detector or [DEFAULT]
    if not detector:
        console.say(f"note: no -d, so {DEFAULT}: the strongest that needs only the checkpoint")
    given = parameters(param)
    with ExitStack() as stack:
        if images is None:
            available, sha256, class_names, record = _from_cache(checkpoint, stack)
        else:
            available, sha256, class_names, record = _from_images(checkpoint, images, model, stack)
        chosen = choose_detectors(wanted, given, available, sha256)
        if not chosen:
            raise OodcliError("no detector is possible with what was recorded")
        limits = _thresholds(threshold, chosen)
        if max_ood_fraction is not None and not limits:
            raise OodcliError("--max-ood-fraction needs a --threshold NAME=NUMBER to count by")
        summary = score_to_file(
            record(chosen),
            chosen,
            class_names,
            sys.stdout if output is None else output,
            thresholds=limits,
            force=force,
        )
    fractions = summary.ood_fraction
    if json:
        console.emit_json({**vars(summary), "ood_fraction": fractions})
    console.say(
        f"{summary.rows} images scored by {', '.join(each.name for each in chosen)}; "
        f"{summary.unreadable} unreadable, {summary.infinite} with an infinite score (OOD)"
        + "".join(f"; {name}: {part:.1%} OOD" for name, part in fractions.items())
        + (f"; wrote {output}" if output else "")
    )
    if max_ood_fraction is not None and any(part > max_ood_fraction for part in fractions.values()):
        console.say(f"gate failed: more than {max_ood_fraction:.1%} are OOD")
        raise typer.Exit(4)
    if summary.unreadable:
        raise typer.Exit(3)


def _from_cache(path: Path, stack: ExitStack) -> Opened:
    from oodcli.errors import OodcliError
    from oodcli.files.cache import FORMAT, open_cache
    from oodcli.files.hdf5 import format_of
    from oodcli.stages import needs

    if path.is_file() and format_of(path) != FORMAT and path.suffix not in (".h5", ".hdf5"):
        raise OodcliError(f"{path} is no cache: give IMAGES after a checkpoint")
    cache = stack.enter_context(open_cache(path))

    def record(chosen: Sequence[Detector]) -> Iterable[Rows]:
        for each in chosen:
            cache.require(each.needs, each.name)
        return cache.blocks(needs(chosen))

    provenance = cache.provenance
    return cache.recorded, provenance.checkpoint_sha256, provenance.class_names, record


def _from_images(path: Path, images: str, model: ModelOptions, stack: ExitStack) -> Opened:
    from oodcli.images import open_images
    from oodcli.recording import Recorder, recordable
    from oodcli.stages import needs, odin_step, record_images

    classifier = model.load(path)
    source = open_images(images, classifier.preprocessing, classifier.class_names, stdin=sys.stdin)
    if source.note:
        console.say(f"note: {source.note}")
    advance = stack.enter_context(console.progress(len(source), "score"))

    def record(chosen: Sequence[Detector]) -> Iterable[Rows]:
        recorder = Recorder(
            classifier,
            needs(chosen),
            odin=odin_step(chosen),
            precision=model.resolved_precision(fast=False),
        )
        batch_size = model.resolved_batch_size(classifier)
        return record_images(classifier, source, recorder, batch_size, advance)

    return recordable(classifier), classifier.sha256, classifier.class_names, record


def _thresholds(given: list[str] | None, chosen: Sequence[Detector]) -> dict[str, float]:
    from oodcli.errors import OodcliError

    found: dict[str, float] = {}
    for text in given or []:
        name, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not equals or value != value:
            raise OodcliError(f"--threshold {text}: expected NAME=NUMBER, such as energy=-5.2")
        if name not in {each.name for each in chosen}:
            raise OodcliError(f"--threshold {text}: {name} is not among the detectors")
        found[name] = value
    return found
