"""What detectors take beside the network, in MB, for one batch of ImageNet's size.

    python -m benchmarks.bench_batch [--images 256] [--side 64] [--only NAME …]

A ResNet-50 with random weights (1,000 classes, 2,048 features) records a batch of noise; records
that take an inversion or another head are made up. Detectors are fitted on twice as many rows as
there are classes, drawn around those of the batch. Prints as JSON, for the bare forward pass and
for one with gradients, their peak; and for each detector, 'record': the peak beyond the bare pass
while its records are made, and 'score': that beyond what was in memory while it scores the batch.
Linux alone tells both.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models import resnet50

from oodcli import detectors
from oodcli.detectors.base import Detector
from oodcli.features import DropoutPasses, Features, recorded
from oodcli.files.cache import only
from oodcli.networks.card import Overrides
from oodcli.networks.load import load_classifier
from oodcli.recording.perturbed import sum_of_logits
from oodcli.recording.recorder import BACKWARD, Recorder, recordable

CLASSES = 1000
BLOCK = 200


def peak_mb(work: Callable[[], object]) -> float:
    """The largest resident memory while it runs, beyond that before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is that of now
    before = _status("VmRSS")
    work()
    return round((_status("VmHWM") - before) * 1024 / 1e6, 1)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


@dataclass(frozen=True)
class Around:
    """Two rows for each class, each a row of the batch with noise, always the same ones."""

    batch: Features

    def __iter__(self) -> Iterator[Features]:
        generator = torch.Generator().manual_seed(1)
        for start in range(0, 2 * CLASSES, BLOCK):
            rows = torch.randint(len(self.batch), (BLOCK,), generator=generator)

            def drawn(name: str, values: Tensor, rows: Tensor = rows, start: int = start) -> Tensor:
                if name == "label":
                    return (start + torch.arange(BLOCK)) % CLASSES
                noise = torch.rand(BLOCK, values.shape[1], generator=generator)
                return values[rows] * (0.5 + noise)

            yield self.batch.map_rows(drawn, BLOCK)


def complete(seen: Features) -> Features:
    """With the records that such a network does not give."""
    generator = torch.Generator().manual_seed(2)
    passes = DropoutPasses()
    logits = recorded(seen.logits)
    return replace(
        seen,
        dropout_logits=logits.repeat(1, passes.passes),
        made_with={**seen.made_with, passes.group: passes},
        multi_label=True,
        deconf_h=logits,
        mos_others=torch.rand(len(seen), 8, generator=generator).log(),
        layers={
            name: layer
            if layer.mean is None
            else replace(layer, sensitivity=torch.rand(layer.mean.shape, generator=generator))
            for name, layer in seen.layers.items()
        },
    )


def fitted(kind: type[Detector], batch: Features) -> Detector:
    if not kind.fitted:
        return kind()
    rows = Around(only(batch, kind.needs | kind.fit_needs() | {"label"}))
    more: dict[str, Any] = {}
    if kind.uses_ood:
        more["ood"] = rows
    if kind.noise_images is not None:
        more["noise"] = rows
    if kind.needs_pool:
        more["pool"] = rows
    return kind.fit(rows, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--only", nargs="*", default=detectors.names())
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "network.pt"
        torch.save(resnet50(num_classes=CLASSES).state_dict(), path)
        sides = (options.side, options.side)
        classifier = load_classifier(path, Overrides(arch="torchvision:resnet50", input_size=sides))
    images = torch.randn(options.images, 3, *sides)
    labels = torch.arange(options.images) % CLASSES
    kinds = [detectors.get(name) for name in options.only]
    possible = recordable(classifier)
    wanted = possible & frozenset().union(*(kind.needs | kind.fit_needs() for kind in kinds))
    plain = Recorder(classifier, frozenset({"logits"}))

    def backward() -> None:
        given = images.clone().requires_grad_()
        torch.autograd.grad(sum_of_logits(classifier.network(given), labels), given)

    plain(images)  # what the first call alone takes
    bare = {"forward": peak_mb(partial(plain, images)), "forward and backward": peak_mb(backward)}
    batch = complete(Recorder(classifier, wanted | {"logits", "logits.level"})(images, labels))
    results = {}
    for kind in kinds:
        detector = fitted(kind, batch)
        making = detector.made_with
        recorder = Recorder(
            classifier,
            detector.score_needs & possible,
            made_with={} if making is None else {making.group: making},
        )
        passes = "forward and backward" if recorder.what & BACKWARD else "forward"
        results[kind.name] = {
            "record": round(peak_mb(partial(recorder, images, labels)) - bare[passes], 1),
            "score": peak_mb(partial(detector.score, replace(batch))),
        }
        print(kind.name, json.dumps(results[kind.name]), file=sys.stderr, flush=True)
    about = {"images": options.images, "side": options.side, "threads": torch.get_num_threads()}
    print(json.dumps({**about, "bare_mb": bare, "results": results}, indent=1))


if __name__ == "__main__":
    main()
