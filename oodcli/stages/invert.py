"""A checkpoint to virtual images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodcli.errors import OodcliError
from oodcli.files.atomic import atomic
from oodcli.files.hdf5 import Provenance, writing
from oodcli.files.virtual import VirtualWriter
from oodcli.inversion.invert import Plan, VirtualBatch, invert
from oodcli.inversion.quality import Quality, report
from oodcli.inversion.step import Step
from oodcli.jobs.kept import Stored
from oodcli.jobs.shards import Shard, Share
from oodcli.networks.classifier import Classifier
from oodcli.report.contact_sheet import contact_sheet
from oodcli.stages.record import ALONE, Progress, Work, no_progress

SHOWN = 1000
"""Number of images, from the first, that the contact sheet draws from."""


def invert_to_file(
    classifier: Classifier,
    plan: Plan,
    path: Path,
    provenance: Provenance,
    *,
    step: Step | None = None,
    force: bool = False,
    progress: Progress = no_progress,
    work: Work = ALONE,
) -> dict[str, Any] | None:
    """Write virtual images to ``path`` and a contact sheet beside it; returns the quality report,
    None in a process that writes no file. step: from ``prepare``."""
    step = step or Step(classifier, plan.objective, plan.precision)
    sheet_path = path.with_suffix(".png")
    settings = {
        **asdict(plan.objective),
        "steps": plan.total_steps,
        "half_steps": plan.half_steps,
        **({"per_class": plan.per_class} if plan.total is None else {"total": plan.total}),
        "batch_size": plan.batch_size,
        "path": step.path,
    }
    quality = Quality(classifier)
    shown: list[tuple[Tensor, Tensor]] = []
    if work.kept is not None:
        force = force or work.kept.about.complete
        provenance = replace(provenance, command=work.kept.about.command)

    def make(start: int, stop: int) -> Iterator[VirtualBatch]:
        return invert(classifier, plan, first=start, last=stop, step=step, progress=progress)

    batches = len(plan.batches())
    made = work.blocks(batches, 1, _restored, _stored, make, progress)
    if made is None:
        return None
    count = plan.images(work.share.part(batches))
    with ExitStack() as stack:
        unfinished = stack.enter_context(atomic(path, force=force))
        sheet = stack.enter_context(atomic(sheet_path, force=force))
        with writing(unfinished) as new:
            writer = VirtualWriter(new.file, provenance, count, settings)
            for batch in made:
                writer.append(batch.images, batch.label, batch.sensitivity)
                new.check()
                quality.add(batch.images, batch.label)
                if sum(len(labels) for _, labels in shown) < SHOWN:
                    shown.append((batch.images, batch.label))
            found = report([quality.sums()])
            writer.finish(found, None if work.share.whole else quality.sums())
        images, labels = (torch.cat(parts)[:SHOWN] for parts in zip(*shown, strict=True))
        pixels = classifier.preprocessing.to_pixels(images.float()).clamp(0, 1)
        contact_sheet(pixels, labels, classifier.class_names, sheet)
        if work.kept is not None:
            work.kept.finish(path, sheet_path, force=force)
    return {
        "file": str(path),
        "contact_sheet": str(sheet_path),
        "images": count,
        "classes": plan.inverted,
        "objective": plan.objective.name,
        "steps": plan.total_steps,
        "precision": plan.precision,
        "device": str(classifier.device),
        "path": step.path,
        **found,
    }


def shard_of_plan(plan: Plan, share: Share) -> Shard | None:
    """Attributes of a file that holds a shard of the images; None if it holds all. Raises
    OodcliError for a shard without a batch."""
    if share.whole:
        return None
    batches = len(plan.batches())
    part = share.part(batches)
    if not part:
        raise OodcliError(
            f"--shard {share}: more shards than batches of {plan.batch_size} images: use at most "
            f"{batches} of them, or a smaller --batch-size for all"
        )
    before, rows = plan.images(range(part.start)), plan.images(range(batches))
    stop = before + plan.images(part)
    return Shard(share.number, share.of, before, stop, rows, "")


def _stored(batch: VirtualBatch) -> Stored:
    layers = {f"layers/{name}": rows.numpy() for name, rows in batch.sensitivity.items()}
    arrays = {"images": batch.images.numpy(), "label": batch.label.numpy(), **layers}
    return Stored(len(batch.label), arrays, {"layers": list(batch.sensitivity)})


def _restored(stored: Stored) -> VirtualBatch:
    tensors = {name: torch.from_numpy(array) for name, array in stored.arrays.items()}
    layers = {name: tensors[f"layers/{name}"] for name in stored.words["layers"]}
    return VirtualBatch(tensors["images"], tensors["label"], layers)
