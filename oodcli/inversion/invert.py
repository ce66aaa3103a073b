"""The optimisation: from noise to virtual images, a batch at a time."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oodcli.classifier import Classifier
from oodcli.errors import CheckpointError, OodcliError
from oodcli.inversion.mgi import Sensitivity
from oodcli.inversion.objective import OBJECTIVES, Objective, multiscale_start
from oodcli.inversion.step import Step

log = logging.getLogger(__name__)

SENSITIVITY_POINTS = 6
"""At how many points of the trajectory, evenly spaced after the start, eq. 8 is evaluated. A point
costs a forward and a backward pass, so all steps would double the work."""


@dataclass(frozen=True)
class Plan:
    """What to invert. classes: the wanted labels. batch_size: at most; batches are evened out, and
    every one mixes the classes, because the statistics of a one-class batch do not match."""

    classes: tuple[int, ...]
    per_class: int
    objective: Objective = OBJECTIVES["kl"]
    steps: int | None = None
    batch_size: int = 100
    precision: str = "float32"
    seed: int = 0

    @property
    def total_steps(self) -> int:
        return self.objective.steps if self.steps is None else self.steps

    def batches(self) -> list[Tensor]:
        """Labels of each batch, (n,) int64; the classes take turns."""
        total = len(self.classes) * self.per_class
        labels = torch.tensor(self.classes).repeat(self.per_class)
        return list(torch.tensor_split(labels, math.ceil(total / self.batch_size)))


@dataclass(frozen=True)
class VirtualBatch:
    """images: (n, C, H, W) float16, normalised. label: (n,). sensitivity: layer → (n, C)."""

    images: Tensor
    label: Tensor
    sensitivity: dict[str, Tensor]


def refuse_without_batchnorm(classifier: Classifier) -> None:
    """Raises CheckpointError for a network that keeps no BatchNorm statistics."""
    if not classifier.batchnorms:
        raise CheckpointError(
            f"{classifier.arch} has no BatchNorm layer with running statistics, and inversion "
            "recalls images from those: score it with detectors that need no fitting (msp, energy, "
            "odin: 'oodcli inspect' lists them), or fit on real images"
        )


def invert(
    classifier: Classifier,
    plan: Plan,
    *,
    first: int = 0,
    step: Step | None = None,
    progress: Callable[[int], None] = lambda image_steps: None,
) -> Iterator[VirtualBatch]:
    """Yields the batches of the plan in turn, from number ``first`` on; each depends on the seed
    and its own number alone. step: of this classifier and plan, as ``prepare`` makes it. progress
    is told how many images have made one more step.

    Raises CheckpointError for a network without BatchNorm, OodcliError when an image diverges.
    """
    refuse_without_batchnorm(classifier)
    step = step or Step(classifier, plan.objective, plan.precision)
    for number, labels in enumerate(plan.batches()):
        if number < first:
            continue
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + number)
        yield _invert_batch(step, plan, labels, generator, progress)


COMPILE_FROM = 90.0
"""Seconds: a shorter job is over before the compiler has paid."""


def prepare(
    classifier: Classifier, plan: Plan, *, compiled: bool | None = None
) -> tuple[Plan, Step, float]:
    """By a short trial: the plan, with smaller batches where the memory is short, the way to make a
    step of it, and the seconds that all of it will take. compiled: or not, by default whatever is
    faster on this machine. Raises CheckpointError for a network without BatchNorm, OodcliError when
    not even one image fits, or nothing compiles that was to be."""
    refuse_without_batchnorm(classifier)
    eager = Step(classifier, plan.objective, plan.precision)
    plan, seconds = _that_fits(eager, plan)
    if compiled is False or (compiled is None and seconds < COMPILE_FROM):
        return plan, eager, seconds
    try:
        step = eager.compiled()
        faster = _seconds(step, plan)
    except Exception as error:  # whatever a compiler, or its absence, may raise
        reason = str(error).strip().split("\n")[0]
        if compiled:
            raise OodcliError(f"the step does not compile here ({reason})") from error
        log.info("not compiled: %s", reason)
        return plan, eager, seconds
    return (plan, step, faster) if compiled or faster < seconds else (plan, eager, seconds)


def _that_fits(step: Step, plan: Plan) -> tuple[Plan, float]:
    while True:
        try:
            return plan, _seconds(step, plan)
        except (RuntimeError, MemoryError) as error:
            words = str(error).lower()
            if not isinstance(error, MemoryError) and not any(w in words for w in NO_MEMORY):
                raise
            size = len(plan.batches()[0])
            if size == 1:
                raise OodcliError(
                    f"the memory of {step.classifier.device} is too short for one image"
                ) from error
        # Outside of the handler, whose error holds on to what was allocated.
        plan = replace(plan, batch_size=size // 2)
        log.info("the memory is short of batches of %d: taking %d", size, plan.batch_size)


NO_MEMORY = ("out of memory", "allocate memory", "not enough memory")


def _seconds(step: Step, plan: Plan) -> float:
    work = len(plan.classes) * plan.per_class * plan.total_steps
    # A sensitivity takes about as long as a step.
    work += len(plan.classes) * plan.per_class * (SENSITIVITY_POINTS + 1)
    return work * _seconds_per_image_step(step, plan)


def _seconds_per_image_step(step: Step, plan: Plan) -> float:
    """The time that one image takes for one step."""
    labels = plan.batches()[0]
    marks: list[float] = []

    def mark(_: int) -> None:
        if step.classifier.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    trial = replace(plan, steps=4)
    _invert_batch(step, trial, labels, torch.Generator().manual_seed(0), mark, points=0)
    return (marks[-1] - marks[0]) / (len(marks) - 1) / len(labels)


def _invert_batch(
    step: Step,
    plan: Plan,
    labels: Tensor,
    generator: torch.Generator,
    progress: Callable[[int], None],
    points: int = SENSITIVITY_POINTS,
) -> VirtualBatch:
    objective, steps, classifier = plan.objective, plan.total_steps, step.classifier
    device = classifier.device
    target = labels.to(device)
    height, width = classifier.preprocessing.input_size
    shape = (len(labels), classifier.preprocessing.channels, height, width)
    start = (
        multiscale_start(shape, generator)
        if objective.start == "multiscale"
        else torch.randn(shape, generator=generator)
    )
    images = start.to(device).requires_grad_()
    adam = torch.optim.Adam([images], lr=objective.learning_rate, betas=objective.betas)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(steps, 1))
    sensitivity = Sensitivity(target)
    measured = {round(steps * point / points) for point in range(points + 1)} if points else set()
    reach = round(objective.roll * min(height, width) / 32)
    for number in range(steps):
        if number in measured:
            sensitivity.add(step.sensitivity(images.detach(), target))
        view = images
        if reach:
            down, right = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
            view = torch.roll(view, (down, right), (2, 3))
        if objective.mirror and torch.rand((), generator=generator) < 0.5:
            view = view.flip(3)
        images.grad = step.gradient(images, view, target)
        adam.step()
        if objective.cosine:
            schedule.step()
        progress(len(labels))
    final = images.detach()
    if steps in measured:
        sensitivity.add(step.sensitivity(final, target))
    stored = final.to("cpu", torch.float16)
    if not torch.isfinite(stored).all():
        raise OodcliError(
            f"the inversion diverged: images of class {labels[0]} are no longer finite; "
            "try --precision float32, or another --seed"
        )
    return VirtualBatch(stored, labels, sensitivity.average())


def wanted_classes(text: str | None, num_classes: int) -> tuple[int, ...]:
    """``0-4,7`` → (0, 1, 2, 3, 4, 7); None → all. Raises OodcliError for anything else."""
    if text is None:
        return tuple(range(num_classes))
    chosen: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if found is None:
            raise OodcliError(f"--classes {text}: expected numbers and ranges, such as 0-4,7")
        chosen |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    if not chosen or max(chosen) >= num_classes:
        raise OodcliError(f"--classes {text}: the network has classes 0 to {num_classes - 1}")
    return tuple(sorted(chosen))
