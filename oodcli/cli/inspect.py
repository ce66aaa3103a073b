"""``oodcli inspect``: what a checkpoint is, and which detectors it allows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oodcli.cli import console
from oodcli.cli.options import Checkpoint, Force, Json, ModelOptions, Quiet, takes_model

if TYPE_CHECKING:
    from oodcli.classifier import Classifier


def describe(classifier: Classifier, path: Path) -> dict[str, Any]:
    """Everything that is shown, as JSON can hold it."""
    from oodcli import detectors
    from oodcli.recording import recordable

    available = recordable(classifier) | {"label"}
    verdicts = []
    for name in detectors.names():
        kind = detectors.get(name)
        missing = sorted((kind.needs | kind.fit_needs()) - available)
        verdicts.append(
            {"name": name, "allowed": not missing, "fitted": kind.fitted, "lacks": missing}
        )
    kinds: dict[str, list[str]] = {}
    for tap in classifier.taps:
        kinds.setdefault(tap.kind, []).append(tap.name)
    head = classifier.head
    return {
        "checkpoint": str(path),
        "sha256": classifier.sha256,
        "arch": classifier.arch,
        "parameters": classifier.parameter_count,
        "num_classes": classifier.num_classes,
        "class_names": list(classifier.class_names),
        "preprocessing": classifier.preprocessing.to_dict(),
        "assumptions": list(classifier.assumptions),
        "batchnorm_layers": kinds.get("batchnorm", []),
        "taps": [
            {"name": tap.name, "kind": tap.kind, "channels": tap.channels}
            for tap in classifier.taps
        ],
        "head": None
        if head is None
        else {"name": classifier.head_name, "width": head.weight.shape[1]},
        "retrained_head": None if classifier.retrained is None else classifier.retrained.suffix,
        "detectors": verdicts,
    }


@takes_model
def command(
    checkpoint: Checkpoint,
    write_card: Annotated[
        bool,
        typer.Option("--write-card", help="Write what was found into CHECKPOINT's model card."),
    ] = False,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    *,
    model: ModelOptions,
) -> None:
    """What a checkpoint is, and what each detector would need."""
    from oodcli.errors import FileError

    card = checkpoint.with_suffix(".toml")
    if write_card and card.exists() and not force:
        raise FileError(f"{card} exists: overwrite it with --force")
    classifier = model.load(checkpoint)
    found = describe(classifier, checkpoint)
    if json:
        console.emit_json(found)
    else:
        _print(found)
    if write_card:
        from oodcli.checkpoint import write_card as write
        from oodcli.files.atomic import atomic

        with atomic(card, force=force) as partial:
            write(classifier, partial)
        console.say(f"wrote {card}")


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table

    preprocessing = found["preprocessing"]
    height, width = preprocessing["input_size"]
    resize = preprocessing["resize"]
    how = f"shorter side to {resize}, centre crop" if resize else "resized straight to it"
    kinds = [tap["kind"] for tap in found["taps"]]
    others = ", ".join(
        f"{kinds.count(kind)} {kind}s" for kind in ("block", "stage", "other") if kind in kinds
    )
    head = found["head"]
    names = found["class_names"]
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    facts = {
        "checkpoint": found["checkpoint"],
        "architecture": found["arch"],
        "parameters": f"{found['parameters']:,}",
        "classes": f"{found['num_classes']}: {shown}",
        "input": f"{len(preprocessing['mean'])}×{height}×{width}, {how} "
        f"({preprocessing['interpolation']})",
        "mean, std": f"{_list(preprocessing['mean'])}; {_list(preprocessing['std'])}",
        "BatchNorm": f"{len(found['batchnorm_layers'])} layers with running statistics",
        "other taps": others or "none",
        "head": f"{head['name']}, {head['width']} features"
        if head
        else found["retrained_head"] or "none: last layer not linear",
        "sha256": found["sha256"],
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    console.emit_table(table)
    verdicts = Table(box=None, pad_edge=False)
    for column in ("detector", "possible", "how"):
        verdicts.add_column(column, overflow="fold")
    for detector in found["detectors"]:
        how = "fit it on a cache first" if detector["fitted"] else "needs no fitting"
        if not detector["allowed"]:
            how = f"lacks {', '.join(detector['lacks'])}"
        verdicts.add_row(detector["name"], "yes" if detector["allowed"] else "no", how)
    console.emit("")
    console.emit_table(verdicts)


def _list(numbers: list[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
