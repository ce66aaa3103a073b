"""What broken and hostile files do: mutated inputs over all parsers.

    python -m benchmarks.bench_fuzz [--inputs 10000] [--seed 0] [--seconds 600] [--keep FOLDER]

A small valid sample of everything that oodcli reads is mutated at random (cut, bits flipped, parts
moved, lengths set to huge numbers; text by its words, archives by their members, HDF5 by its
datasets and attributes) and handed to the parser that the command line calls, in processes of their
own that may take 20 seconds and 4 GB of addresses an input. It must be read, or be refused by an
OodcliError or, an image, by its row's error. Anything else is a finding: the exit status is 1, and
--keep keeps the inputs. One JSON object is printed, with the counts of each kind of file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import resource
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.mutations import mutated

LIMIT_S = 20.0
START_S = 120.0
LIMIT_MB = 2000.0
ADDRESSES = 4 << 30
"""Bytes that a worker may reserve beyond what it has when it starts."""

PARSERS = {
    "checkpoint .pt": ("checkpoint", "net.pt"),
    "checkpoint .pth": ("checkpoint", "old.pth"),
    "checkpoint .safetensors": ("checkpoint", "net.safetensors"),
    "checkpoint .pt2": ("checkpoint", "program.pt2"),
    "model card": ("card", "card.toml"),
    "virtual images": ("virtual", "virtual.h5"),
    "virtual images, old HDF5": ("virtual", "old.h5"),
    "feature cache": ("cache", "features.h5"),
    "detector mds": ("artefact", "mds.safetensors"),
    "detector knn": ("artefact", "knn.safetensors"),
    "detector c2ir-z": ("artefact", "c2ir-z.safetensors"),
    "detector energy": ("artefact", "energy.safetensors"),
    "scores .csv": ("scores", "scores.csv"),
    "scores .jsonl": ("scores", "scores.jsonl"),
    "scores .parquet": ("scores", "scores.parquet"),
    "marked rows": ("marks", "marks.csv"),
    "partial file": ("partial", "logits.h5.partial"),
    "image .png": ("images", "image.png"),
    "image .jpg": ("images", "image.jpg"),
    "image .gif": ("images", "image.gif"),
    "image .webp": ("images", "image.webp"),
    "image .bmp": ("images", "image.bmp"),
    "image .tif": ("images", "image.tif"),
    "images .npz": ("images", "images.npz"),
    "images .tar": ("images", "images.tar"),
    "images .tar.gz": ("images", "images.tar.gz"),
    "images .zip": ("images", "images.zip"),
    "images list": ("images", "images.txt"),
}
"""Kind → which of ``parse`` reads it, and the file of ``write_samples``."""

SLOW = {"checkpoint .pt2": 20}
"""Kinds of which only one in so many inputs is."""


@dataclass
class Count:
    """What became of the inputs of one kind."""

    inputs: int = 0
    read: int = 0
    refused: int = 0
    other_exceptions: int = 0
    crashed: int = 0
    timed_out: int = 0
    too_large: int = 0
    largest_mb: float = 0.0
    slowest_s: float = 0.0


# --- samples ------------------------------------------------------------------------------------


def write_samples(folder: Path) -> None:
    """A valid file of every kind. The network is a ResNet-8 of 4 channels with random weights."""
    import h5py
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from oodcli import detectors
    from oodcli.features import Rows
    from oodcli.files.artefact import Artefact, write_artefact
    from oodcli.files.cache import CacheWriter, open_cache
    from oodcli.files.hdf5 import writing
    from oodcli.files.virtual import VirtualWriter
    from oodcli.images import open_images
    from oodcli.networks.architectures import build
    from oodcli.networks.load import load_classifier
    from oodcli.recording.recorder import Recorder, recordable
    from oodcli.stages.chosen import Chosen
    from oodcli.stages.record import provenance, record_images
    from oodcli.stages.score import score_to_file

    torch.manual_seed(0)
    network = build("resnet8-cifar-w4", 3)
    state = network.state_dict()
    torch.save({"state_dict": state, "epoch": 3}, folder / "net.pt")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "net.safetensors")
    (folder / "card.toml").write_text(
        'arch = "resnet8-cifar-w4"\nnum_classes = 3\nclass_names = ["cat", "dog", "emu"]\n'
        "input_size = [8, 8]\nmean = [0.5, 0.4, 0.3]\nstd = [0.2, 0.2, 0.2]\nresize = 9\n"
        'interpolation = "bilinear"\n',
        encoding="utf-8",
    )
    write_program(network, folder / "program.pt2")
    classifier = load_classifier(folder / "net.pt", options_of(folder))
    made = provenance(
        classifier, source="noise", command="oodcli", seed=0, precision="float32", virtual=True
    )
    batch = torch.randn(6, 3, 8, 8), torch.arange(6) % 3, {"layer1": torch.randn(6, 4)}
    with (
        writing(folder / "virtual.h5") as new,
        h5py.File(folder / "old.h5", "w", libver="earliest") as old,  # groups of another kind
    ):
        for file in (new.file, old):
            writer = VirtualWriter(file, made, 6, {})
            writer.append(*batch)
            writer.finish({})
    source = open_images("noise:uniform?n=24", classifier.preprocessing, classifier.class_names)
    recorder = Recorder(classifier, recordable(classifier) - {"layers.gram", "odin.logits"})
    with writing(folder / "features.h5") as new:
        cache = CacheWriter(new.file, made, len(source))
        for rows in record_images(classifier, source, recorder, 24):
            assert rows.features is not None
            labels = torch.arange(24) % 3
            cache.append(
                type(rows)(rows.paths, labels, rows.errors, with_labels(rows.features, labels))
            )
    with open_cache(folder / "features.h5") as opened:
        for name in ("mds", "knn", "c2ir-z", "energy"):
            kind = detectors.get(name)
            given: dict[str, Any] = {"weights": "uniform"} if name == "c2ir-z" else {}
            needs = kind.fit_needs(**given)
            fitted = kind.fit(opened.rows(needs), **given) if kind.fitted else kind()
            artefact = Artefact(fitted, classifier.sha256, {"rows": 24, "kind": "virtual"})
            write_artefact(artefact, folder / f"{name}.safetensors")
        chosen = [Chosen(detectors.get(name)()) for name in ("msp", "energy")]

        def again() -> Iterator[Rows]:
            return opened.blocks({"logits"})

        for suffix in ("csv", "jsonl", "parquet"):
            score_to_file(again, chosen, classifier.class_names, folder / f"scores.{suffix}")
    write_partial(classifier, folder / "logits.h5")
    (folder / "marks.csv").write_text('path,ood\na.png,0\n"b, c.png",1\nd.png,\n', encoding="utf-8")
    noise = np.random.default_rng(0).integers(0, 256, (12, 11, 3)).astype(np.uint8)
    image = Image.fromarray(noise)
    for name in ("image.png", "image.jpg", "image.gif", "image.webp", "image.bmp", "image.tif"):
        image.save(folder / name)
    write_collections(folder, noise)


def with_labels(features: Any, labels: Any) -> Any:
    from dataclasses import replace

    return replace(features, label=labels)


def options_of(folder: Path) -> Any:
    from oodcli.networks.card import Overrides

    return Overrides(card=folder / "card.toml")


def write_program(network: Any, path: Path) -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = {0: torch.export.Dim("batch")}
        program = torch.export.export(
            network.eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=(batch,)
        )
        torch.export.save(program, path)


def write_partial(classifier: Any, output: Path) -> None:
    """What an interrupted extraction leaves."""
    from oodcli.files.journal import journal
    from oodcli.images import open_images
    from oodcli.recording.recorder import Recorder
    from oodcli.stages.extract import Restored, kept
    from oodcli.stages.record import Work, no_progress, record_images

    source = open_images("noise:uniform?n=24", classifier.preprocessing, classifier.class_names)
    recorder = Recorder(classifier, frozenset({"logits", "embedding"}))
    with contextlib.suppress(StopIteration), journal(output, {"--seed": 0}, "oodcli") as partial:
        blocks = Work(partial).blocks(
            Restored(recorder),
            kept,
            lambda: record_images(classifier, source, recorder, 8),
            no_progress,
        )
        assert blocks is not None
        for _ in range(2):
            next(blocks)
        raise StopIteration


def write_collections(folder: Path, image: Any) -> None:
    import tarfile
    import zipfile

    import numpy as np

    np.savez_compressed(folder / "images.npz", images=np.stack([image] * 4), labels=np.arange(4))
    names = ("cat/1.png", "dog/2.png", "emu/3.png")
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(folder / "image.png", name)
    for name, mode in (("images.tar", "w"), ("images.tar.gz", "w:gz")):
        with tarfile.open(folder / name, mode) as tar:  # type: ignore[call-overload]
            for member in (*names, "long/" * 30 + "4.png"):
                tar.add(folder / "image.png", member)
    lines = [f"{(folder / 'image.png').as_posix()} {label}" for label in ("cat", "1", "emu")]
    (folder / "images.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- parsers ------------------------------------------------------------------------------------


class Parser:
    """Reads mutated files as the command line would; what it needs besides is from the samples."""

    def __init__(self, samples: Path) -> None:
        from oodcli.files.cache import open_cache
        from oodcli.networks.load import load_classifier

        warnings.simplefilter("ignore")
        self.samples = samples
        self.classifier = load_classifier(samples / "net.pt", options_of(samples))
        with open_cache(samples / "features.h5") as cache:
            (rows,) = cache.blocks()
        self.features = rows.features

    def parse(self, how: str, path: Path) -> None:
        """Raises OodcliError for what is refused."""
        getattr(self, how)(path)

    def checkpoint(self, path: Path) -> None:
        from oodcli.networks.load import load_classifier

        load_classifier(path)

    def card(self, path: Path) -> None:
        from oodcli.networks.card import Overrides
        from oodcli.networks.load import load_classifier

        load_classifier(self.samples / "net.pt", Overrides(card=path))

    def images(self, path: Path) -> None:
        from oodcli.errors import ImagesError
        from oodcli.images import batches, open_images

        preprocessing, names = self.classifier.preprocessing, self.classifier.class_names
        found = list(batches(open_images(str(path), preprocessing, names), preprocessing, 8))
        reasons = [error for batch in found for error in batch.errors if error]
        for batch in found:
            for text in (*batch.paths, *filter(None, batch.errors)):
                text.encode()
        if reasons:
            raise ImagesError(reasons[0])

    def virtual(self, path: Path) -> None:
        from oodcli.files.virtual import read_provenance, read_sensitivity

        self.images(path)
        read_provenance(path)
        read_sensitivity(path, 0, 6)

    def cache(self, path: Path) -> None:
        import io

        from oodcli import detectors
        from oodcli.files.cache import open_cache
        from oodcli.stages.chosen import choose_detectors, needs
        from oodcli.stages.score import score_to_file

        with open_cache(path) as cache:
            names = cache.provenance.class_names
            chosen = choose_detectors(["all"], {}, cache.recorded, "")
            score_to_file(lambda: cache.blocks(needs(chosen)), chosen, names, io.StringIO())
            for name in ("mds", "knn"):
                kind = detectors.get(name)
                cache.require(kind.needs, name)
                kind.fit(cache.rows(kind.fit_needs()))

    def artefact(self, path: Path) -> None:
        from oodcli.files.artefact import read_artefact

        assert self.features is not None
        artefact = read_artefact(path)
        artefact.detector.score(self.features)
        assert isinstance(artefact.saw, str)

    def scores(self, path: Path) -> None:
        from oodcli.files.scores import read_scores

        read_scores(path)

    def partial(self, path: Path) -> None:
        import os

        from oodcli.files.describe import describe_file
        from oodcli.files.journal import Journal, read_about
        from oodcli.recording.recorder import Recorder
        from oodcli.stages.extract import Restored

        describe_file(path, "partial")
        about, rows, _ = read_about(path)
        handle = os.open(path, os.O_RDWR)
        try:
            journal = Journal(path, path, handle, about, restart=False)
            restored = Restored(Recorder(self.classifier, frozenset({"logits", "embedding"})))
            assert sum(len(block.paths) for block in journal.kept(restored)) <= rows
        finally:
            os.close(handle)

    def marks(self, path: Path) -> None:
        from oodcli.files.marks import read_marks

        read_marks(path)


# --- processes ----------------------------------------------------------------------------------


def serve(connection: Connection, samples: Path, folder: Path) -> None:
    """A worker: takes kind and seed, answers with outcome, reason, seconds and peak MB."""
    import torch

    from oodcli.errors import OodcliError

    torch.set_num_threads(1)
    parser = Parser(samples)
    used = status_kb("VmSize") * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, used + ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send(("ready", "", 0.0, 0.0))
    while True:
        kind, seed = connection.recv()
        path = write_input(kind, seed, samples, folder)
        reset_peak()
        start = time.perf_counter()
        outcome, reason = "read", ""
        try:
            parser.parse(PARSERS[kind][0], path)
        except OodcliError as error:
            outcome = "refused"
            if not str(error).strip():
                outcome, reason = "other_exceptions", "an empty sentence"
        except BaseException as error:  # a panic of Rust's is none of Exception's
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "oodcli" in frame.filename] or list(frames)
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            outcome, reason = (
                "other_exceptions",
                f"{type(error).__name__} at {where}: {error}"[:300],
            )
        seconds = time.perf_counter() - start
        path.unlink(missing_ok=True)
        connection.send((outcome, reason, seconds, status_kb("VmHWM") / 1000))


def write_input(kind: str, seed: int, samples: Path, folder: Path) -> Path:
    """The mutated file; the same for the same seed."""
    name = PARSERS[kind][1]
    path = folder / name
    path.write_bytes(mutated((samples / name).read_bytes(), name, Random(f"{kind} {seed}")))
    return path


def status_kb(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0


def reset_peak() -> None:
    """Forgets the largest resident size until now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


class Worker:
    """A process that parses; a new one where the last has died or hangs."""

    def __init__(self, samples: Path, folder: Path) -> None:
        self.samples, self.folder = samples, folder
        folder.mkdir()
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, self.samples, self.folder), daemon=True
        )
        self.process.start()
        theirs.close()
        if not self.connection.poll(START_S):
            raise SystemExit(f"a worker did not start in {START_S:g} s")
        self.connection.recv()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()

    def run(self, kind: str, seed: int) -> tuple[str, str, float, float]:
        self.connection.send((kind, seed))
        outcome, reason = "timed_out", f"after {LIMIT_S:g} s"
        try:
            if self.connection.poll(LIMIT_S):
                answer: tuple[str, str, float, float] = self.connection.recv()
                if answer[3] > LIMIT_MB / 2 + 200:  # some of it is kept, and would count again
                    self.stop()
                    self.start()
                return answer
        except (EOFError, OSError):
            self.process.join(5)
            outcome, reason = "crashed", f"exit status {self.process.exitcode}"
        self.stop()
        self.start()
        return outcome, reason, LIMIT_S if outcome == "timed_out" else 0.0, 0.0


@dataclass
class Run:
    """Inputs still to be tried, and what became of the others."""

    inputs: Iterator[tuple[str, int]]
    until: float
    samples: Path
    keep: Path | None
    counts: dict[str, Count] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self, worker: Worker) -> None:
        while time.monotonic() < self.until:
            with self.lock:
                given = next(self.inputs, None)
            if given is None:
                break
            kind, seed = given
            self.note(kind, seed, *worker.run(kind, seed))
        worker.stop()

    def note(
        self, kind: str, seed: int, outcome: str, reason: str, seconds: float, peak: float
    ) -> None:
        if outcome in ("read", "refused") and peak > LIMIT_MB:
            outcome, reason = "too_large", f"{peak:.0f} MB"
        with self.lock:
            count = self.counts.setdefault(kind, Count())
            count.inputs += 1
            setattr(count, outcome, getattr(count, outcome) + 1)
            count.largest_mb = max(count.largest_mb, round(peak, 1))
            count.slowest_s = max(count.slowest_s, round(seconds, 2))
            if outcome in ("read", "refused"):
                return
            self.findings.append(f"{kind}, seed {seed}: {outcome.replace('_', ' ')}: {reason}")
            if self.keep is not None:
                folder = self.keep / f"{kind.replace(' ', '-')}-{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                write_input(kind, seed, self.samples, folder)


def plan(inputs: int, seed: int, only: Callable[[str], bool]) -> Iterator[tuple[str, int]]:
    """Kinds in turn, each with a seed of its own, until there are so many."""
    turn = given = 0
    kinds = [kind for kind in PARSERS if only(kind)]
    while given < inputs:
        for kind in kinds:
            if turn % SLOW.get(kind, 1) == 0 and given < inputs:
                given += 1
                yield kind, seed * 1_000_000 + turn
        turn += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600, help="stop after so long")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs of findings")
    parser.add_argument("--only", default="", help="kinds with this word in their name")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        samples = Path(made) / "samples"
        samples.mkdir()
        write_samples(samples)
        inputs = plan(options.inputs, options.seed, lambda kind: options.only in kind)
        until = time.monotonic() + options.seconds
        run = Run(inputs, until, samples, options.keep)
        workers = [Worker(samples, Path(made) / f"w{n}") for n in range(options.workers)]
        threads = [threading.Thread(target=run.work, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print("\n".join(sorted(run.findings)), file=sys.stderr)
    total = sum(count.inputs for count in run.counts.values())
    print(
        json.dumps(
            {
                "inputs": total,
                "seed": options.seed,
                "findings": sorted(run.findings),
                "results": {kind: vars(run.counts[kind]) for kind in PARSERS if kind in run.counts},
            },
            indent=1,
        )
    )
    return int(bool(run.findings))


if __name__ == "__main__":
    sys.exit(main())
