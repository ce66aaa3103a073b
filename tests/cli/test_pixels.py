"""What is read of an image: EXIF, ranges of more than 8 bits, and the note on dark ones."""

from __future__ import annotations

import json
import logging
import pickle
import tarfile
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from commands import oodcli
from PIL import Image
from torchvision import datasets, transforms

import oodcli as api
from oodcli.features import Features
from oodcli.files.made import read_made
from oodcli.images import batches, open_images
from oodcli.images.pieces import pieces
from oodcli.images.pixels import fit
from oodcli.images.reading import note_dim
from oodcli.networks.card import Overrides
from oodcli.networks.preprocessing import Preprocessing
from oodcli.stages import ray as cluster
from oodcli.stages.record import no_progress

PLAIN = Preprocessing((8, 8), (0.0,) * 3, (1.0,) * 3)
GREY = Preprocessing((8, 8), (0.0,), (1.0,))
DARK = "no value above 4095, so they look nearly black: give --image-range 0,4095"


def read(spec: object, preprocessing: Preprocessing = PLAIN, **options: float) -> torch.Tensor:
    """All pixels of a source, in 0…255."""
    source = open_images(str(spec), preprocessing, ("0", "1"))
    found = list(batches(source, preprocessing, 2, **options))
    assert [error for batch in found for error in batch.errors if error] == []
    return (torch.cat([batch.images for batch in found]) * 255).round().long()


def flat(level: float, kind: type) -> Image.Image:
    return Image.fromarray(np.full((8, 8), level, kind))


# --- EXIF -----------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A photograph on its side in every kind of source."""
    image = Image.new("L", (8, 8))
    image.paste(255, (0, 0, 8, 4))  # white on top as it is stored, on the right upright
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for suffix in ("jpg", "png"):
        image.convert("RGB").save(tmp_path / "photos" / "a" / f"x.{suffix}", exif=exif)
    names = sorted((tmp_path / "photos" / "a").iterdir())
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in names))
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name in names:
            archive.write(name, name.name)
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        for name in names:
            archive.add(name, name.name)
    return tmp_path


@pytest.mark.parametrize("exif", ["turn", "keep"])
def test_every_source_treats_exif_alike(photos: Path, exif: str) -> None:
    white = {"keep": (slice(None), slice(0, 3)), "turn": (slice(5, 8), slice(None))}[exif]
    preprocessing = replace(PLAIN, exif=exif)
    for name in ("photos", "list.txt", "photos.zip", "photos.tar", "photos/a/x.jpg"):
        found = read(photos / name, preprocessing)
        assert (found[..., white[1], white[0]] > 200).all(), name
    found = read(f"torchvision:ImageFolder?root={photos / 'photos'}", preprocessing)
    assert (found[..., white[1], white[0]] > 200).all()
    in_processes = read(photos / "photos", preprocessing, timeout=60)
    assert torch.equal(in_processes, found)
    if exif == "keep":  # as torchvision's own loader
        theirs = datasets.ImageFolder(photos / "photos", transforms.PILToTensor())
        assert torch.equal(found, torch.stack([image for image, _ in theirs]).long())


def test_a_dataset_that_opens_files_itself(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CelebA, Flowers102 … convert to RGB, which keeps the EXIF block of a JPEG."""

    class Own(datasets.VisionDataset):
        def __init__(self, root: str) -> None:
            super().__init__(root)

        def __len__(self) -> int:
            return 1

        def __getitem__(self, row: int) -> tuple[Image.Image, int]:
            return Image.open(photos / "photos" / "a" / "x.jpg").convert("RGB"), 0

    monkeypatch.setattr(datasets, "Flowers102", Own)
    spec = f"torchvision:Flowers102?root={photos}"
    for exif, there in (("turn", (..., slice(5, 8))), ("keep", (..., slice(0, 3), slice(None)))):
        assert (read(spec, replace(PLAIN, exif=exif))[there] > 200).all()


def test_torchvisions_folders_are_read_as_ours(tmp_path: Path) -> None:
    """16-bit grey, which torchvision's own loader clips, among them."""
    (tmp_path / "a").mkdir()
    flat(128 * 257, np.uint16).save(tmp_path / "a" / "x.png")
    found = read(f"torchvision:ImageFolder?root={tmp_path}")
    assert found.unique().tolist() == [128]
    (tmp_path / "a" / "y.png").write_bytes(b"nothing")
    source = open_images(f"torchvision:ImageFolder?root={tmp_path}", PLAIN, ("0", "1"))
    assert next(batches(source, PLAIN, 2)).errors == (None, "not an image, or damaged")


# --- more than 8 bits -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "suffix", "limits", "values", "expected"),
    [
        (np.uint16, "png", (0, 4095), (0, 2048, 4095, 9000), (0, 128, 255, 255)),
        (np.uint16, "tif", (1000, 2020), (0, 1000, 1004, 2020), (0, 0, 1, 255)),
        (np.int32, "tif", (-1000, 3000), (-5000, -1000, 1000, 1 << 30), (0, 0, 128, 255)),
        (np.int32, "tif", (10**9, 10**9 + 255), (10**9, 10**9 + 1, 10**9 + 77, 0), (0, 1, 77, 0)),
        (np.float32, "tif", (-1, 1), (-2, -1, 0, np.inf), (0, 0, 128, 255)),
        (np.float32, "tif", (0, 0.5), (0, 0.25, 0.5, 1), (0, 128, 255, 255)),
    ],
)
def test_image_range(
    kind: type,
    suffix: str,
    limits: tuple[float, float],
    values: tuple[float, ...],
    expected: tuple[int, ...],
    tmp_path: Path,
) -> None:
    columns = np.repeat(np.array([values], kind), 2, 1).repeat(8, 0)
    Image.fromarray(columns).save(tmp_path / f"x.{suffix}")
    found = read(tmp_path, replace(PLAIN, image_range=limits))
    assert found[0, 0, 0, ::2].tolist() == list(expected)


def test_a_range_does_not_change_8_bits(tmp_path: Path) -> None:
    for number, mode in enumerate(("L", "RGB", "1", "P")):
        flat(200, np.uint8).convert(mode).save(tmp_path / f"{number}.png")
    assert torch.equal(read(tmp_path, replace(PLAIN, image_range=(0, 4095))), read(tmp_path))


def test_scaling_takes_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024)
    expected = fit(values, GREY)
    monkeypatch.setattr("oodcli.images.pixels.AT_ONCE", 7)
    assert np.array_equal(fit(values, GREY), expected)
    assert expected[0, :, 0].tolist() == [round(each * 1024 / 257) for each in range(8)]


@pytest.fixture
def dark(tmp_path: Path) -> Path:
    """Three images that are nearly black, and what must not be counted."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    flat(2048, np.uint16).save(folder / "12_bits.png")
    flat(128, np.uint16).save(folder / "8_bits.png")
    flat(128, np.int32).save(folder / "8_of_32_bits.tif")
    flat(128 * 257, np.uint16).save(folder / "full_range.png")
    flat(4096, np.uint16).save(folder / "dark_but_of_full_range.png")
    flat(0, np.uint16).save(folder / "black.png")
    flat(3, np.uint8).save(folder / "8_bits_dark.png")
    flat(0.0626, np.float32).save(folder / "float.tif")
    return folder


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_dark_images_of_more_than_8_bits_give_one_note(
    dark: Path, timeout: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "oodcli"):
        read(dark, timeout=timeout)
        assert caplog.messages == [f"3 images of 16 or 32 bits have {DARK}"]
        caplog.clear()
        read(dark, replace(PLAIN, image_range=(0, 4095)), timeout=timeout)
        assert caplog.messages == []


@pytest.mark.parametrize(
    ("highest", "words"),
    [
        ([], []),
        ([200.0], ["1 image of 16 or 32 bits has no value above 255, so it looks nearly black: "]),
        ([255.0, 256.0], ["2 images of 16 or 32 bits have no value above 1023, so they look"]),
        ([0.0123, 0.05], ["2 images of floating-point numbers have no value above 0.05, so"]),
        ([4095.0, 1e-9], ["no value above 4095", "no value above 0.001"]),
    ],
)
def test_what_the_note_says(
    highest: list[float], words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    note_dim(highest)
    assert len(caplog.messages) == len(words)
    for message, part in zip(caplog.messages, words, strict=True):
        assert part in message


def test_the_note_of_commands_and_of_the_api(
    trained: Path, dark: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    note = f"note: 3 images of 16 or 32 bits have {DARK}"
    for words in (("score", "-d", "msp"), ("extract", "--record", "logits")):
        output = tmp_path / ("s.csv" if words[0] == "score" else "f.h5")
        command = (words[0], trained / "digits.pt", dark, *words[1:], "-o", output, "--force")
        told = oodcli(*command)
        assert (told.status, told.err.count(note)) == (0, 1), told.err
        assert "nearly black" not in oodcli(*command, "-q").err
        ranged = oodcli(*command, "--image-range", "0,4095")
        assert (ranged.status, "nearly black" in ranged.err) == (0, False), ranged.err
    made = json.loads((tmp_path / "s.csv.json").read_text())
    assert made["preprocessing"]["image_range"] == [0, 4095]
    about = oodcli("inspect", tmp_path / "s.csv").out.replace("\n", " ")
    assert "range above 8 bits 0…4095" in " ".join(about.split())
    caplog.clear()
    with caplog.at_level(logging.WARNING, "oodcli"):
        features = api.record(api.load_classifier(trained / "digits.pt"), dark, ["logits"])
    assert isinstance(features, Features)
    assert caplog.messages == [note.removeprefix("note: ")]


def test_a_cluster_counts_dark_images_too(
    trained: Path,
    dark: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without Ray: what its hosts do is done here, and some of it is stored from before."""
    from oodcli.jobs.kept import kept_work
    from oodcli.stages.chosen import choose_detectors
    from oodcli.stages.score import Scoring, _restored, stored_scores

    pytest.importorskip("fsspec")
    classifier = api.load_classifier(trained / "digits.pt")
    chosen = choose_detectors(["msp"], {}, frozenset({"logits"}), classifier.sha256)
    network = cluster.Network.of(
        trained / "digits.pt", Overrides(), prefer_ema=False, trust_pickle=False
    )
    names = classifier.class_names
    reading = cluster.Reading(str(dark), str(tmp_path), classifier.preprocessing, names, 2)
    scoring = Scoring.of(chosen, names, {})
    job = cluster.Job(network, reading, "float32", False, chosen, scoring)

    def made(job: cluster.Job, left: list) -> object:
        decoder, scorer = cluster.Decoder(job.reading), cluster.Scorer(job)
        for piece in left:
            for found in decoder({"piece": [pickle.dumps(piece)]}):
                [data] = scorer(found)["data"]
                yield pickle.loads(data)

    monkeypatch.setattr(cluster, "_connected", lambda address: nullcontext())
    monkeypatch.setattr(cluster, "_made", made)
    nothing = (0, 1, _restored, stored_scores, lambda start, stop: (), no_progress)
    all_of_it = pieces(str(dark), 3)
    with kept_work(tmp_path / "s.csv", {}, "x") as kept:
        for part in (all_of_it[:1], all_of_it):
            caplog.clear()
            work = cluster.ClusterWork(kept, job=job, pieces=part)
            assert list(work.blocks(*nothing))
    assert caplog.messages == [f"3 images of 16 or 32 bits have {DARK}"]


# --- resizing -------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "box", "hamming"])
@pytest.mark.parametrize("resize", [(8, 8), (10, 13), (12, 8), (7, 9), (6, 6), 6, 7, 5])
@pytest.mark.parametrize("large", [1 << 25, 0])
def test_pairs_and_borders_as_torchvision_has_them(
    resize: int | tuple[int, int], interpolation: str, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oodcli.images.pixels.LARGEST_RESIZED", large)
    mode = transforms.InterpolationMode(interpolation)
    for input_size in ((8, 8), (7, 10)):
        preprocessing = Preprocessing(input_size, GREY.mean, GREY.std, resize, interpolation)
        reference = transforms.Compose(
            [transforms.Resize(resize, mode), transforms.CenterCrop(input_size)]
        )
        for seed, (width, height) in enumerate(((9, 9), (31, 10), (10, 31), (5, 4), (8, 8))):
            random = np.random.default_rng(seed)
            image = Image.fromarray(random.integers(0, 256, (height, width), dtype=np.uint8))
            found = fit(image, preprocessing)[..., 0].astype(int)
            apart = np.abs(found - np.array(reference(image)))
            # The crop alone is rounded elsewhere, which these two show at a pixel's edge.
            stepped = interpolation in ("nearest", "box")
            most = 0 if large else 255 if stepped else 1
            assert apart.max() <= most, (input_size, width, height)
            if not large:  # the border is where it should be
                assert np.array_equal((found == 0).all(0), (np.array(reference(image)) == 0).all(0))


@pytest.mark.parametrize("resize", [(8, 8), (10, 10), (8, 12), 8])
def test_arrays_obey_a_pair(resize: int | tuple[int, int], tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", images=images)
    preprocessing = replace(PLAIN, resize=resize)
    expected = np.stack([fit(Image.fromarray(image), preprocessing) for image in images])
    found = read(tmp_path / "x.npz", preprocessing)
    assert torch.equal(found, torch.from_numpy(expected).permute(0, 3, 1, 2).long())
    assert np.array_equal(expected, images) == (resize in ((8, 8), 8))


# --- fast decoding --------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A smooth picture of 640x480 as JPEG, PNG and a JPEG that is turned by EXIF."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = coarse.resize((640, 480), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "large").mkdir()
    image.save(tmp_path / "large" / "a.jpg", quality=95)
    image.save(tmp_path / "large" / "b.png")
    image.save(tmp_path / "large" / "c.jpg", quality=95, exif=exif)
    return tmp_path / "large"


@pytest.mark.parametrize(
    ("input_size", "resize", "side"),
    [
        ((24, 24), 32, 120),  # a quarter, as an eighth has 60, fewer than twice 32
        ((24, 24), 28, 60),
        ((16, 32), (20, 40), 120),
        ((24, 32), None, 120),
        ((48, 48), 150, 480),
    ],
)
def test_fast_decoding_takes_the_smallest_that_is_enough(
    large: Path,
    input_size: tuple[int, int],
    resize: int | tuple[int, int] | None,
    side: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = Preprocessing(input_size, (0.0,) * 3, (1.0,) * 3, resize=resize)
    sides = []

    def watched(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
        sides.append(min(image.size))
        return fit(image, preprocessing)

    monkeypatch.setattr("oodcli.images.pixels.fit", watched)
    fast = read(large, replace(full, decode="fast"))
    assert sorted(sides) == sorted([side, 480, side])  # not the PNG
    monkeypatch.undo()
    difference = (fast - read(large, full)).abs()
    assert torch.equal(difference[1], torch.zeros_like(difference[1]))
    assert difference.float().mean() < 1
    assert bool(difference[[0, 2]].any()) == (side < 480)
    assert torch.equal(fast, read(large, replace(full, decode="fast"), timeout=60.0))


# --- files ----------------------------------------------------------------------------------

NEW = ("--resize", "10,9", "--interpolation", "bicubic", "--exif", "keep", "--image-range", "0,9")
NEW += ("--decode", "fast")


def test_virtual_images_go_with_every_way_of_reading(fitted: Path, tmp_path: Path) -> None:
    output = tmp_path / "f.h5"
    told = oodcli("extract", fitted / "digits.pt", fitted / "v.h5", *NEW, "-o", output)
    assert told.status == 0, told.err
    with h5py.File(output) as new, h5py.File(fitted / "v.features.h5") as old:
        assert np.array_equal(new["logits"][:], old["logits"][:])
        prepared = json.loads(new.attrs["preprocessing"])
    assert prepared["resize"] == [10, 9]
    assert (prepared["exif"], prepared["image_range"]) == ("keep", [0, 9])
    assert prepared["decode"] == "fast"
    about = " ".join(oodcli("inspect", output).out.split())
    assert (
        "resized to 10x9, centre crop (bicubic), EXIF orientation ignored, range above 8 bits"
        in about
    )
    assert "fast JPEG decoding" in about
    other = oodcli(
        "extract", fitted / "digits.pt", fitted / "v.h5", "--mean", "0.2", "-o", tmp_path / "g.h5"
    )
    assert (other.status, "was made for inputs with mean" in other.err) == (1, True)


def test_files_of_before_go_with_new_ones(fitted: Path, tmp_path: Path) -> None:
    """They lack exif, image_range and decode, which means turn, none and full."""
    (tmp_path / "images").mkdir()
    flat(7, np.uint8).save(tmp_path / "images" / "x.png")
    for name in ("old", "new", "kept"):
        words = (
            "score",
            fitted / "digits.pt",
            tmp_path / "images",
            "-d",
            "msp",
            "-o",
            tmp_path / f"{name}.csv",
        )
        assert oodcli(*words, *(("--exif", "keep") if name == "kept" else ())).status == 0
    beside = tmp_path / "old.csv.json"
    made = json.loads(beside.read_text())
    assert (made["preprocessing"].pop("exif"), made["preprocessing"].pop("image_range")) == (
        "turn",
        None,
    )
    assert made["preprocessing"].pop("decode") == "full"
    beside.write_text(json.dumps(made))
    assert read_made(tmp_path / "old.csv") == read_made(tmp_path / "new.csv") | {
        key: made[key] for key in ("command", "paths_sha256")
    }
    compare = ("evaluate", "--id", tmp_path / "old.csv", "--resamples", 0)
    assert oodcli(*compare, "--ood", f"x={tmp_path / 'new.csv'}").status == 0
    refused = oodcli(*compare, "--ood", f"x={tmp_path / 'kept.csv'}")
    assert (refused.status, "with the preprocessing" in refused.err) == (1, True)
    assert oodcli("inspect", tmp_path / "old.csv").status == 0
    # caches
    caches = {}
    for name, more in (("old", ()), ("new", ()), ("kept", ("--exif", "keep"))):
        caches[name] = tmp_path / f"{name}.h5"
        words = ("extract", fitted / "digits.pt", fitted / "test.npz", *more, "-o", caches[name])
        assert oodcli(*words).status == 0
    with h5py.File(caches["old"], "r+") as file:
        found = json.loads(file.attrs["preprocessing"])
        del found["exif"], found["image_range"], found["decode"]
        file.attrs["preprocessing"] = json.dumps(found)
    output = ("-d", "knn", "-o", tmp_path / "fit", "--force")
    for train, calibrate in (("old", "new"), ("new", "old")):
        done = oodcli("fit", caches[train], "--calibrate", caches[calibrate], *output)
        assert done.status == 0, done.err
        scored = ("score", caches[calibrate], "-d", tmp_path / "fit" / "knn.safetensors")
        assert oodcli(*scored).status == 0
    refused = oodcli("fit", caches["old"], "--calibrate", caches["kept"], *output)
    assert refused.status == 1
    assert "exif turn" in refused.err
    assert "exif keep" in refused.err


def test_a_job_is_not_resumed_with_other_options(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from oodcli.jobs.kept import Kept, Stored

    for number in range(4):
        flat(number, np.uint8).save(tmp_path / f"{number}.png")
    output = tmp_path / "s.csv"
    words = ("score", trained / "digits.pt", tmp_path, "-d", "msp", "--batch-size", 2, "-o", output)
    write = Kept.write

    def stop(self: Kept, number: tuple[int, ...], batch: Stored) -> None:
        write(self, number, batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "write", stop)
    oodcli(*words)
    monkeypatch.undo()
    assert output.with_name("s.csv.partial").exists()
    for other in (
        *(("--exif", "keep"), ("--image-range", "0,9"), ("--resize", "9")),
        *(("--decode", "fast"), NEW),
    ):
        refused = oodcli(*words, *other)
        assert (refused.status, "the preprocessing" in refused.err) == (1, True), refused.err
    assert oodcli(*words).status == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--resize", "a"), "--resize a: expected"),
        (("--resize", "1,2,3"), "--resize 1,2,3: expected"),
        (("--image-range", "5"), "--image-range 5: expected two numbers"),
        (("--image-range", "5,x"), "--image-range 5,x: expected numbers"),
        (("--image-range", "5,5"), "the first below the second"),
        (("--exif", "on"), "exif 'on' is not one of"),
        (("--decode", "quick"), "decode 'quick' is not one of full, fast"),
        (("--crop", "middle"), "crop 'middle' is not one of"),
        (("--interpolation", "cubic"), "interpolation 'cubic' is not one of"),
    ],
)
def test_options_that_make_no_sense(words: tuple[str, str], sentence: str, trained: Path) -> None:
    found = oodcli("inspect", trained / "digits.pt", *words)
    assert found.status == 1
    assert sentence in found.err
    assert len(found.err.strip().splitlines()) == 1
