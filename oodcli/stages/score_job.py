"""``oodcli score``: images or a cache to a scores file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from oodcli import notes
from oodcli.detectors.serial import settings
from oodcli.errors import OodcliError
from oodcli.files.hdf5 import Provenance
from oodcli.files.made import read_made
from oodcli.files.scores import format_of
from oodcli.jobs.kept import Kept, kept_work, refuse_output
from oodcli.jobs.shards import Share
from oodcli.jobs.torchrun import Team, part_of
from oodcli.stages.chosen import (
    SIMILARITY,
    Chosen,
    choose_detectors,
    fingerprint,
    placed,
    require_built_in,
)
from oodcli.stages.default_detector import default_detector
from oodcli.stages.model import Model
from oodcli.stages.opened import Opened, from_cache, from_images
from oodcli.stages.prepared import with_prepared
from oodcli.stages.record import Work, file_state, job_of, shard_of
from oodcli.stages.score import Doubts, ScoreSummary, Scoring, doubts, score_to_file
from oodcli.stages.sources import log_kept
from oodcli.stages.stream import FEWEST, detector_of
from oodcli.stages.verdict import Deciding, Rule, basis_in_words, rule_of
from oodcli.stages.watching import Watch, watched

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreRequest:
    """What to score, with which detectors, and how. model: without images, its path is that of a
    cache. output: a file, or a stream that gets CSV. detectors: as ``-d``; none for the default.
    parameters: name → key → value. timeout: seconds to read an image. command: stored in the
    file."""

    model: Model
    images: str | None
    output: Path | TextIO
    detectors: Sequence[str] = ()
    parameters: Mapping[str, Mapping[str, str]] | None = None
    deciding: Deciding = field(default_factory=Deciding)
    mirror: bool = False
    stream: bool = False
    explain: bool = False
    force: bool = False
    restart: bool = False
    timeout: float | None = None
    shard: str | None = None
    engine: str | None = None
    command: str = ""

    @property
    def file(self) -> Path | None:
        return self.output if isinstance(self.output, Path) else None


@dataclass(frozen=True)
class Scored:
    """Summary of ``score``. output: the scores file; None for a stream. rows: all inputs.
    unreadable, infinite: rows without a score, or with +inf for some detector. flagged, unjudged:
    detector → rows that are OOD, or have a score but no verdict. thresholds: thresholds found in
    the stream. ood_fraction: detector → share of OOD rows among those with a verdict. left_out:
    suffix → number of files that are not images. fitted_on: detector → virtual, real or noise; None
    if it needs no fitting. saw_ood: detector → OOD data that it has learnt from. bases: detector →
    basis of its verdicts. doubts: detector → rows not known to be in-distribution."""

    output: Path | None
    rows: int
    unreadable: int
    infinite: int
    flagged: Mapping[str, int]
    thresholds: Mapping[str, float]
    unjudged: Mapping[str, int]
    ood_fraction: Mapping[str, float]
    left_out: Mapping[str, int]
    fitted_on: Mapping[str, str | None]
    saw_ood: Mapping[str, str]
    bases: Mapping[str, str]
    doubts: Mapping[str, Doubts]


def score(request: ScoreRequest, watch: Watch | None = None) -> Scored | None:
    """Score rows into a file or a stream; None in a process of torchrun that writes no file."""
    share, team = part_of(request.shard, request.images)
    _refuse(request, share, team)
    with ExitStack() as stack:
        opened = _opened(request, stack)
        if opened.made.shard is not None and not share.whole:
            raise OodcliError(
                f"--shard {share}: {request.model.name} already is shard {opened.made.shard}, and "
                "so are its scores: leave --shard out"
            )
        if request.stream:
            _require_stream(opened)
        chosen = _chosen(request, opened)
        rules = request.deciding.rules(chosen, opened.made.class_names, mirror=request.mirror)
        _log_chosen(chosen, rules, request.deciding)
        notes.done(log, "detectors")
        made = replace(
            opened.made,
            shard=shard_of(share, opened.count, opened.unit(chosen), opened.listing)
            or opened.made.shard,
            device=opened.made.device if request.engine is None else "ray",
        )
        fingerprints = {each.name: fingerprint(each) for each in chosen if request.file}
        kept = _kept(request, opened, made, chosen, fingerprints, team, stack)
        work = Work(kept, share, team)
        if opened.cluster is not None:
            scoring = Scoring.of(
                chosen,
                opened.made.class_names,
                rules,
                streamed=request.deciding.stream_rule is not None,
                mirror=request.mirror,
                explain=request.explain,
            )
            work = opened.cluster(kept, chosen, scoring, request.engine or "ray")
        chosen = placed(chosen, request.model.device())
        count, unit = opened.count, opened.unit(chosen)
        advance = watched(watch, len(work.part(count, unit)), before=work.rows(count, unit))
        summary = score_to_file(
            opened.record(chosen, advance),
            count,
            unit,
            chosen,
            opened.made.class_names,
            request.output,
            rules=rules,
            stream_rule=request.deciding.stream_rule,
            mirror=request.mirror,
            stream=request.stream,
            explain=request.explain,
            force=request.force,
            progress=advance,
            work=work,
            made=None if kept is None else _about(request, opened, made, fingerprints, rules, kept),
        )
    notes.done(log, "scoring")
    # A part lists all files, so that merge counts those left out, once.
    left_out = opened.made.left_out if share.whole else {}
    return None if summary is None else _scored(request, opened, chosen, rules, summary, left_out)


def _refuse(request: ScoreRequest, share: Share, team: Team | None) -> None:
    """Raises OodcliError for contradictory options, and for an existing output."""
    if request.file is not None:
        refuse_output(request.file, force=request.force)
        format_of(request.file)
        read_made(request.file)  # raises where what is beside it is somebody else's
    if request.deciding.stream_rule is not None and not share.whole:
        raise OodcliError(
            f"--shard {share}: a shard lacks the whole stream to find a threshold in: merge the "
            "shards first, then use --threshold NAME=NUMBER"
        )
    if request.stream and not (share.whole and request.engine is None):
        which = f"--shard {share}" if request.engine is None else f"--engine {request.engine}"
        raise OodcliError(
            f"{which}: --stream compares each image with all others of the job: score a cache of "
            "them in one process"
        )
    if request.engine is not None:
        from oodcli.stages.on_cluster import refuse_with_engine

        refuse_with_engine(
            request.engine,
            request.images,
            to_file=request.file is not None,
            timeout=request.timeout,
            shared=team is not None or not share.whole,
        )
    if team is not None and request.file is None:
        raise OodcliError(
            "under torchrun the processes write one scores file", hint="name it with -o"
        )


def _opened(request: ScoreRequest, stack: ExitStack) -> Opened:
    how: dict[str, Any] = {"mirror": request.mirror, "command": request.command}
    if request.images is None:
        if request.model.path is None:
            raise OodcliError(
                "the network is a loaded classifier: give images, or the path of a cache"
            )
        return from_cache(request.model.path, stack, **how, stream=request.stream)
    classifier = request.model.load()
    if request.engine is not None:
        from oodcli.stages.on_cluster import for_cluster

        return for_cluster(request.model, classifier, request.images, **how)
    timeout = request.timeout
    return from_images(
        request.model, classifier, request.images, timeout=timeout, **how, stream=request.stream
    )[0]


def _require_stream(opened: Opened) -> None:
    """Raises OodcliError where images cannot be compared, or are too few to be."""
    if SIMILARITY not in opened.available:
        raise OodcliError(
            f"--stream compares images by {SIMILARITY}, which these records lack",
            hint=f"record it with 'oodcli extract … --record {SIMILARITY}', or choose --layers",
        )
    if opened.count < FEWEST:
        raise OodcliError(
            f"--stream compares images with each other: expected at least {FEWEST}, but got "
            f"{opened.count}: leave it out"
        )


def _chosen(request: ScoreRequest, opened: Opened) -> list[Chosen]:
    made = opened.made
    given = request.parameters or {}
    checkpoint = None if request.images is None else request.model.path
    wanted = with_prepared(request.detectors, given, opened, checkpoint)
    chosen = choose_detectors(
        wanted or [default_detector(opened, checkpoint)],
        given,
        opened.available,
        made.checkpoint_sha256,
        opened.fit_reference,
        made.preprocessing,
        made.averaged,
    )
    if not chosen:
        raise OodcliError("no detector can score these records")
    if request.engine is not None:
        require_built_in(chosen, request.engine)
    return chosen


def _log_chosen(chosen: Sequence[Chosen], rules: Mapping[str, Rule], deciding: Deciding) -> None:
    """Log each detector's origin, settings, needs, and the basis of its verdicts."""
    for each in chosen:
        origin = f"fitted on {each.trained_on} rows" if each.trained_on else "needs no fitting"
        if each.artefact:
            origin = f"{each.artefact}, {origin}"
        pairs = ", ".join(f"{name}={value}" for name, value in settings(each.detector).items())
        needed = ", ".join(sorted(each.detector.score_needs)) or "nothing"
        verdicts = "no verdicts"
        if each.name in rules:
            verdicts = f"verdicts by {rules[each.name].basis}"
        elif deciding.stream_rule is not None:
            verdicts = "verdicts by a threshold from the stream"
        log.debug(
            "%s: %s; %s; needs %s; %s",
            *(each.name, origin, pairs or "default parameters", needed, verdicts),
        )


def _kept(
    request: ScoreRequest,
    opened: Opened,
    made: Provenance,
    chosen: Sequence[Chosen],
    fingerprints: Mapping[str, str],
    team: Team | None,
    stack: ExitStack,
) -> Kept | None:
    """The stored batches of a scores file; None for a stream."""
    if request.file is None:
        return None
    deciding = request.deciding
    settings = {
        **job_of(made, **opened.job()),
        "the detectors": list(fingerprints),
        **{f"the detector {name}": words for name, words in fingerprints.items()},
        **{
            f"the artefact of {each.name}": file_state(Path(each.artefact))
            for each in chosen
            if each.artefact  # its calibration, too
        },
        "--fpr": deciding.fpr,
        "--threshold": list(deciding.threshold) or None,
        "--contamination": deciding.contamination,
        "--mirror": request.mirror,
        "--stream": request.stream,
        "--explain": request.explain,
    }
    kept = stack.enter_context(
        kept_work(
            request.file,
            settings,
            made.command,
            restart=request.restart and (team is None or team.first_try()),
            team=team,
        )
    )
    log_kept(kept)
    return kept


def _about(
    request: ScoreRequest,
    opened: Opened,
    made: Provenance,
    fingerprints: Mapping[str, str],
    rules: Mapping[str, Rule],
    kept: Kept,
) -> dict[str, Any]:
    """Metadata of the scores, for the file beside them."""
    return {
        **asdict(made),
        "command": kept.about.command,
        "extracted_by": opened.extracted_by,
        "detectors": dict(fingerprints),
        "verdicts": {name: rule.basis for name, rule in rules.items()},
        "calibration": {
            name: rule.distribution for name, rule in rules.items() if rule.calibration is not None
        },
        "mirror": request.mirror,
        "stream": request.stream,
    }


def _scored(
    request: ScoreRequest,
    opened: Opened,
    chosen: Sequence[Chosen],
    rules: Mapping[str, Rule],
    summary: ScoreSummary,
    counted: Mapping[str, int],
) -> Scored:
    """counted: files left out that count as doubts here."""
    names = opened.made.class_names
    by_name = {each.name: each for each in chosen}
    return Scored(
        request.file,
        **vars(summary),
        ood_fraction=summary.ood_fraction,
        left_out=dict(opened.made.left_out),
        fitted_on={each.name: each.trained_on or None for each in chosen},
        saw_ood={each.name: each.saw for each in chosen if each.saw},
        bases={
            name: basis_in_words(
                replace(by_name[detector_of(name)], column=name),
                rules.get(name) or rule_of(by_name[detector_of(name)], names),
                summary.thresholds,
                names,
            )
            for name in summary.flagged
        },
        doubts=doubts(summary.rows, summary.unreadable, summary.flagged, summary.unjudged, counted),
    )
