"""The optimisation: from noise to virtual images, a batch at a time."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from oodcli.classifier import Classifier, Tap, as_logits
from oodcli.errors import CheckpointError, OodcliError
from oodcli.inversion.mgi import Sensitivity
from oodcli.inversion.objective import OBJECTIVES, Moments, Objective, loss, multiscale_start
from oodcli.recording import Recorder, batchnorm_constants, watch

SENSITIVITY_POINTS = 10
"""At how many points of the trajectory, evenly spaced after the start, eq. 8 is evaluated. A point
costs a forward and a backward pass, so all 50 would double the work."""

BATCHNORM = frozenset({"batchnorm"})


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
    progress: Callable[[int], None] = lambda image_steps: None,
) -> Iterator[VirtualBatch]:
    """Yields the batches of the plan in turn, from number ``first`` on; each depends on the seed
    and its own number alone. progress is told how many images have made one more step.

    Raises CheckpointError for a network without BatchNorm, OodcliError when an image diverges.
    """
    refuse_without_batchnorm(classifier)
    for number, labels in enumerate(plan.batches()):
        if number < first:
            continue
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + number)
        yield _invert_batch(classifier, plan, labels, generator, progress)


def seconds_per_image_step(classifier: Classifier, plan: Plan) -> float:
    """A short trial: the time that one image takes for one step."""
    refuse_without_batchnorm(classifier)
    labels = plan.batches()[0]
    marks: list[float] = []
    trial = Plan(
        plan.classes, plan.per_class, plan.objective, 4, plan.batch_size, plan.precision, plan.seed
    )

    def mark(_: int) -> None:
        if classifier.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    _invert_batch(classifier, trial, labels, torch.Generator().manual_seed(0), mark, points=0)
    return (marks[-1] - marks[0]) / (len(marks) - 1) / len(labels)


def _invert_batch(
    classifier: Classifier,
    plan: Plan,
    labels: Tensor,
    generator: torch.Generator,
    progress: Callable[[int], None],
    points: int = SENSITIVITY_POINTS,
) -> VirtualBatch:
    objective, steps = plan.objective, plan.total_steps
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
    step_loss = StepLoss(classifier, objective, plan.precision)
    recorder = Recorder(
        classifier,
        frozenset({"logits", "layers.gradient"}),
        precision=plan.precision,
        kinds=BATCHNORM,
    )
    sensitivity = Sensitivity(target)
    measured = {round(steps * point / points) for point in range(points + 1)} if points else set()
    reach = round(objective.roll * min(height, width) / 32)
    for step in range(steps):
        if step in measured:
            sensitivity.add(recorder(images.detach(), labels))
        view = images
        if reach:
            down, right = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
            view = torch.roll(view, (down, right), (2, 3))
        if objective.mirror and torch.rand((), generator=generator) < 0.5:
            view = view.flip(3)
        (images.grad,) = torch.autograd.grad(step_loss(view, target), images)
        adam.step()
        if objective.cosine:
            schedule.step()
        progress(len(labels))
    final = images.detach()
    if steps in measured:
        sensitivity.add(recorder(final, labels))
    stored = final.to("cpu", torch.float16)
    if not torch.isfinite(stored).all():
        raise OodcliError(
            f"the inversion diverged: images of class {labels[0]} are no longer finite; "
            "try --precision float32, or another --seed"
        )
    return VirtualBatch(stored, labels, sensitivity.average())


class StepLoss:
    """One forward pass with the statistics of every BatchNorm input in it."""

    def __init__(self, classifier: Classifier, objective: Objective, precision: str) -> None:
        self.classifier = classifier
        self.objective = objective
        self.precision = precision
        constants = [batchnorm_constants(norm, 1) for norm in classifier.batchnorms.values()]
        self.remembered = [(norm.running_mean, norm.running_var) for norm in constants]
        self.eps = [norm.eps for norm in constants]

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        found: list[Moments] = []

        def receive(tap: Tap, given: Tensor, output: Tensor) -> None:
            found.append(batch_moments(given))

        device = self.classifier.device.type
        with (
            watch(self.classifier, receive, BATCHNORM),
            torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16"),
        ):
            logits = as_logits(self.classifier.network(images))
        return loss(
            self.objective, images, logits.float(), labels, found, self.remembered, self.eps
        )


def batch_moments(activation: Tensor) -> Moments:
    """Mean and population variance over the batch and its positions of (N, C, …): (C,) each,
    float32, differentiable. By sums, as spatial_moments."""
    x = activation.float()
    dims = (0, *range(2, x.ndim))
    count = x.numel() // x.shape[1]
    mean = x.sum(dims) / count
    square = torch.linalg.vector_norm(x, dim=dims).square() / count
    return mean, (square - mean.square()).clamp(min=0)


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
