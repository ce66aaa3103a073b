"""``oodcli extract``: activations and gradients of images, cached."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oodcli.cli import console, details, verdicts
from oodcli.cli.completions import complete_detector_list, complete_records
from oodcli.cli.options import (
    Checkpoint,
    Force,
    Images,
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
    from oodcli.networks.classifier import Classifier


@takes_model
def command(
    checkpoint: Checkpoint,
    images: Images,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Default: IMAGES.features.h5", show_default=False),
    ] = None,
    record: Annotated[
        str | None,
        typer.Option(
            metavar="WORD,WORD",
            help="logits, embedding, layers.mean, layers.std, layers.gradient, batchnorm.mean, "
            "batchnorm.var, layers.gram, layers.peak, odin.logits, deconf.h, mos.others, or all.",
            show_default="everything that one pass gives; of virtual images, the gradients too",
            autocompletion=complete_records,
        ),
    ] = None,
    for_detectors: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="NAME,NAME",
            help="Record what these detectors need; FILE.py:CLASS is one of your own.",
            autocompletion=complete_detector_list,
            show_default=False,
        ),
    ] = None,
    match_accuracy: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Put patches of others into virtual images until the network is right on this "
            "share of them, its published test accuracy: rows to calibrate on.",
            show_default=False,
        ),
    ] = None,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="Record the mirror images, too.")
    ] = False,
    param: Parameters = None,
    json: Json = False,
    force: Force = False,
    restart: Restart = False,
    timeout: Timeout = None,
    shard: Shard = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    *,
    model: ModelOptions,
) -> None:
    """Run the network over images once and cache what detectors need."""
    from oodcli import detectors
    from oodcli.cli import torchrun
    from oodcli.detectors.hyperparameters import parse
    from oodcli.errors import OodcliError
    from oodcli.files.atomic import refuse_suffix
    from oodcli.files.hdf5 import format_of
    from oodcli.files.journal import journal, refuse_output
    from oodcli.files.virtual import FORMAT
    from oodcli.images import open_images
    from oodcli.images.arrays import VirtualImages
    from oodcli.inversion.degrade import Patched
    from oodcli.jobs.shards import WHOLE
    from oodcli.recording.recorder import Recorder, recordable
    from oodcli.records import CHEAP, KNOWN_RECORDS
    from oodcli.stages.chosen import odin_step
    from oodcli.stages.extract import degrading, extract_to_file
    from oodcli.stages.labels import settle_labels
    from oodcli.stages.record import (
        Work,
        job_of,
        listing,
        paths_sha256,
        provenance,
        shard_of,
    )

    share, team = torchrun.part(shard, images)
    path = output or Path(_stem(images) + ".features.h5")
    refuse_suffix(path, ".h5", ".hdf5")
    refuse_output(path, force=force)
    classifier = model.load(checkpoint)
    source = open_images(images, classifier.preprocessing, classifier.class_names, stdin=sys.stdin)
    reading = settle_labels(source, classifier, timeout=timeout)
    if source.note:
        console.say(f"note: {source.note}")
    details.say_source(source, timeout)
    console.lap("the list of images")
    virtual = format_of(Path(images)) == FORMAT
    if virtual:
        _require_same_network(classifier, checkpoint, images)
    given = parameters(param)
    chosen = [detectors.find(name) for name in _words(for_detectors)]
    unused = sorted(given.keys() - {kind.name for kind in chosen} - {"odin"})
    if unused:
        raise OodcliError(f"-p {unused[0]}.…: {unused[0]} is not among --for")
    step = odin_step([detectors.get("odin")(**parse(detectors.get("odin"), given.get("odin", {})))])
    possible = recordable(classifier)
    what: frozenset[str]
    if record is None and not chosen:
        if classifier.head_name is None:
            raise OodcliError(
                f"{classifier.arch} has no linear layer at its end, so there is no embedding: say "
                "what to record instead, such as --record logits,layers.mean"
            )
        what = (CHEAP | ({"layers.gradient"} if virtual else set())) & possible
    elif record == "all":
        what = possible
    else:
        what = frozenset(_words(record))
        unknown = sorted(what - KNOWN_RECORDS)
        if unknown:
            known = ", ".join(sorted(KNOWN_RECORDS))
            raise OodcliError(f"--record {unknown[0]}: expected some of {known}, or all")
    for kind in chosen:
        fit_needs = kind.fit_needs(**parse(kind, given.get(kind.name, {})))
        what |= kind.needs
        if virtual or "layers.sensitivity" not in fit_needs:  # else these are images to score
            what |= fit_needs
    if mirror:
        what |= {"mirror"}
    precision = model.resolved_precision(fast=False)
    batch_size = model.resolved_batch_size(classifier)
    if match_accuracy is not None and not isinstance(source, VirtualImages):
        raise OodcliError(
            f"--match-accuracy is for virtual images, made by invert, but {images} is not"
        )
    recorder = Recorder(classifier, what | {"logits"}, odin=step, precision=precision)
    details.say_records(recorder.asked)
    made = provenance(
        classifier,
        source=images,
        command=console.command_line(),
        seed=model.seed,
        precision=precision,
        virtual=virtual,
        matched_accuracy=match_accuracy,
        shard=shard_of(share, len(source), batch_size, lambda: paths_sha256(source)),
        left_out=source.left_out,
    )
    settings = {
        **model.job(),
        "the list of images": listing(source),
        **({} if reading == 0 else {"the reading of its labels": reading}),
        "--record": sorted(recorder.asked),
        "odin": asdict(recorder.odin),
        "--match-accuracy": None if match_accuracy is None else ["equal patches", match_accuracy],
        "--batch-size": batch_size,
    }
    with ExitStack() as stack:
        kept = stack.enter_context(
            journal(
                path,
                job_of(made, **settings),
                made.command,
                restart=restart and (team is None or team.first_try()),
                share=WHOLE if team is None else team.share,
            )
        )
        details.say_journal(kept)
        if match_accuracy is not None and isinstance(source, VirtualImages):
            plain, target = source, match_accuracy

            def degrade() -> dict[str, Any]:
                side, reached = degrading(
                    classifier, plain, target, batch_size=batch_size, precision=precision
                )
                return {"side": side, "reached": reached}

            decided = kept.about.decided
            if team is not None:
                decided = team.agree("patches", decided, degrade)
            kept.about.decided.update(decided or degrade())
            decided = kept.about.decided
            source = Patched(plain, decided["side"])
            console.say(
                f"patches of {decided['side']:.3f} of the side bring the network down to "
                f"{decided['reached']:.2%} of these {len(source)} virtual images"
            )
            console.lap("the patches")
        work = Work(kept, share, team)
        mine = len(work.part(len(source), batch_size))
        advance = stack.enter_context(console.progress(mine, "extract", before=kept.rows))
        summary = extract_to_file(
            classifier,
            source,
            recorder,
            path,
            made,
            batch_size=batch_size,
            sensitivity_from=Path(images) if virtual and "layers.gradient" in what else None,
            force=force,
            progress=advance,
            timeout=timeout,
            work=work,
        )
    console.lap("recording")
    if summary is None:
        return
    if json:
        console.emit_json({**summary, "left_out": dict(made.left_out)})
    accuracy = summary["accuracy"]
    console.say(
        f"wrote {path}: {summary['images']} images, {summary['unreadable']} unreadable"
        + (
            ""
            if accuracy is None
            else f"; the network is right on {accuracy:.2%} of those labelled"
        )
    )
    verdicts.say_left_out(made.left_out)
    if summary["unreadable"] and team is None:  # torchrun would take it for a crash
        raise typer.Exit(3)


def _require_same_network(classifier: Classifier, checkpoint: Path, images: str) -> None:
    """Virtual images tell of the network that they were made from, and of no other."""
    from oodcli.errors import OodcliError
    from oodcli.files.made import weights_of
    from oodcli.files.virtual import read_provenance
    from oodcli.networks.preprocessing import INPUTS

    origin = read_provenance(Path(images))
    if origin.checkpoint_sha256 != classifier.sha256:
        raise OodcliError(
            f"{images} was made from the checkpoint {origin.checkpoint_sha256[:12]}…, but "
            f"{checkpoint} is {classifier.sha256[:12]}…: extract it with that one, or invert this"
        )
    if origin.averaged != classifier.averaged:
        raise OodcliError(
            f"{images} was made from the {weights_of(origin.averaged)} of the checkpoint, but "
            f"these are its {weights_of(classifier.averaged)}: give --ema to both or to neither"
        )
    here = classifier.preprocessing
    # How photographs are read and resized does not concern images that are the network's inputs.
    made = replace(here, **{name: getattr(origin.preprocessing, name) for name in INPUTS})
    unlike = made.unlike(here)
    if unlike is not None:
        raise OodcliError(
            f"{images} was made for inputs with {unlike[0]}, but here it is {unlike[1]}: use the "
            "same options or model card for both"
        )


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _stem(images: str) -> str:
    """``a/photos/`` → photos, ``v.h5`` → v, ``noise:gaussian?n=5`` → gaussian."""
    if images == "-":
        return "stdin"
    name = images.partition("?")[0].rpartition(":")[2].rstrip("/")
    path = Path(name or "images")
    stem = path.stem if path.suffix and not path.is_dir() else path.name
    return stem.removesuffix(".tar") or "images"
