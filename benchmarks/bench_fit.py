"""What fitting costs on features of ImageNet's size, in seconds and in memory.

    python -m benchmarks.bench_fit FOLDER [--rows 1000000] [--width 2048] [--classes 100]
        [--only NAME …] [--once] [--peers]

Generates FOLDER/ROWSxWIDTHxCLASSES.h5 (8 GB; kept for the next run): embeddings of 100 classes,
logits, a head, and a stage whose spatial means are the embedding, as in a ResNet-50; further
records, with those of one BatchNorm layer, are the embedding again. Then each fitted detector is
fitted by 'oodcli fit' in a process of its own, and printed as JSON: seconds, processor seconds,
largest resident memory, that beyond what the imports take, and MB of embeddings fitted on in a
processor second; 'knn' also scores 1,000 other rows. 'fit' fits twice, as it always does on real
rows, or, with --once, once, and calibrates on 1,000 other rows, as many as stand for OOD images,
noise or an accuracy-matched pool. With --peers the same rows go through pytorch-ood (pip install
-e '.[bench]') and scikit-learn, which want all of them in memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from benchmarks.measure import usage
from oodcli import detectors
from oodcli.features import INPUT, AdaScaleStep
from oodcli.files.cache import FORMAT
from oodcli.files.hdf5 import Provenance, checked
from oodcli.networks.preprocessing import Preprocessing

CLASSES = 100
BLOCK = 10_000
NOISE = "noise:uniform?n=2000&seed=0"
IMPORTS = "import oodcli.stages.fit"
FITTED = ("mds", "mds-sum", "vim", "react", "klm", "thinkback-norm", "knn", "1d", "lsgm")
"""Examples, which 'python -m benchmarks' measures."""


def fitted() -> list[str]:
    return [name for name in detectors.names() if detectors.get(name).fitted]


def generate(
    path: Path, rows: int, width: int, seed: int, classes: int = CLASSES, **provenance: Any
) -> None:
    """A cache of rows around class means, cut at zero as after a ReLU. provenance: fields of it
    that are not the usual ones."""
    if path.exists():
        return
    shared = np.random.default_rng(0)
    means = shared.gamma(0.5, 0.8, (classes, width)).astype(np.float32)
    mixing = (shared.standard_normal((64, width)) / 8).astype(np.float32)
    weight = ((means - means.mean(0)) / np.sqrt(width)).astype(np.float32)
    rng = np.random.default_rng(seed)
    unfinished = path.with_suffix(".partial")
    with h5py.File(unfinished, "w") as file:
        usual = Provenance(
            checkpoint_sha256="0" * 64,
            arch="generated",
            preprocessing=Preprocessing((224, 224), (0.5,) * 3, (0.25,) * 3),
            class_names=tuple(str(c) for c in range(classes)),
            source=f"generated, {rows} rows of {width}",
            command="benchmarks.bench_fit",
            oodcli_version="",
            torch_version="",
            seed=seed,
        )
        replace(usual, **provenance).write(file, FORMAT)
        file["head/weight"], file["head/bias"] = weight, np.zeros(classes, np.float32)
        text = h5py.string_dtype("utf-8")
        file.create_dataset("error", (rows,), text)
        paths = file.create_dataset("path", (rows,), text)
        label = file.create_dataset("label", (rows,), "int64")
        embedding, logits = (
            file.create_dataset(name, shape, "float32", **checked(shape, 4))
            for name, shape in (("embedding", (rows, width)), ("logits", (rows, classes)))
        )
        layer = file.require_group("layers/layer4")
        layer.attrs["kind"], layer.attrs["order"] = "stage", 0
        for part in ("mean", "std", "peak", "gram"):  # hard links: a network that pools has such
            layer[part] = embedding  # means, and only the size of the others matters
        layer = file.require_group("layers/bn")
        layer.attrs["kind"], layer.attrs["order"] = "batchnorm", 1
        for part in ("mean", "gradient", "sensitivity"):
            layer[part] = embedding
        for order, (name, channels) in enumerate({INPUT: 3, "bn": width}.items()):
            norm = file.require_group(f"batchnorm/{name}")
            norm.attrs["order"] = order
            constants = {"running_mean": 0, "running_var": 1, "weight": 1, "bias": 0}
            for part, value in constants.items():
                norm[part] = np.full(channels, value, np.float32)
            norm["eps"], norm["spatial_size"] = 0.0, 49
            for part in ("mean", "var"):
                norm[part] = embedding if name == "bn" else _ones(file, rows, channels)
        step = file.require_group("adascale")
        step["u"] = embedding
        step.attrs.update(asdict(AdaScaleStep()))
        for start in range(0, rows, BLOCK):
            count = min(BLOCK, rows - start)
            own = rng.integers(0, classes, count)
            block = means[own] + rng.standard_normal((count, 64), np.float32) @ mixing
            block += 0.3 * rng.standard_normal((count, width), np.float32)
            np.maximum(block, 0, out=block)
            stop = start + count
            embedding[start:stop], logits[start:stop] = block, block @ weight.T
            label[start:stop] = own
            paths[start:stop] = [f"{index:07d}" for index in range(start, stop)]
    unfinished.rename(path)


def _ones(file: h5py.File, rows: int, width: int) -> h5py.Dataset:
    return file.create_dataset(None, (rows, width), "float32", fillvalue=1.0)


def in_memory(cache: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with h5py.File(cache) as file:
        u, z, y = (torch.from_numpy(file[name][()]) for name in ("embedding", "logits", "label"))
    return u, z, y


def peer_mds(cache: Path) -> None:
    from pytorch_ood.detector import Mahalanobis

    u, _, y = in_memory(cache)
    Mahalanobis(None).fit_features(u, y)


def peer_vim(cache: Path) -> None:
    from pytorch_ood.detector import ViM

    u, _, y = in_memory(cache)
    with h5py.File(cache) as file:
        w, b = (torch.from_numpy(file[f"head/{name}"][()]) for name in ("weight", "bias"))
    ViM(None, min(u.shape[1] // 2, 1000), w, b).fit_features(u, y)


def peer_klm(cache: Path) -> None:
    from pytorch_ood.detector import KLMatching

    _, z, y = in_memory(cache)
    KLMatching(None).fit_logits(z, y)


def peer_knn(cache: Path) -> None:
    from pytorch_ood.detector import KNN

    u, _, y = in_memory(cache)
    detector = KNN(None)
    detector.fit_features(u, y)
    detector.predict_features(in_memory(beside(cache))[0])


def sklearn_mds(cache: Path) -> None:
    from sklearn.covariance import EmpiricalCovariance

    u, _, y = in_memory(cache)
    for c in range(int(y.max()) + 1):
        u[y == c] -= u[y == c].mean(0)
    EmpiricalCovariance(assume_centered=True).fit(u.double().numpy())


def sklearn_knn(cache: Path) -> None:
    from sklearn.neighbors import NearestNeighbors

    u, _, _ = in_memory(cache)
    unit = torch.nn.functional.normalize(u).numpy()
    others = torch.nn.functional.normalize(in_memory(beside(cache))[0]).numpy()
    NearestNeighbors(n_neighbors=50, algorithm="brute").fit(unit).kneighbors(others)


PEERS: dict[str, Callable[[Path], None]] = {
    "pytorch-ood mds": peer_mds,
    "pytorch-ood vim": peer_vim,
    "pytorch-ood klm": peer_klm,
    "pytorch-ood knn, 1,000 rows scored": peer_knn,
    "scikit-learn, covariance of mds": sklearn_mds,
    "scikit-learn, 50 neighbours of 1,000 rows": sklearn_knn,
}


def beside(cache: Path, what: str = "queries") -> Path:
    return cache.with_name(f"{what}-{cache.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=CLASSES)
    parser.add_argument("--only", nargs="*", default=fitted())
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cache = options.folder / f"{options.rows}x{options.width}x{options.classes}.h5"
    if options.peer:
        PEERS[options.peer](cache)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    generate(cache, options.rows, options.width, 1, options.classes)
    others: dict[str, dict[str, Any]] = {
        "queries": {},
        "noise": {"source": NOISE},
        "pool": {"virtual": True, "matched_accuracy": 0.9},
    }
    for seed, (what, provenance) in enumerate(others.items(), 2):
        path = beside(cache, what)
        generate(path, 1000, options.width, seed, options.classes, **provenance)
    oodcli = [sys.executable, "-m", "oodcli"]
    results: dict[str, dict[str, float]] = {}

    def measured(name: str, words: list[str]) -> None:
        found = usage(words)
        size = 4 * options.rows * options.width / 1e6
        results[name] = {
            **{key: round(value, 1) for key, value in found.items()},
            "beyond_imports_mb": round(found["peak_mb"] - imports, 1),
            "mb_a_processor_second": round(size / found["processor_seconds"], 1),
        }
        # An hour at full size: what is there already is said at once.
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)

    imports = usage([sys.executable, "-c", IMPORTS])["peak_mb"]
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        for name in options.only:
            kind = detectors.get(name)
            more = []
            if options.once or kind.needs_pool:
                pool = beside(cache, "pool" if kind.needs_pool else "queries")
                more += ["--calibrate", str(pool)]
            if kind.noise_images or kind.reference_images:
                more += ["--noise", str(beside(cache, "noise"))]
            if kind.needs_ood:
                more += ["--ood", str(beside(cache))]
            fit = [*oodcli, "fit", str(cache), "-d", name, "-o", made, "--force", *more]
            measured(f"fit {name}", fit)
            if name == "knn":
                score = [*oodcli, "score", str(beside(cache)), "-d", f"{made}/knn.safetensors"]
                measured("score 1,000 rows with knn", [*score, "-o", f"{made}/knn.csv"])
    for name in PEERS if options.peers else ():
        words = [sys.executable, "-m", "benchmarks.bench_fit", str(options.folder)]
        sizes = [
            word
            for key in ("rows", "width", "classes")
            for word in (f"--{key}", str(getattr(options, key)))
        ]
        measured(name, [*words, *sizes, "--peer", name])
    report = {
        "rows": options.rows,
        "width": options.width,
        "classes": options.classes,
        "fits": 1 if options.once else 2,
        "imports_mb": round(imports, 1),
        "threads": torch.get_num_threads(),
        "results": results,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
