"""The detectors that other libraries have too, on the same recorded rows: AUROC and time.

    python -m benchmarks.peers DATA [--rows 2000] [--fit-rows 5000] [--only NAME …] [-o FILE.json]

Installs nothing. pytorch-ood comes with the extra ``bench``. oodeel asks for an old numpy, but runs
with a new one: pip install --no-deps oodeel, then what it says is missing (faiss-cpu, datasets, …).
A library that cannot be imported is left out.

DATA has the networks and images of ``benchmarks.detector_pages``. Every network runs once over its
images. Then each detector and its peers are fitted on the same embeddings and logits, and score the
same rows, with the same settings. The difference of their AUROC is in points, the mean over the OOD
sets and the largest; the time is that of the fit and of all scores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import oodcli
from benchmarks.detector_pages import INSIDE, NETWORKS, SETS, TRAINED_ON
from benchmarks.measure import machine
from oodcli import detectors
from oodcli.features import Features, recorded
from oodcli.metrics import auroc

BATCH = 1000

Score = Callable[[Tensor, Tensor], Any]
"""(embedding, logits) → (N,) scores, higher = more OOD."""


@dataclass(frozen=True)
class Rows:
    """What the peers are fitted on: embedding (N, D), logits (N, K), labels (N,), and the head."""

    embedding: Tensor
    logits: Tensor
    labels: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def head(self) -> nn.Linear:
        """A copy of the last layer, without gradients."""
        head = nn.Linear(self.weight.shape[1], self.weight.shape[0])
        head.load_state_dict({"weight": self.weight, "bias": self.bias})
        return head.requires_grad_(False)


@dataclass(frozen=True)
class Peer:
    """Another library's detector. fit: rows → how it scores. ours: our settings for the same
    formula. because: the reason of a difference that is known and stays."""

    library: str
    fit: Callable[[Rows], Score]
    ours: Mapping[str, Any] = field(default_factory=dict)
    because: str = ""


# --- pytorch-ood ------------------------------------------------------------------------------


def torch_ood(
    name: str, build: Callable[[Any, Rows], Any] = lambda kind, rows: kind(None), on: str = "logits"
) -> Callable[[Rows], Score]:
    """on: what the detector reads: logits, features, or maps (N, D, 1, 1), whose mean they are."""

    def fit(rows: Rows) -> Score:
        from pytorch_ood import detector

        made = build(getattr(detector, name), rows)
        given = {
            "logits": rows.logits,
            "features": rows.embedding,
            "feature_maps": rows.embedding[:, :, None, None],
        }[on]
        if made.requires_fit:
            getattr(made, f"fit_{on}")(given, rows.labels)
        predict = getattr(made, f"predict_{on}")

        def score(embedding: Tensor, logits: Tensor) -> Any:
            if on == "logits":
                return predict(logits)
            return predict(embedding if on == "features" else embedding[:, :, None, None])

        return score

    return fit


def _on_maps(**settings: Any) -> Callable[[Any, Rows], Any]:
    """A detector between the last map and the head."""

    def build(kind: Any, rows: Rows) -> Any:
        head = nn.Sequential(nn.Flatten(), rows.head)
        return kind(nn.Identity(), head, **settings)

    return build


def _with_head(**settings: Any) -> Callable[[Any, Rows], Any]:
    return lambda kind, rows: kind(nn.Identity(), rows.head, **settings)


def _with_weights(**settings: Any) -> Callable[[Any, Rows], Any]:
    return lambda kind, rows: kind(None, w=rows.weight, b=rows.bias, **settings)


# --- oodeel -----------------------------------------------------------------------------------


def oodeel(name: str, on: str = "logits", **settings: Any) -> Callable[[Rows], Score]:
    """Its detectors take a network: here the head alone, whose inputs are the embeddings."""

    def fit(rows: Rows) -> Score:
        from oodeel import methods
        from torch.utils.data import DataLoader, TensorDataset

        network = nn.Sequential(OrderedDict(embedding=nn.Identity(), head=rows.head))
        made = getattr(methods, name)(**settings)
        layers = {} if on == "logits" else {"feature_layers_id": ["embedding"]}
        loader = DataLoader(TensorDataset(rows.embedding, rows.labels), batch_size=BATCH)
        made.fit(network.eval(), fit_dataset=loader, **layers)
        return lambda embedding, logits: np.concatenate(
            [made.score(block)[0] for block in torch.split(embedding, BATCH)]
        )

    return fit


FLOAT32 = "softmax in float32 is 1 for the surest"

PEERS: dict[str, list[Peer]] = {
    "msp": [
        Peer("pytorch-ood", torch_ood("MaxSoftmax"), because=FLOAT32),
        Peer("oodeel", oodeel("MLS", output_activation="softmax"), because=FLOAT32),
    ],
    "entropy": [
        Peer("pytorch-ood", torch_ood("Entropy"), because=FLOAT32),
        Peer("oodeel", oodeel("Entropy")),
    ],
    "mls": [Peer("pytorch-ood", torch_ood("MaxLogit")), Peer("oodeel", oodeel("MLS"))],
    "energy": [
        Peer("pytorch-ood", torch_ood("EnergyBased")),
        Peer("oodeel", oodeel("Energy")),
    ],
    "klm": [Peer("pytorch-ood", torch_ood("KLMatching"))],
    "react": [
        Peer("pytorch-ood", torch_ood("ReAct", _on_maps(percentile=0.9), "feature_maps")),
        Peer("oodeel", oodeel("Energy", use_react=True, react_quantile=0.9)),
    ],
    "mds": [
        Peer("pytorch-ood", torch_ood("Mahalanobis", on="features")),
        Peer("oodeel", oodeel("Mahalanobis", on="features", eps=0.0)),
    ],
    "knn": [
        Peer("pytorch-ood", torch_ood("KNN", on="features"), {"k": 50}),
        Peer("oodeel", oodeel("DKNN", on="features"), {"k": 50}),
    ],
    "vim": [
        Peer("pytorch-ood", torch_ood("ViM", _with_weights(d=32), "features"), {"dim": 32}),
        Peer(
            "oodeel",
            oodeel("VIM", on="features", princ_dims=32),
            {"dim": 32},
            because="its origin is the mean of the rows, not −W⁺b",
        ),
    ],
    "gen": [
        Peer("pytorch-ood", torch_ood("GEN"), because="it clamps p to 1e-7 … 1 − 1e-7"),
        Peer("oodeel", oodeel("GEN")),
    ],
    "temp-scaling": [
        Peer(
            "pytorch-ood",
            torch_ood("TemperatureScaling"),
            because="its optimiser stops after 50 small steps, before the minimum",
        )
    ],
    "scale": [
        Peer("pytorch-ood", torch_ood("SCALE", _on_maps(percentile=0.85), "feature_maps")),
        Peer("oodeel", oodeel("Energy", use_scale=True, scale_percentile=0.85)),
    ],
    "lts": [Peer("pytorch-ood", torch_ood("LTS", _with_head(p=0.05), "features"))],
    **{
        name: [
            Peer(
                "pytorch-ood",
                torch_ood("ASH", _on_maps(variant=name, percentile=0.9), "feature_maps"),
            )
        ]
        for name in ("ash-p", "ash-b", "ash-s")
    },
    "dice": [Peer("pytorch-ood", torch_ood("DICE", _with_weights(p=0.9), "features"))],
    "vra": [
        Peer(
            "pytorch-ood",
            torch_ood(
                "VRA",
                _on_maps(lower_percentile=0.6, upper_percentile=0.95),
                "feature_maps",
            ),
            because="one pair of bounds for all entries, not one for each",
        )
    ],
    "fdbd": [Peer("pytorch-ood", torch_ood("fDBD", _with_head(), "features"))],
    "nci": [Peer("pytorch-ood", torch_ood("NCI", _with_head(alpha=1e-4), "features"))],
    "nnguide": [
        Peer(
            "pytorch-ood",
            torch_ood("NNGuide", _with_head(k=10), "features"),
            {"k": 10, "share": 1.0},
        )
    ],
    "rmds": [
        Peer("pytorch-ood", torch_ood("RMD", on="features")),
        Peer("oodeel", oodeel("RMDS", on="features", eps=0.0)),
    ],
    "gmm": [
        Peer("pytorch-ood", torch_ood("GMM", on="features"), {"covariance": "full"}),
    ],
    "pnml": [Peer("pytorch-ood", torch_ood("PNML", _with_head(), "features"))],
    "she": [Peer("pytorch-ood", torch_ood("SHE", _with_head(), "features"))],
    "openmax": [
        Peer(
            "pytorch-ood",
            torch_ood("OpenMax", lambda kind, rows: kind(None, tailsize=20, alpha=3)),
            because="it adds 10,000 to the tail before the fit, and takes rows classified wrongly",
        )
    ],
}
"""Our detector → the same one elsewhere."""


def here() -> list[str]:
    """The other libraries that can be imported."""
    names = {"pytorch-ood": "pytorch_ood", "oodeel": "oodeel"}
    return [name for name, module in names.items() if importlib.util.find_spec(module)]


@dataclass(frozen=True)
class Compared:
    """One row of the table. auroc, theirs: mean over the sets, in [0, 1]. mean, largest: ours less
    theirs, in points; largest is that of one set. seconds: fit and scores, ours and theirs."""

    network: str
    detector: str
    library: str
    auroc: float
    theirs: float
    mean: float
    largest: float
    seconds: tuple[float, float]
    because: str


def compare(
    network: str,
    train: Features,
    labels: Tensor,
    sets: Mapping[str, Features],
    names: Sequence[str],
    libraries: Sequence[str],
) -> Iterator[Compared]:
    """sets: rows to score; the in-distribution ones are called INSIDE."""
    head = recorded(train.head)
    rows = Rows(recorded(train.embedding), recorded(train.logits), labels, head.weight, head.bias)

    def measured(work: Callable[[], dict[str, Any]]) -> tuple[dict[str, float], float]:
        start = time.perf_counter()
        scores = {name: np.asarray(found, np.float64) for name, found in work().items()}
        spent = time.perf_counter() - start
        inside = scores.pop(INSIDE)
        return {name: auroc(inside, found) for name, found in scores.items()}, spent

    for name in names:
        for peer in PEERS[name]:
            if peer.library not in libraries:
                continue

            def ours(name: str = name, peer: Peer = peer) -> dict[str, Any]:
                detector = detectors.get(name).fit([train], **peer.ours)
                return {each: detector.score(found) for each, found in sets.items()}

            def theirs(peer: Peer = peer) -> dict[str, Any]:
                score = peer.fit(rows)
                with torch.no_grad():
                    return {
                        each: score(recorded(found.embedding), recorded(found.logits))
                        for each, found in sets.items()
                    }

            mine, spent = measured(ours)
            other, spent_there = measured(theirs)
            off = [100 * (mine[each] - other[each]) for each in mine]
            yield Compared(
                network,
                name,
                peer.library,
                float(np.mean(list(mine.values()))),
                float(np.mean(list(other.values()))),
                float(np.mean(off)),
                max(off, key=abs),
                (spent, spent_there),
                peer.because,
            )


def sample(file: Path, rows: int) -> tuple[np.ndarray, Tensor | None]:
    """Rows evenly spaced over a set, and their labels."""
    with np.load(file) as found:
        count = len(found["images"])
        chosen = np.arange(min(rows, count)) * count // min(rows, count)
        labels = torch.from_numpy(found["labels"][chosen]) if "labels" in found else None
        return found["images"][chosen], labels


def table(found: Sequence[Compared]) -> str:
    """Markdown."""
    lines = [
        "| network | detector | library | AUROC | difference | largest | seconds | theirs | |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [
        f"| {one.network} | `{one.detector}` | {one.library} | {100 * one.auroc:.2f} | "
        f"{one.mean:+.2f} | {one.largest:+.2f} | {one.seconds[0]:.2f} | {one.seconds[1]:.2f} | "
        f"{one.because} |"
        for one in found
    ]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--fit-rows", type=int, default=5000)
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(words)
    libraries = here()
    if not libraries:
        raise SystemExit("neither pytorch-ood nor oodeel is installed: pip install -e '.[bench]'")
    kinds = [detectors.get(name) for name in options.only]
    needs = frozenset({"logits", "embedding", "head"}).union(
        *(kind.needs | kind.fit_needs() for kind in kinds)
    )
    found: list[Compared] = []
    for network, checkpoint in NETWORKS.items():
        classifier = oodcli.load_classifier(options.data / "checkpoints" / checkpoint)

        def recorded_rows(name: str, rows: int, classifier: Any = classifier) -> Any:
            images, labels = sample(options.data / f"{name}.npz", rows)
            return oodcli.record(classifier, images, needs), labels

        train, labels = recorded_rows(TRAINED_ON, options.fit_rows)
        train = replace(train, label=labels)
        sets = {name: recorded_rows(name, options.rows)[0] for name in (INSIDE, *SETS)}
        for one in compare(network, train, labels, sets, options.only, libraries):
            print(f"{one.network} {one.detector} {one.library}: {one.mean:+.3f}", file=sys.stderr)
            found.append(one)
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    about = machine()
    print(f"{versions}; {about['processor']}, {about['logical_cores']} cores\n\n{table(found)}")
    if options.output is not None:
        rows = [vars(one) for one in found]
        options.output.write_text(
            json.dumps({"versions": versions, "machine": about, "rows": rows})
        )


if __name__ == "__main__":
    main()
