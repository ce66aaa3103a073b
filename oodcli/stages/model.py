"""The checkpoint of a job, and how its network runs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from oodcli import notes
from oodcli.errors import OodcliError, first_line
from oodcli.files.hub import CONFIG, PROCESSORS, card_path, folder_of
from oodcli.jobs.torchrun import launched, local_rank
from oodcli.networks import hub, load
from oodcli.networks.architectures import resizing
from oodcli.networks.card import NOTHING, Overrides, read_card
from oodcli.networks.classifier import Classifier
from oodcli.networks.devices import multiplies_bfloat16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Path of a checkpoint, and overrides for its network."""

    path: Path
    overrides: Overrides = NOTHING
    prefer_ema: bool = False
    trust_pickle: bool = False


@dataclass(frozen=True)
class Running:
    """How a network runs. device, precision: a name, or ``auto``. batch_size: None for a default by
    image size. precision: None for the usual one of a command. seed: random seed."""

    device: str = "auto"
    batch_size: int | None = None
    precision: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Model:
    """A checkpoint, or a loaded classifier, and how its network runs. loaded: the network of the
    checkpoint, for jobs of several stages."""

    checkpoint: Checkpoint | Classifier
    running: Running = field(default_factory=Running)
    loaded: Classifier | None = None

    @property
    def name(self) -> str:
        """The checkpoint's path; for a loaded classifier, its architecture."""
        if isinstance(self.checkpoint, Classifier):
            return f"the classifier {self.checkpoint.arch}"
        return str(self.checkpoint.path)

    @property
    def path(self) -> Path | None:
        return None if isinstance(self.checkpoint, Classifier) else self.checkpoint.path

    def load(self) -> Classifier:
        """The classifier. Its assumptions are logged. Raises CheckpointError, and OodcliError for
        an unusable device."""
        given = self.checkpoint
        if isinstance(given, Classifier):
            return given
        if self.loaded is not None:
            return self.loaded
        classifier = load.load_classifier(
            given.path,
            given.overrides,
            device=self.device(),
            prefer_ema=given.prefer_ema,
            trust_pickle=given.trust_pickle,
        )
        for assumption in classifier.assumptions:
            notes.say(log, assumption, "assumed")
        if log.isEnabledFor(logging.DEBUG):
            _log_origins(given, self.running, classifier)
        notes.done(log, "checkpoint")
        return classifier

    def job(self) -> dict[str, Any]:
        """Settings that decide the network."""
        given = self.checkpoint
        if isinstance(given, Classifier):
            return {"--layers": [tap.name for tap in given.taps], "--ema": given.averaged}
        said = given.overrides
        later = {"--state-key": said.state_key, "--multi-label": said.multi_label or None}
        return {
            "--layers": said.layers,
            "--ema": given.prefer_ema,
            **{option: value for option, value in later.items() if value is not None},
        }

    def device(self) -> str:
        """The device. ``auto`` is the first GPU, under torchrun one per process; without a GPU the
        CPU. A loaded classifier stays on its device. Raises OodcliError for an unusable device."""
        if isinstance(self.checkpoint, Classifier):
            return str(self.checkpoint.device)
        device = self.running.device
        if device == "auto":
            if not torch.cuda.is_available():
                return "cpu"
            return f"cuda:{local_rank() % torch.cuda.device_count()}" if launched() else "cuda"
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = first_line(error)
            raise OodcliError(f"--device {device} cannot be used ({reason})") from error
        return device

    def batch_size(self, classifier: Classifier) -> int:
        """128 for small images, fewer for large ones."""
        given = self.running.batch_size
        height, width = classifier.preprocessing.input_size
        size = given or max(16, min(128, 128 * 128 * 128 // (height * width)))
        log.debug("batches of %d, %s", size, _origin("--batch-size", given))
        return size

    def precision(self, usual: str = "float32") -> str:
        """float32 or bfloat16. ``auto`` is bfloat16 if the device multiplies it in hardware. usual:
        what a command uses where none was chosen. Raises OodcliError for another word."""
        given = self.running.precision
        precision, origin = usual if given is None else given, _origin("--precision", given)
        if precision not in ("auto", "float32", "bfloat16"):
            raise OodcliError(f"--precision {precision}: expected auto, float32 or bfloat16")
        if precision == "auto" and multiplies_bfloat16(self.device()):
            log.debug("precision bfloat16, which this device multiplies in hardware, %s", origin)
            return "bfloat16"
        found = "float32" if precision == "auto" else precision
        log.debug("precision %s, %s", found, origin)
        return found


def _origin(option: str, given: object) -> str:
    return "by default" if given is None else f"by {option}"


def _log_origins(given: Checkpoint, running: Running, classifier: Classifier) -> None:
    """Log the origin of each fact about a network, its taps, and its device."""
    path = given.overrides.card or card_path(given.path)
    card = read_card(path) if path.is_file() else {}
    log.debug(f"model card: {path}" if path.is_file() else f"no model card: {path} is missing")
    prep = classifier.preprocessing
    bilinear = prep.interpolation == "bilinear"
    described = _described(given.path, classifier.arch)
    for key, what, fallback in (
        ("arch", f"architecture {classifier.arch}", "recognition"),
        ("num_classes", f"{classifier.num_classes} classes", "recognition"),
        ("class_names", f"class names {_some(classifier.class_names)}", "default"),
        ("input_size", f"input size {prep.input_size[0]}x{prep.input_size[1]}", "recognition"),
        ("mean", f"mean {_numbers(prep.mean)}", "recognition"),
        ("std", f"std {_numbers(prep.std)}", "recognition"),
        ("resize", resizing(prep.resize), "recognition" if prep.resize else "default"),
        (
            "interpolation",
            f"{prep.interpolation} interpolation",
            "default" if bilinear else "recognition",
        ),
        ("exif", f"EXIF orientation: {prep.exif}", "default"),
        ("image_range", _range(prep.image_range), "default"),
        ("decode", f"decoding: {prep.decode}", "default"),
        ("layers", _tapped(classifier), "default"),
    ):
        if getattr(given.overrides, key) is not None:
            origin = "--" + key.replace("_", "-")
        elif key == "resize" and given.overrides.crop is not None:
            origin = "--crop"
        elif key in described and key not in card:
            log.debug("%s, from %s", what, described[key])
            continue
        else:
            origin = path.name if key in card else fallback
        log.debug("%s, by %s", what, origin)
    log.debug(
        "device %s, by --device %s; threads of torch: %d; seed %d",
        *(classifier.device, running.device, torch.get_num_threads(), running.seed),
    )


def _described(path: Path, arch: str) -> dict[str, str]:
    """The file of a model hub's folder that describes each fact; empty for other checkpoints."""
    config, folder = hub.config_of(path), folder_of(path)
    if config is None or folder is None or hub.arch_of(config, path) != arch:
        return {}
    found = dict.fromkeys(("arch", "num_classes"), CONFIG)
    if hub.class_names(config):
        found["class_names"] = CONFIG
    files = [CONFIG] if hub.is_timm(config) else [n for n in PROCESSORS if (folder / n).is_file()]
    keys = ("input_size", "mean", "std", "resize", "interpolation")
    return found | (dict.fromkeys(keys, files[0]) if files else {})


def _range(limits: tuple[float, float] | None) -> str:
    if limits is None:
        return "images of more than 8 bits scaled from their type's range"
    return f"images of more than 8 bits scaled from {limits[0]:g}…{limits[1]:g}"


def _tapped(classifier: Classifier) -> str:
    kinds: dict[str, list[str]] = {}
    for tap in classifier.taps:
        kinds.setdefault(tap.kind, []).append(tap.name)
    listed = "; ".join(f"{len(names)} {kind}: {' '.join(names)}" for kind, names in kinds.items())
    return f"{len(classifier.taps)} layers tapped ({listed})" if listed else "no layers tapped"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
