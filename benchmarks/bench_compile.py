"""What torch.compile gives for scoring: the bare forward pass, plain and compiled.

    python -m benchmarks.bench_compile [--batch-size 4] [--rounds 7] [--threads 1] [--freezing]
        [--only resnet50 …] [--precision float32 …]

Networks of timm with random weights, at their own input size, laid out as ``score`` does it. Both
passes take turns in inference mode, in float32 and in bfloat16. Prints as JSON the processor time
of an image, the ratio (compiled to plain), and what the first compiled call takes. --freezing lets
the compiler fold weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from oodcli.networks.card import Overrides
from oodcli.networks.load import load_classifier
from oodcli.recording.channels_last import in_channels_last

NETWORKS = ("resnet50", "vit_base_patch16_224", "tf_efficientnet_lite0")


def seconds(run: Callable[[], object]) -> float:
    """Of processor time: another process may run, too."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measured(name: str, precision: str, options: argparse.Namespace) -> dict[str, float]:
    import timm

    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "network.pt"
        torch.save(timm.create_model(name).state_dict(), path)
        classifier = load_classifier(path, Overrides(arch=f"timm:{name}"))
    network = in_channels_last(classifier, precision).network
    compiled = torch.compile(network, dynamic=False, options={"freezing": options.freezing})
    shape = (options.batch_size, 3, *classifier.preprocessing.input_size)
    images = torch.randn(shape).contiguous(memory_format=torch.channels_last)

    def passing(forward: Callable[[Tensor], object]) -> Callable[[], None]:
        def run() -> None:
            half = precision == "bfloat16"
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                forward(images)

        return run

    plain, faster = passing(network), passing(compiled)
    start = time.perf_counter()
    faster()
    first = time.perf_counter() - start
    plain()
    pairs = [(seconds(plain), seconds(faster)) for _ in range(options.rounds)]
    each = [statistics.median(times) / options.batch_size for times in zip(*pairs, strict=True)]
    return {
        "plain_ms": round(1000 * each[0], 1),
        "compiled_ms": round(1000 * each[1], 1),
        "compiled_to_plain": round(statistics.median(b / a for a, b in pairs), 3),
        "first_call_s": round(first, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--freezing", action="store_true")
    parser.add_argument("--only", nargs="+", default=NETWORKS)
    parser.add_argument("--precision", nargs="+", default=("float32", "bfloat16"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, dict[str, float]] = {}
    for name in options.only:
        for precision in options.precision:
            found = results[f"{name}, {precision}"] = measured(name, precision, options)
            print(name, precision, json.dumps(found), file=sys.stderr, flush=True)
    print(json.dumps({"torch": str(torch.__version__), "results": results}, indent=1))


if __name__ == "__main__":
    main()
