"""Every source of images keeps what ``images.source.ImageSource`` promises."""

from __future__ import annotations

import inspect
import io
import json
import os
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from oodcli.images import batches, open_images
from oodcli.images.decoding import Encoded
from oodcli.images.source import ImageSource, Rows
from oodcli.networks.preprocessing import Preprocessing

PLAIN = Preprocessing((8, 8), (0.5, 0.4, 0.3), (0.2, 0.2, 0.25))
CLASSES = ("ant", "bee")
COUNT = 12
BAD = 5
"""The row that cannot be read, in sources that can have one."""


def grey(number: int) -> int:
    return 20 * number


def pixels(number: int) -> np.ndarray:
    """(8, 8, 3), which say by their brightness what their number is."""
    return np.full((8, 8, 3), grey(number), np.uint8)


def photos(folder: Path) -> Path:
    """ant/00.png … bee/11.png, one of which is no image."""
    for number in range(COUNT):
        path = folder / CLASSES[number // 6] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(number)).save(path)
        if number == BAD:
            path.write_bytes(b"no image")
    return folder


def in_a_folder(folder: Path) -> str:
    return str(photos(folder / "photos"))


def text(folder: Path) -> str:
    names = sorted(path.relative_to(folder) for path in photos(folder / "x").rglob("*.png"))
    return "".join(f"{name} {name.parts[1]}\n" for name in names)


def in_a_list(folder: Path) -> str:
    (folder / "list.txt").write_text(text(folder))
    return str(folder / "list.txt")


def on_standard_input(folder: Path) -> str:
    (folder / "stdin").write_text(text(folder).replace("x/", f"{folder}/x/"))
    return "-"


def as_one_file(folder: Path) -> str:
    return str(photos(folder / "photos") / "bee" / "07.png")


def in_a_zip(folder: Path) -> str:
    shutil.make_archive(str(folder / "x"), "zip", photos(folder / "photos"))
    return str(folder / "x.zip")


def in_a_tar(folder: Path, suffix: str = "tar", mode: str = "w") -> str:
    with tarfile.open(folder / f"x.{suffix}", mode) as archive:
        for path in sorted(photos(folder / "photos").rglob("*.png")):
            archive.add(path, path.relative_to(folder / "photos"))
    return str(folder / f"x.{suffix}")


def in_a_compressed_tar(folder: Path) -> str:
    return in_a_tar(folder, "tar.gz", "w:gz")


def in_arrays(folder: Path) -> str:
    images = np.stack([pixels(number) for number in range(COUNT)])
    np.savez(folder / "x.npz", images=images, labels=np.arange(COUNT) // 6, classes=CLASSES)
    return str(folder / "x.npz")


def as_virtual_images(folder: Path) -> str:
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (PLAIN.mean, PLAIN.std))
    with h5py.File(folder / "x.h5", "w") as file:
        file.attrs["format"] = "oodcli-virtual"
        file.attrs["preprocessing"] = json.dumps(PLAIN.to_dict())
        images = [pixels(number).transpose(2, 0, 1) / 255 for number in range(COUNT)]
        file["images"] = ((np.stack(images) - mean) / std).astype(np.float16)
        file["label"] = np.arange(COUNT) // 6
    return str(folder / "x.h5")


def of_torchvision(folder: Path) -> str:
    return f"torchvision:ImageFolder?root={photos(folder / 'photos')}"


def of_noise(folder: Path) -> str:
    return f"noise:gaussian?n={COUNT}&seed=3"


@dataclass(frozen=True)
class Kind:
    """make: the files in a folder → IMAGES. rows: how many. bad: whether the row BAD cannot be
    read. encoded: whether its images can be decoded in other processes."""

    make: Callable[[Path], str]
    rows: int = COUNT
    bad: bool = False
    encoded: bool = False
    labelled: bool = True


KINDS = {
    "folder": Kind(in_a_folder, bad=True, encoded=True),
    "list": Kind(in_a_list, bad=True, encoded=True),
    "standard input": Kind(on_standard_input, bad=True, encoded=True),
    "one image": Kind(as_one_file, rows=1, encoded=True, labelled=False),
    "zip": Kind(in_a_zip, bad=True, encoded=True),
    "tar": Kind(in_a_tar, bad=True, encoded=True),
    "tar.gz": Kind(in_a_compressed_tar, bad=True, encoded=True),
    "npz": Kind(in_arrays),
    "virtual": Kind(as_virtual_images),
    "torchvision": Kind(of_torchvision, bad=True),
    "noise": Kind(of_noise, labelled=False),
}


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def kind(name: str) -> Kind:
    return KINDS[name]


@pytest.fixture
def source(kind: Kind, tmp_path: Path) -> ImageSource:
    spec = kind.make(tmp_path)
    words = io.StringIO((tmp_path / "stdin").read_text() if spec == "-" else "")
    return open_images(spec, PLAIN, CLASSES, stdin=words)


def read(source: ImageSource, *stops: int, start: int = 0) -> Rows:
    """The rows from start to the last of the stops, fetched in pieces that end at each."""
    found = []
    with source.reading() as fetch:
        for stop in stops:
            found.append(fetch(start, stop))
            start = stop
        return joined([decode(PLAIN) for decode in found])


def joined(parts: list[Rows]) -> Rows:
    labels = torch.cat([part.labels for part in parts])
    errors = [error for part in parts for error in part.errors]
    return Rows(labels, errors, torch.cat([part.pixels for part in parts]))


def same(one: Rows, other: Rows) -> bool:
    return (
        torch.equal(one.labels, other.labels)
        and one.errors == other.errors
        and torch.equal(one.pixels, other.pixels)
    )


def kinds_of(base: type) -> Iterator[type]:
    for each in base.__subclasses__():
        yield each
        yield from kinds_of(each)


def test_every_kind_is_tested(tmp_path):
    found = set()
    for name, kind in KINDS.items():
        (tmp_path / name).mkdir()
        found.add(
            type(open_images(kind.make(tmp_path / name), PLAIN, CLASSES, stdin=io.StringIO("x\n")))
        )
    ours = {each for each in kinds_of(ImageSource) if each.__module__.startswith("oodcli.")}
    assert found == {each for each in ours if not inspect.isabstract(each)}


def test_rows_are_in_the_order_of_their_paths(name, kind, source):
    found = read(source, len(source))
    paths = source.paths(0, len(source))
    good = [path for path, error in zip(paths, found.errors, strict=True) if error is None]
    if name == "noise":
        assert len(found.pixels.flatten(1).unique(dim=0)) == COUNT
        return
    numbers = [int(re.search(r"(\d+)(\.png|\])$", path)[1]) for path in good]
    values = found.pixels.flatten(1).double() * (255 if found.pixels.is_floating_point() else 1)
    expected = torch.tensor([float(grey(number)) for number in numbers])
    torch.testing.assert_close(values.mean(1), expected.double(), rtol=0, atol=0.2)
    assert numbers == sorted(numbers)


def test_there_is_one_of_each_for_a_row(kind, source):
    assert len(source) == kind.rows
    found = read(source, len(source))
    readable = found.errors.count(None)
    assert (len(found.labels), len(found.errors)) == (kind.rows, kind.rows)
    assert found.labels.dtype == torch.int64
    assert len(found.pixels) == readable
    if found.pixels.is_floating_point():
        assert found.pixels.shape[1:] == (3, 8, 8)
    else:
        assert found.pixels.dtype == torch.uint8
        assert found.pixels.shape[1:] == (8, 8, 3)


def test_labels(name, kind, source):
    found = read(source, len(source))
    assert source.labelled == kind.labelled == bool((found.labels >= 0).any())
    if kind.labelled:
        expected = torch.arange(COUNT) // 6
        assert torch.equal(found.labels[found.labels >= 0], expected[found.labels >= 0])
        assert (found.labels >= 0).sum() >= COUNT - kind.bad
    if source.known is not None and source.labels_are_of_rows:
        assert len(source.known.values) == len(source)
        assert torch.equal(read(source, len(source), start=3).labels, source.known.values[3:])


def test_paths_are_distinct_and_printable(source):
    paths = source.paths(0, len(source))
    assert len(set(paths)) == len(source)
    assert "".join(paths).encode("utf-8").decode("utf-8").isprintable()
    assert [path for row in range(len(source)) for path in source.paths(row, row + 1)] == paths


def test_weight_is_that_of_the_rows(source):
    whole = source.weight(0, len(source))
    assert whole >= 0
    assert whole == sum(source.weight(row, row + 1) for row in range(len(source)))
    assert source.weight(0, 0) == 0


def test_reading_again_gives_the_same(source):
    first = read(source, len(source))
    assert same(read(source, len(source)), first)


def test_pieces_of_any_size_give_the_same(kind, source):
    whole = read(source, len(source))
    assert same(read(source, *range(1, len(source) + 1)), whole)
    if kind.rows > 1:
        assert same(read(source, 1, 6, 8, len(source)), whole)
        part = read(source, 7, 9, start=4)
        assert torch.equal(part.labels, whole.labels[4:9])
        assert part.errors == whole.errors[4:9]
        before, inside = (each.count(None) for each in (whole.errors[:4], part.errors))
        assert torch.equal(part.pixels, whole.pixels[before : before + inside])


def test_a_row_that_cannot_be_read_is_a_row_with_an_error(kind, source):
    found = read(source, len(source))
    bad = [row for row, error in enumerate(found.errors) if error is not None]
    assert bad == ([BAD] if kind.bad else [])
    for row in bad:
        assert len(found.errors[row].splitlines()) == 1
    alone = read(source, BAD + 1, start=BAD) if kind.bad else None
    assert alone is None or (len(alone.errors), len(alone.pixels)) == (1, 0)


def test_what_is_encoded_can_be_decoded_in_another_process(kind, source):
    with source.reading() as fetch:
        decode = fetch(0, len(source))
    assert isinstance(decode, Encoded) == kind.encoded
    if kind.encoded:
        assert same(pickle.loads(pickle.dumps(decode))(PLAIN), decode(PLAIN))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")
def test_files_are_open_only_while_they_are_read(source, tmp_path):
    def open_files() -> list[str]:
        found = []
        for handle in os.listdir("/proc/self/fd"):
            try:
                found.append(os.readlink(f"/proc/self/fd/{handle}"))
            except OSError:  # of the listing itself
                continue
        return [path for path in found if str(tmp_path) in path]

    assert open_files() == []
    read(source, len(source))
    assert open_files() == []


@pytest.mark.parametrize(("size", "workers"), [(1, 1), (5, 3), (100, 2)])
def test_batches_do_not_depend_on_their_size(size, workers, kind, source):
    whole = read(source, len(source))
    (expected,) = batches(source, PLAIN, len(source), 1)
    found = list(batches(source, PLAIN, size, workers))
    assert [path for batch in found for path in batch.paths] == source.paths(0, len(source))
    assert [error for batch in found for error in batch.errors] == whole.errors
    assert torch.equal(torch.cat([batch.labels for batch in found]), whole.labels)
    assert torch.equal(torch.cat([batch.images for batch in found]), expected.images)
