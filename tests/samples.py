"""A small valid file of everything that oodcli reads, and the parsers of the command line."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import pyarrow
except ImportError:
    pyarrow = None

try:
    import onnx
except ImportError:
    onnx = None

HAS_PARQUET = pyarrow is not None
HAS_ONNX = onnx is not None

PARSERS = {
    "checkpoint .pt": ("checkpoint", "net.pt"),
    "checkpoint .pth": ("checkpoint", "old.pth"),
    "checkpoint .safetensors": ("checkpoint", "net.safetensors"),
    "checkpoint .pt2": ("checkpoint", "program.pt2"),
    "checkpoint TorchScript": ("checkpoint", "script.pt"),
    "checkpoint .onnx": ("checkpoint", "graph.onnx"),
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
    "stored batch": ("batch", "000000.safetensors"),
    "stored job": ("job", "job.json"),
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


if not HAS_PARQUET:
    del PARSERS["scores .parquet"]
if not HAS_ONNX:
    del PARSERS["checkpoint .onnx"]

SLOW = {"checkpoint .pt2": 20}
"""Kinds of which only one in so many inputs is."""


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

        def again(start: int, stop: int) -> Iterator[Rows]:
            return opened.blocks({"logits"})

        for suffix in ("csv", "jsonl", *(["parquet"] if HAS_PARQUET else [])):
            score_to_file(
                again, 24, 24, chosen, classifier.class_names, folder / f"scores.{suffix}"
            )
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
    """An exported program, and TorchScript and ONNX beside it."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = {0: torch.export.Dim("batch")}
        program = torch.export.export(
            network.eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=(batch,)
        )
        torch.export.save(program, path)
        torch.jit.save(torch.jit.script(network), path.with_name("script.pt"))
        if HAS_ONNX:
            torch.onnx.export(
                network,
                (torch.randn(2, 3, 8, 8),),
                path.with_name("graph.onnx"),
                dynamo=False,
                input_names=["x"],
                dynamic_axes={"x": {0: "batch"}},
            )


def write_partial(classifier: Any, output: Path) -> None:
    """What an interrupted extraction leaves."""
    from oodcli.images import open_images
    from oodcli.jobs.kept import kept_work, partial_path
    from oodcli.recording.recorder import Recorder
    from oodcli.stages.extract import Restored, stored_rows
    from oodcli.stages.record import Work, no_progress, record_images

    source = open_images("noise:uniform?n=24", classifier.preprocessing, classifier.class_names)
    recorder = Recorder(classifier, frozenset({"logits", "embedding"}))
    with contextlib.suppress(StopIteration), kept_work(output, {"--seed": 0}, "oodcli") as kept:
        blocks = Work(kept).blocks(
            24,
            8,
            Restored(recorder),
            stored_rows,
            lambda start, stop: record_images(classifier, source, recorder, 8),
            no_progress,
        )
        assert blocks is not None
        for _ in range(2):
            next(blocks)
        raise StopIteration
    for name in ("000000.safetensors", "job.json"):
        shutil.copy(partial_path(output) / name, output.parent / name)


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
            count = cache.count

            def rows(start: int, stop: int) -> Any:
                return cache.blocks(needs(chosen))

            score_to_file(rows, count, count, chosen, names, io.StringIO())
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

    def batch(self, path: Path) -> None:
        from oodcli.jobs.kept import About, Kept
        from oodcli.recording.recorder import Recorder
        from oodcli.stages.extract import Restored

        kept = Kept(path.parent, About("", {}, {}), leads=False)
        restored = Restored(Recorder(self.classifier, frozenset({"logits", "embedding"})))
        kept.read((0,), restored)

    def job(self, path: Path) -> None:
        from oodcli.jobs.kept import read_about

        read_about(path.parent)

    def marks(self, path: Path) -> None:
        from oodcli.files.marks import read_marks

        read_marks(path)
