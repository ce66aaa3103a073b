"""What extracting and scoring cost beside the network's own forward pass.

    python -m benchmarks.bench_score CHECKPOINT [--batch-size 128] [--rounds 15] [--threads 2]
        [--rows 50000] [--id IMAGES --ood IMAGES …] [--device cpu]

The bare pass is what a user would write: evaluation mode, inference mode, float32. Against it, the
same images through every detector that needs no fitted artefact and no gradient, with 1c-sum fitted
on noise beforehand, in float32 and in bfloat16, into CSV; and through all that one pass can record
into a cache. All take turns, so that a noisy machine is as noisy for all; medians and their ratio
are printed as JSON. Where pytorch-ood and oodeel are installed, four detectors that they have
without fitting take their turn, too, and so do ours of the same names. With --id and --ood the mean
AUROC in per cent that energy has with each stands beside the speed. Last comes scoring from a cache
of --rows rows, D = 512 and K = 10, with every detector that needs no fitting.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import in_turns, ratio
from oodcli import detectors
from oodcli.detectors.energy import energy
from oodcli.features import Features, LinearHead, Rows, recorded
from oodcli.files.cache import CacheWriter, open_cache
from oodcli.files.hdf5 import writing
from oodcli.images import batches, open_images
from oodcli.metrics import auroc
from oodcli.networks.classifier import Classifier
from oodcli.networks.load import load_classifier
from oodcli.recording.recorder import AGAIN, Recorder, recordable
from oodcli.records import CHEAP
from oodcli.stages.chosen import Chosen, choose_detectors, fit_on_noise, needs
from oodcli.stages.record import provenance
from oodcli.stages.score import score_to_file

FOUR = ("msp", "mls", "entropy", "energy")
WARM_UP = 2

Work = dict[str, Callable[[], object]]


def rows(images: Tensor, recorder: Recorder) -> Rows:
    """As the command line records them: in the processor's memory."""
    paths = tuple(f"image-{index:06d}.png" for index in range(len(images)))
    features = recorder(images).to(torch.device("cpu"))
    return Rows(paths, torch.full((len(images),), -1), (None,) * len(images), features)


def to_csv(blocks: Iterator[Rows], some: Sequence[Chosen], class_names: Sequence[str]) -> None:
    with open(os.devnull, "w", encoding="utf-8") as stream:
        score_to_file(lambda start, stop: blocks, 0, 1, some, class_names, stream)


def ours(classifier: Classifier, images: Tensor, rounds: int, stack: ExitStack) -> Work:
    chosen = choose_detectors(
        ["all"],
        {},
        recordable(classifier),
        classifier.sha256,
        lambda kind, given: fit_on_noise(classifier, kind, given, len(images)),
    )
    chosen = [each for each in chosen if not each.detector.score_needs & AGAIN]
    four = [Chosen(detectors.get(name)()) for name in FOUR]

    def bare() -> None:
        with torch.inference_mode():
            classifier.network(images)

    def scoring(some: list[Chosen], precision: str) -> Callable[[], None]:
        recorder = Recorder(classifier, needs(some), precision=precision)
        return lambda: to_csv(iter([rows(images, recorder)]), some, classifier.class_names)

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    new = stack.enter_context(writing(Path(folder) / "cache.h5"))
    made = provenance(classifier, source="", command="", seed=0, precision="float32", virtual=False)
    writer = CacheWriter(new.file, made, len(images) * (rounds + WARM_UP))
    everything = Recorder(classifier, (CHEAP | {"head"}) & recordable(classifier))
    return {
        "bare forward pass": bare,
        f"score, {len(chosen)} detectors": scoring(chosen, "float32"),
        f"score, {len(chosen)} detectors, bfloat16": scoring(chosen, "bfloat16"),
        "extract": lambda: writer.append(rows(images, everything)),
        f"score, {', '.join(FOUR)}": scoring(four, "float32"),
        f"score, {', '.join(FOUR)}, bfloat16": scoring(four, "bfloat16"),
    }


def peers(classifier: Classifier, images: Tensor) -> tuple[Work, dict[str, Callable[..., Any]]]:
    """The four detectors of other libraries, and how each scores images with energy."""
    work: Work = {}
    energies: dict[str, Callable[..., Any]] = {}
    network = copy.deepcopy(classifier.network)
    try:
        from pytorch_ood import detector as other
    except ImportError:
        pass
    else:
        theirs = [each(network) for each in (other.MaxSoftmax, other.MaxLogit, other.Entropy)]
        name = f"pytorch-ood {version('pytorch-ood')}, the same four"
        energies[name] = other.EnergyBased(network).predict

        def all_four() -> None:
            with torch.no_grad():
                for predict in (*(each.predict for each in theirs), energies[name]):
                    predict(images)

        work[name] = all_four
    try:
        from oodeel import methods
    except ImportError:
        pass
    else:
        fitted = [
            methods.MLS(output_activation="softmax"),
            methods.MLS(),
            methods.Entropy(),
            methods.Energy(),
        ]
        for each in fitted:
            each.fit(copy.deepcopy(classifier.network))  # on which it leaves its hooks
        work[f"oodeel {version('oodeel')}, the same four"] = lambda: [
            each.score(images) for each in fitted
        ]
        energies[list(work)[-1]] = lambda some: fitted[-1].score(some)[0]
    return work, energies


def accuracy(
    classifier: Classifier, sources: Sequence[str], energies: dict[str, Callable[..., Any]]
) -> dict[str, float]:
    """The mean AUROC of energy. sources: in-distribution images, and OOD ones."""

    def with_us(precision: str) -> Callable[[Tensor], Tensor]:
        recorder = Recorder(classifier, frozenset({"logits"}), precision=precision)
        return lambda images: energy(recorded(recorder(images).logits))

    name = f"score, {', '.join(FOUR)}"
    ways = {name: with_us("float32"), f"{name}, bfloat16": with_us("bfloat16"), **energies}
    found: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    for source in sources:
        opened = open_images(source, classifier.preprocessing, classifier.class_names)
        parts: dict[str, list[Any]] = {name: [] for name in ways}
        for batch in batches(opened, classifier.preprocessing, 500):
            images = batch.images.to(classifier.device).contiguous()
            for name, way in ways.items():
                with torch.no_grad():
                    parts[name].append(np.asarray(torch.as_tensor(way(images)).cpu()))
        for name, some in parts.items():
            found[name].append(np.concatenate(some))
    return {
        name: round(100 * statistics.mean(auroc(inside, each) for each in outside), 2)
        for name, (inside, *outside) in found.items()
    }


def from_cache(classifier: Classifier, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Rows of random embeddings (N, 512) with the logits of a random head (10, 512)."""
    generator = torch.Generator().manual_seed(0)
    head = LinearHead(torch.randn(10, 512, generator=generator) / 20, torch.zeros(10))
    made = provenance(classifier, source="", command="", seed=0, precision="float32", virtual=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.h5"
        with writing(path) as new:
            writer = CacheWriter(new.file, made, count)
            for start in range(0, count, 1000):
                size = min(1000, count - start)
                embedding = torch.randn(size, 512, generator=generator).relu()
                label = torch.full((size,), -1)
                features = Features(
                    size,
                    label=label,
                    logits=embedding @ head.weight.T,
                    embedding=embedding,
                    head=head,
                )
                paths = tuple(f"image-{start + index:06d}.png" for index in range(size))
                writer.append(Rows(paths, label, (None,) * size, features))
        with open_cache(path) as cache:
            chosen = choose_detectors(["all"], {}, cache.recorded, classifier.sha256)
            times = []
            for _ in range(rounds + 1):
                start_time = time.perf_counter()
                to_csv(cache.blocks(needs(chosen)), chosen, [str(index) for index in range(10)])
                times.append(time.perf_counter() - start_time)
    name = f"score from a cache, {len(chosen)} detectors, D = 512, K = 10"
    return {name: {"images_per_second": round(count / statistics.median(times[1:]))}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--id")
    parser.add_argument("--ood", nargs="+", default=[])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    classifier = load_classifier(options.checkpoint, device=options.device)
    height, width = classifier.preprocessing.input_size
    shape = (options.batch_size, classifier.preprocessing.channels, height, width)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(options.device)
    with ExitStack() as stack:
        work = ours(classifier, images, options.rounds, stack)
        others, energies = peers(classifier, images)
        times = in_turns(work | others, options.rounds, WARM_UP)
    bare = times["bare forward pass"]
    results: dict[str, dict[str, float]] = {
        name: {
            "images_per_second": round(options.batch_size / statistics.median(spent)),
            "throughput_of_bare": round(ratio(bare, spent), 3),
        }
        for name, spent in times.items()
    }
    if options.id:
        for name, found in accuracy(classifier, [options.id, *options.ood], energies).items():
            results[name]["energy_auroc"] = found
    report = {
        "arch": classifier.arch,
        "batch_size": options.batch_size,
        "threads": options.threads,
        "device": options.device,
        "torch": str(torch.__version__),
        "results": results | from_cache(classifier, options.rows, 5),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
