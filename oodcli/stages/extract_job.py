"""``oodcli extract``: images to a feature cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from oodcli import detectors, notes
from oodcli.detectors import own
from oodcli.detectors.base import Detector
from oodcli.detectors.hyperparameters import parse
from oodcli.errors import OodcliError
from oodcli.features import Making
from oodcli.files.atomic import refuse_suffix
from oodcli.files.hdf5 import format_of
from oodcli.files.origin import Origin, Words
from oodcli.files.virtual import FORMAT, has_sensitivity, read_provenance
from oodcli.images import ImageSource
from oodcli.images.arrays import VirtualImages
from oodcli.inversion.degrade import VERSIONS, Patched
from oodcli.jobs.kept import Kept, kept_work, refuse_output
from oodcli.jobs.torchrun import Team, part_of
from oodcli.networks.classifier import Classifier
from oodcli.networks.preprocessing import INPUTS
from oodcli.recording.recorder import Recorder, recordable
from oodcli.records import CHEAP, KNOWN_RECORDS, impossible
from oodcli.stages.chosen import one_way
from oodcli.stages.extract import degrading, extract_to_file
from oodcli.stages.model import Model
from oodcli.stages.record import Work, images_of, job_of, paths_sha256, provenance, shard_of
from oodcli.stages.sources import log_kept, log_records, open_source
from oodcli.stages.watching import Watch, watched

log = logging.getLogger(__name__)

Parameters = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class ExtractRequest:
    """What to record, and how. output: None for IMAGES.features.h5 in the working directory.
    record: records, or ``all``; None for everything that a forward pass gives. for_detectors: as
    ``--for``. parameters: detector → key → value. match_accuracy: accuracy to which virtual images
    are degraded. timeout: seconds to read an image. command: stored in the file."""

    model: Model
    images: str
    output: Path | None = None
    record: Sequence[str] | None = None
    for_detectors: Sequence[str] = ()
    parameters: Parameters | None = None
    match_accuracy: float | None = None
    mirror: bool = False
    force: bool = False
    restart: bool = False
    timeout: float | None = None
    shard: str | None = None
    command: str = ""

    @property
    def path(self) -> Path:
        return self.output or Path(_stem(self.images) + ".features.h5")

    @property
    def virtual(self) -> bool:
        return format_of(Path(self.images)) == FORMAT


@dataclass(frozen=True)
class Extracted:
    """Summary of ``extract``. file: the cache. images: all rows. unreadable: rows without features.
    recorded: the records. labelled: rows with a known class. accuracy: the network's accuracy on
    these; None without any. left_out: suffix → number of files that are not images."""

    file: Path
    images: int
    unreadable: int
    recorded: Sequence[str]
    labelled: int
    accuracy: float | None
    left_out: Mapping[str, int]


def extract(request: ExtractRequest, watch: Watch | None = None) -> Extracted | None:
    """Record images into a cache; None in a process of torchrun that writes no file."""
    share, team = part_of(request.shard, request.images)
    path = request.path
    refuse_suffix(path, ".h5", ".hdf5")
    refuse_output(path, force=request.force)
    classifier = request.model.load()
    source, reading = open_source(request.images, classifier, timeout=request.timeout)
    if request.virtual:
        _require_same_network(request, classifier)
    what, made_with = records_of(request, classifier)
    precision = request.model.precision()
    batch_size = request.model.batch_size(classifier)
    if request.match_accuracy is not None and not isinstance(source, VirtualImages):
        raise OodcliError(
            f"--match-accuracy needs virtual images from invert, but {request.images} is not a "
            "file of these"
        )
    rows: ImageSource = source
    if request.match_accuracy is not None and isinstance(source, VirtualImages):
        rows = Patched(source, 0.0)  # as many as with the side that is found below
    recorder = Recorder(classifier, what | {"logits"}, made_with=made_with, precision=precision)
    log_records(recorder)
    made = provenance(
        classifier,
        source=request.images,
        command=request.command,
        seed=request.model.running.seed,
        precision=precision,
        virtual=request.virtual,
        matched_accuracy=request.match_accuracy,
        shard=shard_of(share, len(rows), batch_size, lambda: paths_sha256(rows)),
        left_out=source.left_out,
    )
    settings = _settings(request, recorder, source, reading, batch_size)
    with ExitStack() as stack:
        kept = stack.enter_context(
            kept_work(
                path,
                job_of(made, **settings),
                made.command,
                restart=request.restart and (team is None or team.first_try()),
                team=team,
            )
        )
        log_kept(kept)
        if request.match_accuracy is not None and isinstance(source, VirtualImages):
            source = _patched(
                source,
                request.match_accuracy,
                lambda plain, target: degrading(
                    classifier, plain, target, batch_size=batch_size, precision=precision
                ),
                kept,
                team,
            )
        work = Work(kept, share, team)
        mine = len(work.part(len(source), batch_size))
        # Those of the inversion are of images without patches.
        whole = request.match_accuracy is None
        sensitivities = whole and "layers.gradient" in what and _measured(request)
        summary = extract_to_file(
            *(classifier, source, recorder, path, made),
            batch_size=batch_size,
            sensitivity_from=Path(request.images) if sensitivities else None,
            force=request.force,
            progress=watched(watch, mine, before=work.rows(len(source), batch_size)),
            timeout=request.timeout,
            work=work,
        )
    notes.done(log, "recording")
    if summary is None:
        return None
    return Extracted(**{**summary, "file": path}, left_out=dict(made.left_out))


def _measured(request: ExtractRequest) -> bool:
    """Whether the images are virtual ones with the sensitivities of their inversion."""
    return request.virtual and has_sensitivity(Path(request.images))


def records_of(
    request: ExtractRequest, classifier: Classifier
) -> tuple[frozenset[str], dict[str, Making]]:
    """Records to store, and how to make them, by group. Raises OodcliError for an unknown record,
    and for parameters of a detector that is not among ``--for`` and decides how no record is
    made."""
    given = request.parameters or {}
    kinds = [own.find(name) for name in request.for_detectors]
    named = {kind.name: kind for kind in kinds}
    for name in sorted(given.keys() - named.keys()):
        if not detectors.is_known(name) or detectors.get(name).records_with() is None:
            raise OodcliError(f"-p {name}.…: {name} is not among the detectors of --for")
        named[name] = detectors.get(name)  # for a record that --record names
    wants = {
        name: kind.records_with(**parse(kind, given.get(name, {}))) for name, kind in named.items()
    }
    what = _records(request, classifier, for_kinds=bool(kinds))
    for kind in kinds:
        what |= _needs_of(kind, given, virtual=request.virtual)
    return what | ({"mirror"} if request.mirror else set()), one_way(wants.items())


def _needs_of(kind: type[Detector], given: Parameters, *, virtual: bool) -> frozenset[str]:
    fit_needs = kind.fit_needs(**parse(kind, given.get(kind.name, {})))
    if virtual or "layers.sensitivity" not in fit_needs:  # else these are images to score
        return kind.needs | fit_needs
    return kind.needs


def _records(request: ExtractRequest, classifier: Classifier, *, for_kinds: bool) -> frozenset[str]:
    """for_kinds: whether ``--for`` is given; then only the needs of those detectors are
    recorded."""
    possible = recordable(classifier)
    if request.record is None and not for_kinds:
        usual = CHEAP | ({"layers.gradient"} if request.virtual else set())
        missing = sorted(usual - possible - {"deconf.h", "mos.others"})
        if missing:
            why = impossible(missing, tapped=bool(classifier.taps))
            notes.say(log, f"not recorded: {', '.join(missing)}, as {classifier.arch}: {why}")
        return usual & possible
    if list(request.record or ()) == ["all"]:
        return possible
    what = frozenset(request.record or ())
    unknown = sorted(what - KNOWN_RECORDS)
    if unknown:
        known = ", ".join(sorted(KNOWN_RECORDS))
        raise OodcliError(f"--record {unknown[0]}: expected records from {known}, or all")
    return what


def _settings(
    request: ExtractRequest,
    recorder: Recorder,
    source: ImageSource,
    reading: int | None,
    batch_size: int,
) -> dict[str, Any]:
    """Further settings that decide the rows of the cache."""
    matched = request.match_accuracy
    return {
        **request.model.job(),
        **images_of(source),
        **({} if reading == 0 else {"the reading of its labels": reading}),
        "--record": sorted(recorder.asked),
        **{group: asdict(making) for group, making in recorder.made_with.items()},
        "--match-accuracy": None if matched is None else [f"patches of {VERSIONS} others", matched],
        "--batch-size": batch_size,
    }


def _patched(
    source: VirtualImages,
    target: float,
    find: Callable[[VirtualImages, float], tuple[float, float]],
    kept: Kept,
    team: Team | None,
) -> Patched:
    """Virtual images on which the network has the target accuracy. The patches come from earlier
    results or from the first process of torchrun, else from ``find``."""

    found = kept.about.decided

    def degrade() -> dict[str, Any]:
        return found or dict(zip(("side", "reached"), find(source, target), strict=True))

    found.update(degrade() if team is None else team.agree("patches", degrade))
    notes.say(
        log,
        f"patches with {found['side']:.3f} of the image side bring the network's accuracy on the "
        f"{len(source)} virtual images down to {found['reached']:.2%}",
        word="",
    )
    notes.done(log, "the patches")
    return Patched(source, found["side"])


def _require_same_network(request: ExtractRequest, classifier: Classifier) -> None:
    """Raises OodcliError for virtual images of another network."""
    images, here = request.images, classifier.preprocessing
    made = read_provenance(Path(images))
    # How photographs are read and resized does not concern images that are the network's inputs.
    inputs = replace(here, **{name: getattr(made.preprocessing, name) for name in INPUTS})
    Origin(made.checkpoint_sha256, made.averaged, inputs).require_same(
        Origin(classifier.sha256, classifier.averaged, here),
        Words(
            f"{images} was made from",
            f"{request.model.name} is",
            weights="these are its",
            inputs=(f"{images} was made for inputs with", "here with"),
            hint="extract it with that one, or invert this",
        ),
        kind=OodcliError,
    )


def _stem(images: str) -> str:
    """``a/photos/`` → photos, ``v.h5`` → v, ``noise:gaussian?n=5`` → gaussian."""
    if images == "-":
        return "stdin"
    name = images.partition("?")[0].rpartition(":")[2].rstrip("/")
    path = Path(name or "images")
    stem = path.stem if path.suffix and not path.is_dir() else path.name
    return stem.removesuffix(".tar") or "images"
