"""What ``--verbose`` says: what a command decided or assumed, and does not say otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oodcli.cli import console

if TYPE_CHECKING:
    from oodcli.cli.options import ModelOptions
    from oodcli.detectors.base import Detector
    from oodcli.files.artefact import Artefact
    from oodcli.files.cache import FeatureCache
    from oodcli.files.journal import Journal
    from oodcli.images import ImageSource
    from oodcli.inversion.invert import Plan
    from oodcli.networks.classifier import Classifier
    from oodcli.stages.chosen import Chosen
    from oodcli.stages.fit import FitInputs
    from oodcli.stages.verdict import Rule


def say_versions() -> None:
    """What runs, and where."""
    import platform

    from oodcli._version import __version__
    from oodcli.cli.versions import installed

    console.detail(
        f"oodcli {__version__}, Python {platform.python_version()}, torch {installed('torch')}, in "
        f"{Path.cwd()}"
    )


def say_classifier(model: ModelOptions, checkpoint: Path, classifier: Classifier) -> None:
    """Where everything that is known of a network comes from, what is tapped, and where it runs."""
    if not console.verbose:
        return
    import torch

    from oodcli.networks.architectures import resizing
    from oodcli.networks.card import read_card

    path = model.card or checkpoint.with_suffix(".toml")
    card = read_card(path) if path.is_file() else {}
    console.detail(f"model card: {path}" if path.is_file() else f"no model card: {path} is missing")
    prep = classifier.preprocessing
    names = classifier.class_names
    for key, what, fallback in (
        ("arch", f"architecture {classifier.arch}", "recognition"),
        ("num_classes", f"{classifier.num_classes} classes", "recognition"),
        ("class_names", f"class names {_some(names)}", "default"),
        ("input_size", f"input size {prep.input_size[0]}x{prep.input_size[1]}", "recognition"),
        ("mean", f"mean {_numbers(prep.mean)}", "recognition"),
        ("std", f"std {_numbers(prep.std)}", "recognition"),
        ("resize", resizing(prep.resize), "recognition" if prep.resize else "default"),
        (
            "interpolation",
            f"{prep.interpolation} interpolation",
            "default" if prep.interpolation == "bilinear" else "recognition",
        ),
        ("exif", f"EXIF orientation: {prep.exif}", "default"),
        ("image_range", _range(prep.image_range), "default"),
        ("layers", _tapped(classifier), "default"),
    ):
        if getattr(model, key, None) is not None:
            origin = "--" + key.replace("_", "-")
        elif key == "resize" and model.crop is not None:
            origin = "--crop"
        else:
            origin = path.name if key in card else fallback
        console.detail(f"{what}, by {origin}")
    console.detail(
        f"device {classifier.device}, by --device {model.device}; threads of torch: "
        f"{torch.get_num_threads()}; seed {model.seed}"
    )


def _range(limits: tuple[float, float] | None) -> str:
    if limits is None:
        return "images of more than 8 bits scaled from the range of their type"
    return f"images of more than 8 bits scaled from {limits[0]:g}…{limits[1]:g}"


def _tapped(classifier: Classifier) -> str:
    kinds: dict[str, list[str]] = {}
    for tap in classifier.taps:
        kinds.setdefault(tap.kind, []).append(tap.name)
    listed = "; ".join(f"{len(names)} {kind}: {' '.join(names)}" for kind, names in kinds.items())
    return f"{len(classifier.taps)} layers tapped ({listed})" if listed else "no layer tapped"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def say_source(source: ImageSource, timeout: float | None) -> None:
    """How many images there are, and what reads them."""
    from oodcli.images.reading import MOST_WORKERS, _processors

    count = min(MOST_WORKERS, _processors())
    crew = f"threads: {count}" if timeout is None else f"processes: {count}, {timeout:g} s an image"
    labels = "with labels" if source.labelled else "without labels"
    console.detail(f"{len(source)} images of {source.name}, {labels}; decoding {crew}")


def say_cache(use: str, cache: FeatureCache) -> None:
    """What is in a cache, and what for."""
    made = cache.provenance
    kind = "virtual images" if made.virtual else "images"
    console.detail(
        f"{use}: {cache.path}, {cache.count} {kind} of {made.source}, with "
        f"{', '.join(sorted(cache.recorded))}"
    )


def say_plan(plan: Plan) -> None:
    """How images are inverted."""
    console.detail(f"objective {_pairs(asdict(plan.objective))}")
    console.detail(
        f"{plan.per_class} images of each of {len(plan.classes)} classes, in batches of at most "
        f"{plan.batch_size}, {plan.total_steps} steps each"
    )


def say_records(what: frozenset[str]) -> None:
    """What is recorded of a batch, and what that takes. what: words of ``ROW_RECORDS``, and
    ``mirror``."""
    odin, gradient = "odin.logits" in what, "layers.gradient" in what
    views = ", and again of its mirror images" if "mirror" in what else ""
    console.detail(
        f"records {', '.join(sorted(what - {'mirror'}))}; passes of a batch: {1 + odin} forward, "
        f"{odin + gradient} backward{views}"
    )


def say_journal(kept: Journal) -> None:
    """Where what is done is kept, and how much of it there is."""
    console.detail(f"what is done is kept in {kept.path}; images in it: {kept.rows}")


def say_chosen(
    chosen: Sequence[Chosen], rules: Mapping[str, Rule], stream_rule: object | None
) -> None:
    """What detectors score with, where they come from, and what their verdicts rest on."""
    from oodcli.detectors.serial import settings

    for each in chosen:
        origin = f"fitted on {each.trained_on} rows" if each.trained_on else "needs no fitting"
        if each.artefact:
            origin = f"{each.artefact}, {origin}"
        rule = rules.get(each.name)
        verdict = f"verdicts by {rule.basis}" if rule else "verdicts by the stream"
        console.detail(
            f"{each.name}: {origin}; {_pairs(settings(each.detector))}; needs "
            f"{', '.join(sorted(each.detector.score_needs)) or 'nothing'}"
            + (f"; {verdict}" if rule or stream_rule else "; no verdicts")
        )


def say_fit(
    inputs: FitInputs,
    chosen: Sequence[type[Detector] | Artefact],
    hyperparameters: Mapping[str, Mapping[str, Any]],
) -> None:
    """What detectors are fitted and calibrated on, and what each needs."""
    if not console.verbose:
        return
    from oodcli.files.artefact import Artefact

    caches = (("fit on", inputs.train), ("OOD rows", inputs.ood), ("noise", inputs.noise))
    for use, cache in (*caches, *(("calibrate on", each) for each in inputs.calibrate)):
        if cache is not None:
            say_cache(use, cache)
    if inputs.labelled is not None:
        console.detail(
            f"labelled: {len(inputs.labelled)} rows, {sum(inputs.labelled.values())} OOD"
        )
    for each in chosen:
        if isinstance(each, Artefact):
            console.detail(f"{each.detector.name}: fitted already, by {each.path}")
            continue
        given = hyperparameters.get(each.name, {})
        needs = ", ".join(sorted(each.fit_needs(**given))) or "nothing"
        console.detail(f"{each.name}: to be fitted it needs {needs}; {_pairs(given)}")
    console.detail(f"calibration: {_calibration(inputs)}")


def _calibration(inputs: FitInputs) -> str:
    if inputs.calibrate:
        return f"on the rows of {', '.join(str(cache.path) for cache in inputs.calibrate)}"
    if inputs.labelled is not None:
        return "none of new: rows that somebody marked teach a threshold"
    if inputs.train is None or inputs.train.provenance.virtual:
        return "none: without --calibrate it takes real rows"
    return "on rows held out of those to fit on"


def _pairs(values: Mapping[str, Any]) -> str:
    found = ", ".join(f"{name}={value}" for name, value in values.items())
    return found or "parameters as they are by default"
