"""The optimisation: from noise to virtual images, a batch at a time."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oodcli.errors import CheckpointError, OodcliError, first_line
from oodcli.inversion.mgi import Sensitivity
from oodcli.inversion.objective import OBJECTIVES, Objective, multiscale_start, spread_order
from oodcli.inversion.side_by_side import Job, Progress, side_by_side
from oodcli.inversion.step import Step
from oodcli.networks.classifier import Classifier
from oodcli.networks.outputs import as_logits
from oodcli.out_of_memory import halving, too_short

log = logging.getLogger(__name__)

SENSITIVITY_POINTS = 6
"""At how many points of the trajectory, evenly spaced after the start, eq. 8 is evaluated. A point
costs a forward and a backward pass, so all steps would double the work."""

HALVED_FROM = 96
"""Pixels of the shorter side: where it is less, a step is cheap as it is, and at half of it a
network that shrinks its input 32 times is left with a position or two. On ResNet-20, 32 pixels, 12
of 24 steps at half the side cost c2ir-z 4 points of TNR95 (docs/research/cost.md)."""


SMALL_BATCH = 25
"""Images of a batch by default where images are large."""

AT_ONCE = 4
"""Batches that a processor makes at once, at most: each has its own memory."""

DECIDED = ("batch_size", "half_steps", "at_once")
"""What of a plan ``prepare`` decides."""


@dataclass(frozen=True)
class Plan:
    """What to invert. classes: the wanted labels. total: number of images in all, instead of
    ``per_class``; with fewer than classes, another seed starts with the next classes. batch_size:
    at most; batches are evened out, and every one mixes the classes, because the statistics of a
    one-class batch do not match. half_steps: the first ones, on images of half the side, which take
    a quarter of the time (as Yin et al. 2020 for ImageNet). at_once: batches, each by a thread that
    has its share of the processor. ``prepare`` sets both. sensitivity: whether to measure what
    ``c2ir`` needs."""

    classes: tuple[int, ...]
    per_class: int
    objective: Objective = OBJECTIVES["kl"]
    steps: int | None = None
    half_steps: int = 0
    at_once: int = 1
    batch_size: int = 100
    precision: str = "float32"
    seed: int = 0
    total: int | None = None
    sensitivity: bool = True

    @property
    def total_steps(self) -> int:
        return self.objective.steps if self.steps is None else self.steps

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.classes) * self.per_class if self.total is None else self.total

    @property
    def inverted(self) -> int:
        """Number of classes that have an image."""
        return min(len(self.classes), self.count)

    def batches(self) -> list[Tensor]:
        """Labels of each batch, (n,) int64; the classes take turns. Where a batch has not all of
        them, their order is such that its classes are spread over all: neighbours in a list of
        classes may be alike, such as ImageNet's 118 breeds of dogs."""
        classes = torch.tensor(self.classes)
        if len(classes) > max(self.batch_size, SMALL_BATCH):
            classes = classes[spread_order(len(classes))]
        first = 0 if self.total is None else self.seed * self.total
        labels = classes[torch.arange(first, first + self.count) % len(classes)]
        return list(torch.tensor_split(labels, math.ceil(self.count / self.batch_size)))

    def images(self, batches: range) -> int:
        """How many images some of the batches have."""
        return sum(len(labels) for labels in self.batches()[batches.start : batches.stop])


@dataclass(frozen=True)
class VirtualBatch:
    """images: (n, C, H, W) float16, normalised. label: (n,). sensitivity: layer → (n, C)."""

    images: Tensor
    label: Tensor
    sensitivity: dict[str, Tensor]


def refuse_without_batchnorm(classifier: Classifier, objective: Objective) -> None:
    """Raises CheckpointError for a network that keeps no BatchNorm statistics, if the objective
    needs them."""
    if objective.distance_weight and not classifier.batchnorms:
        raise CheckpointError(
            f"{classifier.arch} has no BatchNorm layer with running statistics, which --objective "
            f"{objective.name} needs: invert with --objective patches, score it with detectors "
            "that need no fitting (msp, energy, gen: 'oodcli inspect' lists them), or fit on real "
            "images"
        )


def invert(
    classifier: Classifier,
    plan: Plan,
    *,
    first: int = 0,
    last: int | None = None,
    step: Step | None = None,
    progress: Progress = lambda image_steps: None,
) -> Iterator[VirtualBatch]:
    """Yields the batches [first, last) of the plan in turn, by default all; each depends on the
    seed and its own number alone. step: of this classifier and plan, as ``prepare`` makes it.
    progress is told how many images have made one more step.

    Raises CheckpointError for a network without BatchNorm that the objective needs, OodcliError
    when an image diverges.
    """
    refuse_without_batchnorm(classifier, plan.objective)
    step = step or Step(classifier, plan.objective, plan.precision)
    batches = plan.batches()
    numbers = range(first, len(batches) if last is None else last)

    def job(number: int, step: Step, progress: Progress) -> VirtualBatch:
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + number)
        return _invert_batch(step, plan, batches[number], generator, progress)

    yield from _made(step, plan, [partial(job, number) for number in numbers], progress)


def _made(
    step: Step,
    plan: Plan,
    jobs: Sequence[Callable[[Step, Progress], VirtualBatch]],
    progress: Progress,
) -> Iterator[VirtualBatch]:
    """What the jobs make, in order, as many at once as the plan says."""
    if plan.at_once == 1:
        yield from (job(step, progress) for job in jobs)
        return
    threads = max(1, torch.get_num_threads() // plan.at_once)
    workers = min(plan.at_once, len(jobs))
    steps = [step.twin() for _ in range(workers)]

    def by_thread(job: Callable[[Step, Progress], VirtualBatch]) -> Job[VirtualBatch]:
        return lambda thread, tell: job(steps[thread], tell)

    yield from side_by_side([by_thread(job) for job in jobs], workers, threads, progress)


COMPILE_FROM = {"cpu": 3e12}
"""Multiply-adds of the network in a job's forward passes from which on the compiler pays: six
minutes of the plain steps with EfficientNet-Lite0 on two cores, which become four, after two for
compiling; and by estimate on a GPU. Counted, not timed: the same job shall take the same path each
time, because the images differ in their last digits."""
COMPILE_FROM_ELSEWHERE = 3e15

COMPILE_SMALL = 3
"""Times as many where images are small: several batches at once gain most of what the compiler
would. It makes ResNet-20 1.25 times as fast."""

COMPILED_WITHIN = 1.25
"""A compiled step that takes more than so many times the plain one's time is not taken."""


def prepare(
    classifier: Classifier,
    plan: Plan,
    *,
    compiled: bool | None = None,
    decided: Mapping[str, Any] | None = None,
) -> tuple[Plan, Step, float]:
    """By a short trial: the plan, with its steps at half the side where those are possible and with
    smaller batches where the memory is short, the way to make a step of it, and the seconds that
    all of it will take. compiled: or not, by default in long jobs. decided: what ``decisions`` said
    of this job before, to go on with. Raises CheckpointError for a network without BatchNorm that
    the objective needs, OodcliError when not even one image fits, or nothing compiles that was to
    be."""
    refuse_without_batchnorm(classifier, plan.objective)
    eager = Step(classifier, plan.objective, plan.precision)
    if decided:
        # An earlier version decided less.
        plan = replace(plan, **{key: decided[key] for key in DECIDED if key in decided})
        compiled = decided["path"] == "compiled"
        seconds = _seconds(eager, plan)
    else:
        plan = replace(plan, half_steps=_half_steps(classifier, plan))
        plan = replace(plan, at_once=_at_once(classifier, plan))
        plan, seconds = _that_fits(eager, plan)
    least = COMPILE_FROM.get(classifier.device.type, COMPILE_FROM_ELSEWHERE)
    if min(classifier.preprocessing.input_size) < HALVED_FROM:
        least *= COMPILE_SMALL
    if compiled is False or (compiled is None and _multiply_adds(classifier, plan) < least):
        return plan, eager, seconds
    try:
        step = eager.compiled()
        then = _seconds(step, plan)
    except Exception as error:  # whatever a compiler, or its absence, may raise
        reason = first_line(error)
        if compiled:
            raise OodcliError(f"the step cannot be compiled ({reason})") from error
        log.info("not compiled: %s", reason)
        return plan, eager, seconds
    if compiled or then <= COMPILED_WITHIN * seconds:
        return plan, step, then
    return plan, eager, seconds


def decisions(plan: Plan, step: Step) -> dict[str, Any]:
    """What ``prepare`` found out, and an interrupted job must go on with."""
    return {**{key: getattr(plan, key) for key in DECIDED}, "path": step.path}


def _multiply_adds(classifier: Classifier, plan: Plan) -> float:
    """Those of all forward passes, a step at half the side counted as a quarter."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    preprocessing = classifier.preprocessing
    size = (1, preprocessing.channels, *preprocessing.input_size)
    image = torch.zeros(size, device=classifier.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        classifier.network(image)
    steps = plan.total_steps - 0.75 * plan.half_steps
    return float(counted.get_total_flops() / 2 * steps * plan.count)


def _half_steps(classifier: Classifier, plan: Plan) -> int:
    """How many steps can be made at half the side: none of a small image, nor with a network that
    only takes its own input size."""
    wanted = int(plan.objective.half_share * plan.total_steps)
    size, channels = classifier.preprocessing.input_size, classifier.preprocessing.channels
    if not wanted or min(size) < HALVED_FROM:
        return 0
    image = torch.zeros(1, channels, *_half(size), device=classifier.device)
    try:
        with torch.no_grad():
            as_logits(classifier.network(image))
    except (RuntimeError, ValueError, AssertionError) as error:  # whatever torch says of shapes
        reason = first_line(error)
        log.info("all steps run at full size: the network does not accept half of it (%s)", reason)
        return 0
    return wanted


def _at_once(classifier: Classifier, plan: Plan) -> int:
    """How many batches are made at once. Of large images it is one: two took 0.88 of the time with
    EfficientNet-Lite0 at 224 pixels, but twice the memory."""
    if classifier.device.type != "cpu" or min(classifier.preprocessing.input_size) >= HALVED_FROM:
        return 1
    return min(AT_ONCE, torch.get_num_threads(), len(plan.batches()))


def _half(size: tuple[int, int]) -> tuple[int, int]:
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def _enlarged(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, …) to (N, C, *size), bilinearly; as they are, if that is their size."""
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size, mode="bilinear")


def _that_fits(step: Step, plan: Plan) -> tuple[Plan, float]:
    whole = len(plan.batches()[0])
    device, image = step.classifier.device, step.classifier.preprocessing.input_size

    def trial(size: int) -> tuple[Plan, float]:
        smaller = plan if size == whole else replace(plan, batch_size=size)
        return smaller, _seconds(step, smaller)

    return halving(trial, whole, device, lambda _: OodcliError(too_short(device, image)))[0]


def _seconds(step: Step, plan: Plan) -> float:
    # A sensitivity takes about as long as a step at full size. That is tried first, because it is
    # where the memory may be short.
    full_steps = plan.total_steps - plan.half_steps
    full_steps += SENSITIVITY_POINTS + 1 if plan.sensitivity else 0
    trial = replace(plan, steps=4, half_steps=0, sensitivity=False)
    seconds = full_steps * _seconds_per_image_step(step, trial)
    if plan.half_steps:
        half = _seconds_per_image_step(step, replace(trial, half_steps=4))
        seconds += plan.half_steps * half
    rounds = math.ceil(len(plan.batches()) / plan.at_once)
    return rounds * plan.at_once * len(plan.batches()[0]) * seconds


def _seconds_per_image_step(step: Step, trial: Plan) -> float:
    """The time that one image takes for one step of a trial, the first left out, while as many
    batches are made as at once in the job."""
    labels = trial.batches()[0]
    marks: list[list[float]] = [[] for _ in range(trial.at_once)]

    def job(own: list[float], step: Step, _: Progress) -> VirtualBatch:
        def mark(_: int) -> None:
            if step.classifier.device.type == "cuda":
                torch.cuda.synchronize()
            own.append(time.perf_counter())

        return _invert_batch(step, trial, labels, torch.Generator().manual_seed(0), mark)

    if step.path == "compiled" and trial.at_once > 1:  # compiled once, not in each thread
        list(_made(step, trial, [partial(job, [])], lambda _: None))
    list(_made(step, trial, [partial(job, own) for own in marks], lambda _: None))
    taken = fmean((own[-1] - own[0]) / (len(own) - 1) for own in marks)
    return taken / len(labels) / trial.at_once


def _invert_batch(
    step: Step,
    plan: Plan,
    labels: Tensor,
    generator: torch.Generator,
    progress: Progress,
) -> VirtualBatch:
    objective, steps, classifier = plan.objective, plan.total_steps, step.classifier
    device = classifier.device
    target = labels.to(device)
    size = classifier.preprocessing.input_size
    height, width = _half(size) if plan.half_steps else size
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
    points = range(SENSITIVITY_POINTS + 1 if plan.sensitivity else 0)
    measured = {round(steps * point / SENSITIVITY_POINTS) for point in points}
    for number in range(steps):
        if number == plan.half_steps:
            # In place, so that the learning rate's schedule goes on. Adam's moments start afresh:
            # enlarging them, too, left a larger gap to the BatchNorm layers.
            images.data = _enlarged(images.data, size)
            adam.state.clear()
        if number in measured:
            sensitivity.add(step.sensitivity(_enlarged(images.detach(), size), target))
        view = images
        reach = round(objective.roll * min(images.shape[2:]) / 32)
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
