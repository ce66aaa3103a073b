"""What inversion costs, beside DeepInversion's loop at its published settings.

    python -m benchmarks.bench_invert CHECKPOINT [--batch-size 100] [--rounds 5] [--threads 2]
        [--steps 50 36] [--device cpu] [--precision bfloat16]

The loop is what a reader of Yin et al. 2020 would write: float32, eager, a hook at each BatchNorm
layer, T = 2000. Single steps of it take turns with whole batches of 'oodcli invert', sensitivities
included, and with a compiled step, so that a noisy machine is as noisy for all; medians and ratios
are printed as JSON. What must be compiled is left out where there is no compiler. The rate of the
loop does not depend on T, so it is not run to its end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import in_turns, ratio
from oodcli.inversion.invert import Plan, _invert_batch
from oodcli.inversion.objective import OBJECTIVES
from oodcli.inversion.step import Step
from oodcli.networks.load import load_classifier

T = OBJECTIVES["deepinversion"].steps
AT_ONCE = 5
"""Single steps in a turn."""


def published_loop(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of DeepInversion on CIFAR-10: cross entropy, BatchNorm distances by norms, total
    variation, Adam, jitter; the weights are not frozen. images: a leaf, changed in place."""
    distances: list[Tensor] = []

    def hook(norm: nn.BatchNorm2d, given: tuple[Tensor], _: Tensor) -> None:
        x = given[0]
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        distances.append(
            torch.norm(norm.running_var.data - var, 2)
            + torch.norm(norm.running_mean.data - mean, 2)
        )

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(hook)
    network.requires_grad_(True)
    optimizer = torch.optim.Adam([images], lr=0.05)

    def step() -> None:
        distances.clear()
        down, right = torch.randint(-2, 3, (2,)).tolist()
        jittered = torch.roll(images, (down, right), (2, 3))
        optimizer.zero_grad()
        network.zero_grad()
        loss = F.cross_entropy(network(jittered), labels)
        x = jittered
        loss = loss + 2.5e-5 * (
            torch.norm(x[:, :, :, :-1] - x[:, :, :, 1:])
            + torch.norm(x[:, :, :-1, :] - x[:, :, 1:, :])
            + torch.norm(x[:, :, 1:, :-1] - x[:, :, :-1, 1:])
            + torch.norm(x[:, :, :-1, :-1] - x[:, :, 1:, 1:])
        )
        (loss + 10 * sum(distances)).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 36])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    classifier = load_classifier(options.checkpoint, device=options.device)
    height, width = classifier.preprocessing.input_size
    count = options.batch_size
    labels = (torch.arange(count) % classifier.num_classes).to(options.device)
    shape = (count, classifier.preprocessing.channels, height, width)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(options.device)
    reference = load_classifier(options.checkpoint, device=options.device)
    loop = published_loop(reference.network, start.clone().requires_grad_(), labels)
    classes = tuple(range(classifier.num_classes))
    plan = Plan(classes, 1, precision=options.precision)
    eager = Step(classifier, plan.objective, plan.precision)

    def whole(step: Step, taken: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        wanted = replace(plan, steps=taken)
        return _invert_batch(step, wanted, labels.cpu(), generator, lambda _: None).images

    images = start.clone().requires_grad_()
    compiled, compiling = None, None
    began = time.perf_counter()
    try:
        compiled = eager.compiled()
        compiled.gradient(images, images, labels)
        compiling = round(time.perf_counter() - began, 1)
    except Exception as error:  # whatever a compiler, or its absence, may raise
        print(f"not compiled: {error}", file=sys.stderr)
        compiled = None

    def single(step: Callable[[], object]) -> Callable[[], None]:
        def several() -> None:
            for _ in range(AT_ONCE):
                step()

        return several

    # The work of a turn, the steps that are made in it, and the steps that an image takes.
    contestants: dict[str, tuple[Callable[[], object], int, int]] = {
        f"DeepInversion's loop, float32, T = {T}": (single(loop), AT_ONCE, T),
    }
    if compiled is not None:
        alone = partial(compiled.gradient, images, images, labels)
        name = "oodcli, compiled, a step alone"
        contestants[name] = (single(alone), AT_ONCE, plan.total_steps)
    for step, taken in product(filter(None, (eager, compiled)), options.steps):
        name = f"oodcli, {step.path}, {plan.precision}, T = {taken}"
        contestants[name] = (partial(whole, step, taken), taken, taken)
    times = in_turns({name: run for name, (run, _, _) in contestants.items()}, options.rounds)
    first, *_ = times.values()
    results = {}
    for name, (_, made, taken) in contestants.items():
        rate = count * made / statistics.median(times[name])
        against = ratio(first, times[name]) * made / AT_ONCE
        results[name] = {
            "image_steps_per_second": round(rate),
            "ratio": round(against, 2),
            "images_per_second": round(rate / taken, 3),
            "ratio_of_images": round(against * T / taken, 1),
        }
    report = {
        "arch": classifier.arch,
        "batch_size": count,
        "threads": options.threads,
        "device": options.device,
        "torch": str(torch.__version__),
        "seconds_to_compile": compiling,
        "results": results,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
