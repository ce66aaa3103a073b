"""What scoring costs beside the network's own forward pass.

    python -m benchmarks.bench_score CHECKPOINT [--batch-size 128] [--rounds 15] [--threads 2]

The bare pass is what a user would write: evaluation mode, inference mode, float32. Against it, the
same images through the recorder, every detector that needs no fitted artefact (all but odin, with
1c-sum fitted on noise beforehand) and the CSV writer. Both take turns, so that a noisy machine is
as noisy for both; medians and their ratio are printed as JSON. Where pytorch-ood is installed
(pip install -e '.[bench]'), six of its detectors take their turn, too.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from oodcli import detectors
from oodcli.checkpoint import load_classifier
from oodcli.classifier import Classifier
from oodcli.features import Rows
from oodcli.recording import Recorder, recordable
from oodcli.stages.chosen import Chosen, choose_detectors, fit_on_noise, needs
from oodcli.stages.score import score_to_file


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def contestants(classifier: Classifier, images: torch.Tensor) -> dict[str, Callable[[], None]]:
    network = classifier.network
    chosen = [
        each
        for each in choose_detectors(
            ["all"],
            {},
            recordable(classifier),
            classifier.sha256,
            lambda kind, given: fit_on_noise(classifier, kind, given, len(images)),
        )
        if each.name != "odin"
    ]
    count = len(images)
    paths = tuple(f"image-{index:06d}.png" for index in range(count))
    unknown = torch.full((count,), -1)

    def bare() -> None:
        with torch.inference_mode():
            network(images)

    def rows(recorder: Recorder) -> Iterator[Rows]:
        yield Rows(paths, unknown, (None,) * count, recorder(images))

    def scoring(some: list[Chosen]) -> Callable[[], None]:
        recorder = Recorder(classifier, needs(some))

        def work() -> None:
            with open(os.devnull, "w", encoding="utf-8") as stream:
                score_to_file(rows(recorder), some, classifier.class_names, stream)

        return work

    few = [Chosen(detectors.get(name)()) for name in ("msp", "energy")]
    return {
        "bare forward pass": bare,
        "msp and energy": scoring(few),
        f"all {len(chosen)} detectors but odin": scoring(chosen),
        **peers(classifier, images),
    }


def peers(classifier: Classifier, images: torch.Tensor) -> dict[str, Callable[[], None]]:
    """Six detectors of pytorch-ood that need no fitting and that we have, too."""
    try:
        from pytorch_ood import detector as peer
    except ImportError:
        return {}
    network = copy.deepcopy(classifier.network)
    head = network.get_submodule(classifier.head_name or "")
    head.requires_grad_(True)
    found: list[torch.Tensor] = []
    head.register_forward_hook(lambda _, args, out: found.append(args[0]))

    def backbone(x: torch.Tensor) -> torch.Tensor:
        found.clear()
        network(x)
        return found[0]

    six = [
        peer.MaxSoftmax(network),
        peer.MaxLogit(network),
        peer.Entropy(network),
        peer.EnergyBased(network),
        peer.ReAct(backbone, head, threshold=1.0),
        peer.GradNorm(network, param_filter=lambda name: name == f"{classifier.head_name}.weight"),
    ]

    def work() -> None:
        for each in six:
            with torch.set_grad_enabled(isinstance(each, peer.GradNorm)):
                each.predict(images)

    return {f"pytorch-ood {version('pytorch-ood')}, six of its detectors": work}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    classifier = load_classifier(options.checkpoint, device=options.device)
    height, width = classifier.preprocessing.input_size
    shape = (options.batch_size, classifier.preprocessing.channels, height, width)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(options.device)
    work = contestants(classifier, images)
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(options.rounds + 2):
        for name, run in work.items():
            spent = seconds(run)
            if turn >= 2:
                times[name].append(spent)
    bare = times["bare forward pass"]
    print(
        json.dumps(
            {
                "arch": classifier.arch,
                "batch_size": options.batch_size,
                "threads": options.threads,
                "device": options.device,
                "torch": str(torch.__version__),
                "results": {
                    name: {
                        "images_per_second": round(options.batch_size / statistics.median(spent)),
                        "throughput_of_bare": round(
                            statistics.median(b / s for b, s in zip(bare, spent, strict=True)), 3
                        ),
                    }
                    for name, spent in times.items()
                },
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
