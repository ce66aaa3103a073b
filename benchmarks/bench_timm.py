"""Scoring a folder of photographs beside the loop of timm's validate.py.

    python -m benchmarks.bench_timm FOLDER [--images 500] [--batch-size 64] [--rounds 5]
        [--threads 2] [--only resnet50 …] [--precision float32 bfloat16] [--no-all]
        [--overlap]

Networks of timm with random weights. The loop is create_model, the transform of
resolve_model_data_config, a DataLoader with as many workers as threads, the forward pass in
inference mode, and the five largest logits. Beside it, ``oodcli score`` of the same files, with the
detectors that one forward pass serves, and with ``-d all``, which need further passes, too; both
without 1c-sum, which is fitted on noise first. --precision: of the detectors of one pass; with one
that is not float32, the loop runs under autocast, too. --overlap: also decoding alone, and ``score
-d energy`` of images that are decoded already. All take turns. Prints as JSON images a
second, and the median ratio to the loop. Imports and the loading of the network do not count. All
keep freed memory, as ``oodcli score`` does. With one thread, seconds are those of the processor,
and the loop decodes in its own process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import ImageDataset, create_transform, resolve_model_data_config
from torch.utils.data import DataLoader, Subset

from benchmarks.measure import in_turns, machine, ratio
from oodcli.cli.allocation import keep_freed_memory
from oodcli.images.reading import batches
from oodcli.images.source import ImageSource
from oodcli.networks.card import Overrides
from oodcli.networks.classifier import Classifier
from oodcli.networks.load import load_classifier
from oodcli.recording.recorder import AGAIN
from oodcli.stages.chosen import Chosen, choose_detectors
from oodcli.stages.model import Model, Running
from oodcli.stages.opened import Opened, from_images
from oodcli.stages.score import score_to_file

NETWORKS = ("resnet50", "vit_base_patch16_224", "tf_efficientnet_lite0")
LOOP = "timm"


def _decoded(source: ImageSource, classifier: Classifier, folder: Path) -> Path:
    """A file of the images, decoded and of the network's size."""
    with source.reading() as fetch:
        pixels = fetch(0, len(source))(classifier.preprocessing).pixels
    path = folder / "decoded.npz"
    np.savez(path, images=pixels.numpy())
    return path


def _read(source: ImageSource, classifier: Classifier, batch_size: int) -> None:
    for _ in batches(source, classifier.preprocessing, batch_size):
        pass


def measured(name: str, folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    network = timm.create_model(name).eval()
    transform = create_transform(**resolve_model_data_config(network))
    files = ImageDataset(str(folder), transform=transform)
    count = min(options.images, len(files))
    workers = options.threads if options.threads > 1 else 0
    loader = DataLoader(
        Subset(files, range(count)),
        options.batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
    )

    def loop(precision: str) -> None:
        half = precision == "bfloat16"
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            for images, _ in loader:
                network(images).topk(5)

    def scoring(chosen: list[Chosen], opened: Opened) -> Callable[[], None]:
        def run() -> None:
            with open(os.devnull, "w", encoding="utf-8") as stream:
                score_to_file(
                    opened.record(chosen, lambda *_: None),
                    *(count, options.batch_size, chosen, opened.made.class_names, stream),
                )

        return run

    with tempfile.TemporaryDirectory() as made:
        path, listed = Path(made) / "network.pt", Path(made) / "images.txt"
        torch.save(network.state_dict(), path)
        names = [files.filename(index, absolute=True) for index in range(count)]
        listed.write_text("\n".join(names), encoding="utf-8")
        classifier = load_classifier(path, Overrides(arch=f"timm:{name}"))
        work: dict[str, Callable[[], None]] = {LOOP: partial(loop, "float32")}
        for precision in options.precision:
            model = Model(classifier, Running("cpu", options.batch_size, precision))
            opened, source, _ = from_images(
                model, classifier, str(listed), mirror=False, timeout=None, command=""
            )
            everything = choose_detectors(["all"], {}, opened.available, classifier.sha256)
            once = [each for each in everything if not each.detector.score_needs & AGAIN]
            single = [each for each in once if each.name == "energy"]
            added = "" if precision == "float32" else f", {precision}"
            work[f"score -d energy{added}"] = scoring(single, opened)
            if options.overlap:
                pixels = str(_decoded(source, classifier, Path(made)))
                decoded, _, _ = from_images(
                    model, classifier, pixels, mirror=False, timeout=None, command=""
                )
                work[f"decoded images, score -d energy{added}"] = scoring(single, decoded)
                work["decoding"] = partial(_read, source, classifier, options.batch_size)
            work[f"score, {len(once)} detectors of one pass{added}"] = scoring(once, opened)
            if added:
                work[LOOP + added] = partial(loop, precision)
            elif options.all:
                work[f"score -d all, {len(everything)} detectors"] = scoring(everything, opened)
        clock = time.perf_counter if workers else time.process_time
        times = in_turns(work, options.rounds, clock=clock)
    return {
        way: {
            "images_per_second": round(count / statistics.median(spent), 2),
            "throughput_of_timm": round(ratio(times[LOOP], spent), 3),
        }
        for way, spent in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=NETWORKS)
    parser.add_argument("--precision", nargs="+", default=["float32"])
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--all", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    results = {}
    for name in options.only:
        for way, found in measured(name, options.folder, options).items():
            results[f"{name}, {way}"] = found
            print(name, way, json.dumps(found), file=sys.stderr, flush=True)
    about = {"machine": machine(), "timm": timm.__version__}
    print(json.dumps({**about, "threads": options.threads, "results": results}, indent=1))


if __name__ == "__main__":
    main()
