"""``oodcli score``: scores of images or of a cache, as CSV."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oodcli.cli import console, details, verdicts
from oodcli.cli.options import (
    Detectors,
    Force,
    Json,
    ModelOptions,
    Parameters,
    Quiet,
    Restart,
    Shard,
    Timeout,
    Verbose,
    parameters,
    takes_model,
)

if TYPE_CHECKING:
    from oodcli.detectors.base import Detector
    from oodcli.features import Rows
    from oodcli.files.hdf5 import Provenance
    from oodcli.files.journal import Journal
    from oodcli.images.pieces import Piece
    from oodcli.networks.classifier import Classifier
    from oodcli.stages.chosen import Chosen, FitReference
    from oodcli.stages.record import Progress, Work
    from oodcli.stages.score import Scoring
    from oodcli.stages.verdict import Rule, StreamRule

_VERDICT = "Verdicts"


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
            metavar="IMAGES",
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
    fpr: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            min=0,
            max=1,
            help="Verdicts with this false-alarm rate, by the artefacts' calibration: adds NAME.p "
            "and NAME.ood.",
            show_default=False,
            rich_help_panel=_VERDICT,
        ),
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help="Scores above it are OOD: adds NAME.ood. Repeatable. Or 'split': two groups with "
            "the least variance within; or 'labelled': as learnt by fit --labelled.",
            show_default=False,
            rich_help_panel=_VERDICT,
        ),
    ] = None,
    contamination: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=1,
            help="The expected share of OOD images: the highest scores of the stream are OOD.",
            show_default=False,
            rich_help_panel=_VERDICT,
        ),
    ] = None,
    max_ood_fraction: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=1,
            help="Exit with 4 when by any detector more than this share is OOD, without a verdict, "
            "unreadable or left out.",
            show_default=False,
            rich_help_panel=_VERDICT,
        ),
    ] = None,
    mirror: Annotated[
        bool,
        typer.Option(
            "--mirror",
            help="Add the score of the mirror image; not for classes that change under mirroring.",
        ),
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Add NAME.why: what made the score, where known.")
    ] = False,
    json: Json = False,
    force: Force = False,
    restart: Restart = False,
    timeout: Timeout = None,
    shard: Shard = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="ray|ray://HOST:PORT",
            help="Score over a Ray cluster; IMAGES may also be an address such as s3://…, a "
            "pattern of .tar files, or Parquet.",
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    *,
    model: ModelOptions,
) -> None:
    """Score images: higher = more out of distribution."""
    from oodcli.cli import torchrun
    from oodcli.errors import OodcliError
    from oodcli.files.journal import journal, refuse_output
    from oodcli.files.made import read_made
    from oodcli.files.scores import format_of
    from oodcli.jobs.shards import WHOLE
    from oodcli.stages.chosen import choose_detectors, fingerprint, placed, require_built_in
    from oodcli.stages.record import Work, file_state, job_of, shard_of
    from oodcli.stages.score import Scoring, doubts, score_to_file
    from oodcli.stages.verdict import rule_of

    share, team = torchrun.part(shard, images)
    if output is not None:
        refuse_output(output, force=force)
        format_of(output)
        read_made(output)  # raises where what is beside it is somebody else's
    if json and output is None:
        raise OodcliError("--json prints the summary on standard output: name a file with -o")
    stream_rule = _stream_rule(threshold, contamination)
    decides = fpr is not None or bool(threshold) or contamination is not None
    if sum((fpr is not None, bool(threshold), contamination is not None)) > 1:
        raise OodcliError("--fpr, --threshold and --contamination exclude each other: choose one")
    if max_ood_fraction is not None and not decides:
        raise OodcliError(
            "--max-ood-fraction counts verdicts: add --fpr, --threshold or --contamination"
        )
    if stream_rule is not None and not share.whole:
        raise OodcliError(
            f"--shard {share}: a threshold from the whole stream cannot be found in a part of it; "
            "merge the parts first, then choose one by --threshold NAME=NUMBER"
        )
    if engine is not None:
        shared = team is not None or not share.whole
        _refuse_with_engine(engine, images, output, timeout, shared=shared)
    if team is not None and output is None:
        raise OodcliError("torchrun's processes score into one file together: name it with -o")
    given = parameters(param)
    with ExitStack() as stack:
        opened = (
            _from_cache(checkpoint, mirror, stack)
            if images is None
            else _from_images(checkpoint, images, mirror, timeout, model, engine is not None)
        )
        if opened.made.shard is not None and not share.whole:
            raise OodcliError(
                f"--shard {share}: {checkpoint} is shard {opened.made.shard} already, and so are "
                "its scores: leave --shard out"
            )
        wanted = detector or [_default(opened, checkpoint, images is not None)]
        chosen = choose_detectors(
            wanted,
            given,
            opened.available,
            opened.made.checkpoint_sha256,
            opened.fit_reference,
            opened.made.preprocessing,
            opened.made.averaged,
        )
        if not chosen:
            raise OodcliError("no detector is possible with what was recorded")
        if engine is not None:
            require_built_in(chosen, engine)
        rules = _rules(
            chosen,
            fpr,
            threshold if stream_rule is None else None,
            mirror,
            opened.made.class_names,
        )
        details.say_chosen(chosen, rules, stream_rule)
        console.lap("detectors")
        made = replace(
            opened.made,
            shard=shard_of(share, opened.count, opened.unit(chosen), opened.listing)
            or opened.made.shard,
            device=opened.made.device if engine is None else "ray",
        )
        kept = None
        about: dict[str, Any] = {}
        if output is not None:
            fingerprints = {each.name: fingerprint(each) for each in chosen}
            settings = {
                **job_of(made, **opened.job()),
                "the detectors": list(fingerprints),
                **{f"the detector {name}": words for name, words in fingerprints.items()},
                **{
                    f"the artefact of {each.name}": file_state(Path(each.artefact))
                    for each in chosen
                    if each.artefact  # its calibration, too
                },
                "--fpr": fpr,
                "--threshold": threshold,
                "--contamination": contamination,
                "--mirror": mirror,
                "--explain": explain,
            }
            kept = stack.enter_context(
                journal(
                    output,
                    settings,
                    made.command,
                    restart=restart and (team is None or team.first_try()),
                    share=WHOLE if team is None else team.share,
                )
            )
            details.say_journal(kept)
            about = {
                **asdict(made),
                "command": kept.about.command,
                "extracted_by": opened.extracted_by,
                "detectors": fingerprints,
                "verdicts": {name: rule.basis for name, rule in rules.items()},
                "mirror": mirror,
            }
        work = Work(kept, share, team)
        if opened.cluster is not None:
            scoring = Scoring.of(
                chosen,
                opened.made.class_names,
                rules,
                streamed=stream_rule is not None,
                mirror=mirror,
                explain=explain,
            )
            address = engine if engine != "ray" else None
            work = opened.cluster(kept, chosen, scoring, address)
        chosen = placed(chosen, model.resolved_device())
        mine = work.part(opened.count, opened.unit(chosen))
        advance = stack.enter_context(console.progress(len(mine), "score", before=work.rows))
        rows = opened.record(chosen, advance)
        summary = score_to_file(
            lambda: rows(mine.start + work.rows, mine.stop),
            chosen,
            opened.made.class_names,
            sys.stdout if output is None else output,
            rules=rules,
            stream_rule=stream_rule,
            mirror=mirror,
            explain=explain,
            force=force,
            progress=advance,
            work=work,
            made=about,
        )
    console.lap("scoring")
    if summary is None:
        return
    fractions = summary.ood_fraction
    left_out = opened.made.left_out
    if json:
        console.emit_json(
            {
                **vars(summary),
                "ood_fraction": fractions,
                "left_out": dict(left_out),
                "fitted_on": {each.name: each.trained_on or None for each in chosen},
                "saw_ood": {each.name: each.saw for each in chosen if each.saw},
            }
        )
    names = ", ".join(
        each.name + (f" ({each.trained_on})" if each.trained_on and not each.column else "")
        for each in chosen
    )
    console.say(
        f"{summary.rows} images scored by {names}; "
        f"{summary.unreadable} unreadable, {summary.infinite} with an infinite score (OOD)"
        + (f"; wrote {output}" if output else "")
    )
    for each in chosen:
        if each.saw:
            console.say(f"{each.name} has learnt from {each.saw}")
    by_name = {each.name: each for each in chosen}
    for name, part in fractions.items():
        lacks = rule_of(by_name[name], opened.made.class_names).more
        lacks = rules[name].more if name in rules else lacks
        basis = _basis(by_name[name], rules, summary.thresholds, lacks)
        console.say(f"{name}: {part:.1%} OOD{verdicts.without(summary.unjudged[name])}{basis}")
    verdicts.say_left_out(left_out)
    # A part lists all files, so that merge counts those left out, once.
    found = doubts(
        summary.rows,
        summary.unreadable,
        summary.flagged,
        summary.unjudged,
        left_out if share.whole else {},
    )
    if verdicts.gate_failed(found, max_ood_fraction):
        raise typer.Exit(4)
    if summary.unreadable and team is None:  # torchrun would take it for a crash
        raise typer.Exit(3)


@dataclass(frozen=True)
class Opened:
    """Where rows come from. made: how scores of them are made. available: what can be recorded.
    record: rows [start, stop) for some detectors. job: what else decides which rows those are.
    count: how many there are. unit: rows that are scored together. listing: SHA-256 of the list
    of images. fit_reference: fits a detector on noise; None without the network.
    extracted_by: the command that made a cache. cluster: all of the job at a Ray cluster of that
    address."""

    made: Provenance
    available: frozenset[str]
    record: Callable[[Sequence[Chosen], Progress], Callable[[int, int], Iterable[Rows]]]
    job: Callable[[], dict[str, Any]]
    count: int
    unit: Callable[[Sequence[Chosen]], int]
    listing: Callable[[], str]
    fit_reference: FitReference | None = None
    extracted_by: str | None = None
    cluster: Callable[[Journal | None, Sequence[Chosen], Scoring, str | None], Work] | None = None


def _from_cache(path: Path, mirror: bool, stack: ExitStack) -> Opened:
    import torch

    from oodcli import detectors
    from oodcli._version import __version__
    from oodcli.errors import OodcliError
    from oodcli.files.cache import FORMAT, open_cache
    from oodcli.files.hashes import file_sha256
    from oodcli.files.hdf5 import format_of
    from oodcli.stages.chosen import needs
    from oodcli.stages.record import file_state

    if path.is_file() and format_of(path) != FORMAT and path.suffix not in (".h5", ".hdf5"):
        raise OodcliError(f"{path} is no cache: give IMAGES after a checkpoint")
    cache = stack.enter_context(open_cache(path))
    details.say_cache("score", cache)

    def record(chosen: Sequence[Chosen], advance: Progress) -> Callable[[int, int], Iterable[Rows]]:
        views = {"mirror"} if mirror else set()
        for each in chosen:
            cache.require(each.detector.score_needs | views, detectors.word_for(each.detector.name))

        def rows(start: int, stop: int) -> Iterator[Rows]:
            for block in cache.blocks(needs(chosen, mirror=mirror), start=start, stop=stop):
                yield block
                advance(len(block.paths))

        return rows

    made = replace(
        cache.provenance,
        source=str(path),
        command=console.command_line(),
        oodcli_version=__version__,
        torch_version=str(torch.__version__),
    )
    return Opened(
        made,
        cache.recorded,
        record,
        lambda: {"the cache's state": file_state(path)},
        cache.count,
        lambda chosen: cache.block_rows(needs(chosen, mirror=mirror)),
        lambda: cache.rows_sha256 or file_sha256(path),
        extracted_by=cache.provenance.command,
    )


def _from_images(
    path: Path,
    images: str,
    mirror: bool,
    timeout: float | None,
    model: ModelOptions,
    engine: bool,
) -> Opened:
    from oodcli.files.hdf5 import format_of
    from oodcli.files.virtual import FORMAT
    from oodcli.images import open_images
    from oodcli.images.pieces import is_remote
    from oodcli.recording.recorder import Recorder, recordable
    from oodcli.stages.chosen import needs, odin_step
    from oodcli.stages.labels import settle_labels
    from oodcli.stages.ray import pieces_of
    from oodcli.stages.record import listing, paths_sha256, provenance, record_images

    classifier = model.load(path)
    if engine and is_remote(images):
        return _from_anywhere(path, images, mirror, model, classifier)
    source = open_images(images, classifier.preprocessing, classifier.class_names, stdin=sys.stdin)
    reading = settle_labels(source, classifier, timeout=timeout)
    if source.note:
        console.say(f"note: {source.note}")
    details.say_source(source, timeout)
    console.lap("the list of images")
    batch_size = model.resolved_batch_size(classifier)

    precision = model.resolved_precision(fast=False)

    def record(chosen: Sequence[Chosen], advance: Progress) -> Callable[[int, int], Iterable[Rows]]:
        recorder = Recorder(
            classifier,
            needs(chosen, mirror=mirror),
            odin=odin_step(each.detector for each in chosen),
            precision=precision,
        )
        details.say_records(recorder.asked)

        def rows(start: int, stop: int) -> Iterable[Rows]:
            return record_images(
                classifier,
                source,
                recorder,
                batch_size,
                advance,
                start=start,
                stop=stop,
                timeout=timeout,
            )

        return rows

    made = provenance(
        classifier,
        source=images,
        command=console.command_line(),
        seed=model.seed,
        precision=precision,
        virtual=format_of(Path(images)) == FORMAT,
        left_out=source.left_out,
    )

    def job() -> dict[str, Any]:
        return {
            **model.job(),
            "the list of images": listing(source),
            **({} if reading == 0 else {"the reading of its labels": reading}),
            "--batch-size": batch_size,
        }

    return Opened(
        made,
        recordable(classifier),
        record,
        job,
        len(source),
        lambda chosen: batch_size,
        lambda: paths_sha256(source),
        _fit_reference(classifier, batch_size),
        cluster=_cluster(
            path, images, mirror, model, classifier, lambda: pieces_of(source, batch_size), reading
        )
        if engine
        else None,
    )


def _from_anywhere(
    path: Path, images: str, mirror: bool, model: ModelOptions, classifier: Classifier
) -> Opened:
    """Images that only a cluster reads: how many there are is not known before."""
    from oodcli.images.pieces import left_out, pieces, sizes
    from oodcli.recording.recorder import recordable
    from oodcli.stages.record import provenance

    batch_size = model.resolved_batch_size(classifier)
    made = provenance(
        classifier,
        source=images,
        command=console.command_line(),
        seed=model.seed,
        precision=model.resolved_precision(fast=False),
        virtual=False,
        left_out=left_out(images),
    )

    def listing() -> str:
        return hashlib.sha256("\n".join(sizes(images)).encode()).hexdigest()

    def record(chosen: Sequence[Chosen], advance: Progress) -> Callable[[int, int], Iterable[Rows]]:
        return lambda start, stop: ()  # the cluster does

    return Opened(
        made,
        recordable(classifier),
        record,
        lambda: {**model.job(), "the list of images": listing(), "--batch-size": batch_size},
        0,
        lambda chosen: batch_size,
        listing,
        _fit_reference(classifier, batch_size),
        cluster=_cluster(
            path, images, mirror, model, classifier, lambda: pieces(images, batch_size)
        ),
    )


def _fit_reference(classifier: Classifier, batch_size: int) -> FitReference:
    from oodcli.recording.recorder import Recorder
    from oodcli.stages.chosen import fit_on_noise

    def fit_reference(kind: type[Detector], given: Mapping[str, Any]) -> Detector:
        Recorder(classifier, kind.fit_needs(**given))  # raises where that is not possible
        console.say(f"note: {kind.name} is standardised on {kind.reference_images} first")
        return fit_on_noise(classifier, kind, given, batch_size)

    return fit_reference


def _cluster(
    path: Path,
    images: str,
    mirror: bool,
    model: ModelOptions,
    classifier: Classifier,
    pieces: Callable[[], Sequence[Piece]],
    reading: int | None = 0,
) -> Callable[[Journal | None, Sequence[Chosen], Scoring, str | None], Work]:
    from oodcli.stages.labels import table_of
    from oodcli.stages.ray import ClusterWork, Job, Network, Reading

    def work(
        kept: Journal | None, chosen: Sequence[Chosen], scoring: Scoring, address: str | None
    ) -> Work:
        network = Network.of(
            path, model.overrides(), prefer_ema=model.ema, trust_pickle=model.trust_pickle
        )
        found = pieces()
        table, note = table_of(found, classifier)
        if note:
            console.say(f"note: {note}")
        job = Job(
            network,
            Reading(
                images,
                os.getcwd(),
                classifier.preprocessing,
                classifier.class_names,
                model.resolved_batch_size(classifier),
                reading,
                table,
            ),
            model.resolved_precision(fast=False),
            mirror,
            chosen,
            scoring,
        )
        return ClusterWork(kept, job=job, pieces=found, address=address)

    return work


def _refuse_with_engine(
    engine: str, images: str | None, output: Path | None, timeout: float | None, *, shared: bool
) -> None:
    """Raises OodcliError for what does not go with ``--engine``."""
    from oodcli.errors import OodcliError

    if engine != "ray" and not engine.startswith("ray://"):
        raise OodcliError(f"--engine {engine}: expected ray, or ray://HOST:PORT")
    for wrong, words in (
        (images is None, "a cache is scored faster here: leave it out"),
        (images == "-", "its hosts have no standard input: give a file with the list"),
        (output is None, "it needs a file for the scores: name one with -o"),
        (timeout is not None, "--timeout-per-image is not for it: leave one of them out"),
        (shared, "it shares the work by itself: leave out --shard, and start it without torchrun"),
    ):
        if wrong:
            raise OodcliError(f"--engine {engine}: {words}")


def _default(opened: Opened, path: Path, network: bool) -> str:
    """An artefact that needs no data and is at hand; otherwise a detector that needs nothing but
    the checkpoint. peak-energy is stronger than 1c-sum on residual networks, but no better than
    chance on the demo's, and nothing here can tell which it is (docs/protocol.md)."""
    from oodcli import detectors

    for name, artefact in _at_hand(path, network):
        reason = _why_not(artefact, name, opened)
        if reason is None:
            console.say(f"note: no -d, so {artefact}: the strongest that needs no real images")
            return str(artefact)
        console.say(f"note: left aside: {reason}")
    possible = ("1c-sum", "energy", "msp") if network else ("energy", "msp")
    name = next(each for each in possible if detectors.get(each).needs <= opened.available)
    console.say(f"note: no -d, so {name}, which needs nothing but the checkpoint")
    return name


def _at_hand(path: Path, network: bool) -> Iterator[tuple[str, Path]]:
    """Artefacts of the detectors that need no data, the strongest first, in ``detectors`` of the
    working directory and beside a checkpoint."""
    for name in ("c2ir-peak", "trio", "duo"):
        places = [Path("detectors", f"{name}.safetensors")]
        if network:
            beside = path.parent
            places += [beside / places[0], beside / f"{path.stem}.{name}.safetensors"]
        yield from ((name, place) for place in dict.fromkeys(places) if place.is_file())


def _why_not(path: Path, name: str, opened: Opened) -> str | None:
    """Why an artefact cannot be the default for these rows, in words; None where it can."""
    from oodcli.errors import OodcliError
    from oodcli.files.artefact import read_artefact
    from oodcli.stages.chosen import require_same_network

    try:
        artefact = read_artefact(path)
        made = opened.made
        require_same_network(artefact, made.checkpoint_sha256, made.preprocessing, made.averaged)
    except OodcliError as error:
        return str(error)
    if artefact.detector.name != name:
        return f"{path} is an artefact of {artefact.detector.name}, not of {name}"
    lacking = sorted(artefact.detector.score_needs - opened.available)
    return f"{path} needs {', '.join(lacking)}, which is not there" if lacking else None


def _stream_rule(threshold: list[str] | None, share: float | None) -> StreamRule | None:
    from oodcli.calibration import contamination_threshold, split_threshold

    if share is not None:
        return partial(contamination_threshold, share=share)
    return split_threshold if threshold == ["split"] else None


def _rules(
    chosen: Sequence[Chosen],
    fpr: float | None,
    threshold: list[str] | None,
    mirror: bool,
    class_names: Sequence[str],
) -> dict[str, Rule]:
    from oodcli.errors import OodcliError
    from oodcli.stages.verdict import calibrated_rules, rule_of

    if fpr is not None:
        rules = calibrated_rules(chosen, fpr, class_names, mirror=mirror)
        for name, rule in rules.items():
            if rule.calibration is not None and rule.calibration.resolution > fpr:
                console.say(
                    f"note: {name} is calibrated on {rule.calibration.words}, so no p-value is "
                    f"below {rule.calibration.resolution:.3g}, and nothing finite is OOD at "
                    f"--fpr {fpr:g}: calibrate on more images"
                )
        return rules
    rules = {}
    by_name = {each.name: each for each in chosen}
    for text in threshold or []:
        if text == "labelled":
            for each in chosen:
                if each.threshold is None:
                    raise OodcliError(
                        f"{each.name} has learnt no threshold: 'oodcli fit … --labelled FILE.csv'"
                    )
                rules[each.name] = rule_of(each, class_names, threshold=each.threshold)
            continue
        name, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not equals or value != value:
            raise OodcliError(
                f"--threshold {text}: expected NAME=NUMBER, such as energy=-5.2, split or labelled"
            )
        if name not in by_name:
            raise OodcliError(
                f"--threshold {text}: {name} is not among the detectors, {', '.join(by_name)}"
            )
        rules[name] = rule_of(by_name[name], class_names, threshold=value)
    return rules


def _basis(one: Chosen, rules: dict[str, Rule], found: dict[str, float], lacks: str) -> str:
    """What a verdict rests on. lacks: of classes without a verdict."""
    name = one.name
    if name in found:
        return f" (score above {found[name]:.6g}, from this stream{lacks})"
    rule = rules[name]
    if rule.calibration is None:
        return f" (score above {rule.threshold:.6g}{lacks})"
    low, high = rule.calibration.achieved(rule.rate)
    measured = ""
    if rule.calibration.virtual:
        measured = (
            "; virtual images proved far too strict for such an indicator: take real ones"
            if one.detector.strict_on_virtual
            else "; virtual images proved up to 3 points strict and 8 lenient"
        )
    return (
        f" (calibrated on: {rule.calibration.words}; for a nominal {rule.rate:.1%}, the luck of "
        f"that draw leaves {low:.1%} to {high:.1%} false alarms{measured}{lacks})"
    )
