"""What a checkpoint is and which detectors it allows: the part of ``oodcli inspect`` that needs the
network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oodcli import detectors
from oodcli.errors import FileError
from oodcli.files.atomic import atomic
from oodcli.networks.card import write_card
from oodcli.networks.classifier import Classifier
from oodcli.recording.recorder import recordable, records_of
from oodcli.records import ROW_RECORDS
from oodcli.stages.model import Model


def inspect(model: Model, card: Path | None = None, *, force: bool = False) -> dict[str, Any]:
    """Facts about a network and its preprocessing, as JSON can hold them. card: where to write
    them as a model card. Raises CheckpointError, or FileError for a card that exists."""
    if card is not None and card.exists() and not force:
        raise FileError(f"{card} exists: overwrite it with --force")
    classifier = model.load()
    if card is not None:
        with atomic(card, force=force) as partial:
            write_card(classifier, partial)
    path = None if model.path is None else str(model.path)
    return {"checkpoint": path, **_facts(classifier), "detectors": _verdicts(classifier)}


def _facts(classifier: Classifier) -> dict[str, Any]:
    head, taps = classifier.head, classifier.taps
    return {
        "sha256": classifier.sha256,
        "arch": classifier.arch,
        "parameters": classifier.parameter_count,
        "num_classes": classifier.num_classes,
        "class_names": list(classifier.class_names),
        "preprocessing": classifier.preprocessing.to_dict(),
        "assumptions": list(classifier.assumptions),
        "batchnorm_layers": [tap.name for tap in taps if tap.kind == "batchnorm"],
        "taps": [
            {
                "name": tap.name,
                "module": tap.module,
                "kind": tap.kind,
                "channels": tap.channels,
                "channel_dim": tap.channel_dim,
                "positions": tap.spatial_size,
                "records": records_of(classifier, tap),
            }
            for tap in taps
        ],
        "head": None
        if head is None
        else {"name": classifier.head_name, "width": head.weight.shape[1]},
        "embedding": classifier.head_name,
        "records": [word for word in ROW_RECORDS if word in recordable(classifier)],
        "retrained_head": None if classifier.retrained is None else classifier.retrained.suffix,
    }


def _verdicts(classifier: Classifier) -> list[dict[str, Any]]:
    """Every detector, and which of its records the network cannot give."""
    available = recordable(classifier) | {"label"}
    found = []
    for name in detectors.names():
        kind = detectors.get(name)
        lacks = sorted((kind.needs | kind.fit_needs()) - available)
        found.append({"name": name, "allowed": not lacks, "fitted": kind.fitted, "lacks": lacks})
    return found
