"""A checkpoint to virtual images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodcli.classifier import Classifier
from oodcli.files.atomic import atomic
from oodcli.files.hdf5 import Provenance, writing
from oodcli.files.journal import Journal, Record
from oodcli.files.virtual import VirtualWriter
from oodcli.inversion.invert import Plan, VirtualBatch, invert
from oodcli.inversion.quality import Quality
from oodcli.inversion.step import Step
from oodcli.report.contact_sheet import contact_sheet
from oodcli.stages.record import Progress, no_progress


def invert_to_file(
    classifier: Classifier,
    plan: Plan,
    path: Path,
    provenance: Provenance,
    *,
    step: Step | None = None,
    force: bool = False,
    progress: Progress = no_progress,
    journal: Journal | None = None,
) -> dict[str, Any]:
    """Virtual images into ``path`` and a contact sheet beside it; returns the quality report.
    step: as ``prepare`` makes it. journal: goes on after the batches that it keeps."""
    step = step or Step(classifier, plan.objective, plan.precision)
    sheet_path = path.with_suffix(".png")
    settings = {
        **asdict(plan.objective),
        "steps": plan.total_steps,
        "half_steps": plan.half_steps,
        "per_class": plan.per_class,
        "batch_size": plan.batch_size,
        "path": step.path,
    }
    count = len(plan.classes) * plan.per_class
    quality = Quality(classifier)
    shown: list[tuple[Tensor, Tensor]] = []
    if journal is not None:
        force = force or journal.complete
        provenance = replace(provenance, command=journal.about.command)

    def batches() -> Iterator[VirtualBatch]:
        first = 0
        if journal is not None:
            yield from journal.kept(_restored)
            first = journal.records
        for batch in invert(classifier, plan, first=first, step=step, progress=progress):
            if journal is not None:
                journal.append(_kept(batch))
            yield batch

    with ExitStack() as stack:
        unfinished = stack.enter_context(atomic(path, force=force))
        sheet = stack.enter_context(atomic(sheet_path, force=force))
        with writing(unfinished) as new:
            writer = VirtualWriter(new.file, provenance, count, settings)
            for batch in batches():
                writer.append(batch.images, batch.label, batch.sensitivity)
                new.check()
                quality.add(batch.images, batch.label)
                if len(shown) < 10:
                    shown.append((batch.images, batch.label))
            report = quality.report()
            writer.finish(report)
        images, labels = (torch.cat(parts) for parts in zip(*shown, strict=True))
        pixels = classifier.preprocessing.to_pixels(images.float()).clamp(0, 1)
        contact_sheet(pixels, labels, classifier.class_names, sheet)
        if journal is not None:
            journal.finish(path, sheet_path, force=force)
    return {
        "file": str(path),
        "contact_sheet": str(sheet_path),
        "images": count,
        "classes": len(plan.classes),
        "objective": plan.objective.name,
        "steps": plan.total_steps,
        "precision": plan.precision,
        "device": str(classifier.device),
        "path": step.path,
        **report,
    }


def _kept(batch: VirtualBatch) -> Record:
    layers = {f"layers/{name}": rows.numpy() for name, rows in batch.sensitivity.items()}
    arrays = {"images": batch.images.numpy(), "label": batch.label.numpy(), **layers}
    return Record(len(batch.label), arrays, {"layers": list(batch.sensitivity)})


def _restored(record: Record) -> VirtualBatch:
    tensors = {name: torch.from_numpy(array) for name, array in record.arrays.items()}
    layers = {name: tensors[f"layers/{name}"] for name in record.words["layers"]}
    return VirtualBatch(tensors["images"], tensors["label"], layers)
