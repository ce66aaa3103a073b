"""What fitting costs on features of ImageNet's size, in seconds and in memory.

    python -m benchmarks.bench_fit FOLDER [--rows 1000000] [--width 2048] [--peers]

Generates FOLDER/ROWSxWIDTH.h5 (8 GB; kept for the next run): embeddings of 100 classes, logits, a
head, and a stage whose spatial means are the embedding, as in a ResNet-50. Then each detector is
fitted by 'oodcli fit' in a process of its own, whose time and largest resident memory are printed
as JSON; 'knn' also scores 1,000 other rows. With --peers the same rows go through pytorch-ood
(pip install -e '.[bench]') and scikit-learn, which want all of them in memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

from benchmarks.measure import peak
from oodcli.files.cache import FORMAT
from oodcli.files.hdf5 import Provenance
from oodcli.networks.preprocessing import Preprocessing

CLASSES = 100
BLOCK = 10_000
FITTED = ("mds", "mds-sum", "vim", "react", "klm", "thinkback-norm", "knn", "1d", "lsgm")


def generate(path: Path, rows: int, width: int, seed: int) -> None:
    """A cache of rows around 100 class means, cut at zero as after a ReLU."""
    if path.exists():
        return
    shared = np.random.default_rng(0)
    means = shared.gamma(0.5, 0.8, (CLASSES, width)).astype(np.float32)
    mixing = (shared.standard_normal((64, width)) / 8).astype(np.float32)
    weight = ((means - means.mean(0)) / np.sqrt(width)).astype(np.float32)
    rng = np.random.default_rng(seed)
    unfinished = path.with_suffix(".partial")
    with h5py.File(unfinished, "w") as file:
        Provenance(
            checkpoint_sha256="0" * 64,
            arch="generated",
            preprocessing=Preprocessing((224, 224), (0.5,) * 3, (0.25,) * 3),
            class_names=tuple(str(c) for c in range(CLASSES)),
            source=f"generated, {rows} rows of {width}",
            command="benchmarks.bench_fit",
            oodcli_version="",
            torch_version="",
            seed=seed,
            device="cpu",
            precision="float32",
            virtual=False,
        ).write(file, FORMAT)
        file["head/weight"], file["head/bias"] = weight, np.zeros(CLASSES, np.float32)
        text = h5py.string_dtype("utf-8")
        file.create_dataset("error", (rows,), text)
        paths = file.create_dataset("path", (rows,), text)
        label = file.create_dataset("label", (rows,), "int64")
        embedding = file.create_dataset("embedding", (rows, width), "float32", chunks=(32, width))
        logits = file.create_dataset("logits", (rows, CLASSES), "float32", chunks=(640, CLASSES))
        layer = file.require_group("layers/layer4")
        layer.attrs["kind"], layer.attrs["order"] = "stage", 0
        layer["mean"] = embedding  # a hard link: global average pooling makes them the same
        for start in range(0, rows, BLOCK):
            count = min(BLOCK, rows - start)
            classes = rng.integers(0, CLASSES, count)
            block = means[classes] + rng.standard_normal((count, 64), np.float32) @ mixing
            block += 0.3 * rng.standard_normal((count, width), np.float32)
            np.maximum(block, 0, out=block)
            stop = start + count
            embedding[start:stop], logits[start:stop] = block, block @ weight.T
            label[start:stop] = classes
            paths[start:stop] = [f"{index:07d}" for index in range(start, stop)]
    unfinished.rename(path)


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
    detector.predict_features(in_memory(queries(cache))[0])


def sklearn_mds(cache: Path) -> None:
    from sklearn.covariance import EmpiricalCovariance

    u, _, y = in_memory(cache)
    for c in range(CLASSES):
        u[y == c] -= u[y == c].mean(0)
    EmpiricalCovariance(assume_centered=True).fit(u.double().numpy())


def sklearn_knn(cache: Path) -> None:
    from sklearn.neighbors import NearestNeighbors

    u, _, _ = in_memory(cache)
    unit = torch.nn.functional.normalize(u).numpy()
    others = torch.nn.functional.normalize(in_memory(queries(cache))[0]).numpy()
    NearestNeighbors(n_neighbors=50, algorithm="brute").fit(unit).kneighbors(others)


PEERS: dict[str, Callable[[Path], None]] = {
    "pytorch-ood mds": peer_mds,
    "pytorch-ood vim": peer_vim,
    "pytorch-ood klm": peer_klm,
    "pytorch-ood knn, 1,000 rows scored": peer_knn,
    "scikit-learn, covariance of mds": sklearn_mds,
    "scikit-learn, 50 neighbours of 1,000 rows": sklearn_knn,
}


def queries(cache: Path) -> Path:
    return cache.with_name("queries-" + cache.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--only", nargs="*", default=FITTED)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cache = options.folder / f"{options.rows}x{options.width}.h5"
    if options.peer:
        PEERS[options.peer](cache)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    generate(cache, options.rows, options.width, seed=1)
    generate(queries(cache), 1000, options.width, seed=2)
    oodcli = [sys.executable, "-m", "oodcli"]
    results: dict[str, dict[str, float]] = {}

    def measured(name: str, words: list[str]) -> None:
        seconds, megabytes = peak(words)
        results[name] = {"seconds": round(seconds, 1), "peak_mb": round(megabytes)}
        # An hour at full size: what is there already is said at once.
        print(f"{name}: {seconds:.0f} s, {megabytes:.0f} MB", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        for name in options.only:
            measured(f"fit {name}", [*oodcli, "fit", str(cache), "-d", name, "-o", made])
            if name == "knn":
                score = [*oodcli, "score", str(queries(cache)), "-d", f"{made}/knn.safetensors"]
                measured("score 1,000 rows with knn", [*score, "-o", f"{made}/knn.csv"])
    for name in PEERS if options.peers else ():
        words = [sys.executable, "-m", "benchmarks.bench_fit", str(options.folder)]
        sizes = ["--rows", str(options.rows), "--width", str(options.width)]
        measured(name, [*words, *sizes, "--peer", name])
    report = {
        "rows": options.rows,
        "width": options.width,
        "classes": CLASSES,
        "threads": torch.get_num_threads(),
        "results": results,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
