"""IMAGES of the command line: every kind, every colour mode, every way to be broken."""

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets, transforms

from oodcli.errors import ImagesError
from oodcli.images import Batch, ImageSource, batches, open_images, reading
from oodcli.images import files as image_files
from oodcli.images.generated import NOISES
from oodcli.images.pixels import UnreadableError, colours, fit, limit_pixels, load_bytes
from oodcli.images.source import Rows
from oodcli.networks.preprocessing import Preprocessing

PLAIN = Preprocessing((8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
GREY = Preprocessing((8, 8), (0.0,), (1.0,))
IMAGENET = Preprocessing((8, 8), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PETS = ("cat", "dog", "emu")
NUMBERS = ("0", "1", "2")


def noise_image(seed, size=(8, 8), mode="RGB"):
    """A Pillow image of random pixels. size: width, height."""
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels))
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(seed, size=(8, 8)):
    return encoded(noise_image(seed, size))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def pixels_of(seed):
    """(3, 8, 8) in [0, 1]: what PLAIN makes of noise_image(seed)."""
    return torch.from_numpy(np.array(noise_image(seed))).permute(2, 0, 1).float() / 255


def read(spec, preprocessing=PLAIN, class_names=PETS, batch_size=3, **options):
    """The whole source as one batch, and the source."""
    source = open_images(str(spec), preprocessing, class_names, **options)
    parts = list(batches(source, preprocessing, batch_size))
    assert [len(part.paths) for part in parts[:-1]] == [batch_size] * (len(parts) - 1)
    whole = Batch(
        tuple(path for part in parts for path in part.paths),
        torch.cat([part.labels for part in parts]),
        tuple(error for part in parts for error in part.errors),
        torch.cat([part.images for part in parts]),
    )
    assert len(whole.paths) == len(whole.labels) == len(whole.errors) == len(source)
    assert len(whole.images) == whole.errors.count(None)
    assert whole.labels.dtype == torch.int64
    assert whole.images.dtype == torch.float32
    assert source.labelled == bool((whole.labels >= 0).any())
    for path in whole.paths:
        path.encode("utf-8")
    return whole, source


def only(spec, **options):
    """The error, or the pixels in 0…255, of a source with one image."""
    batch, _ = read(spec, **options)
    assert len(batch.paths) == 1
    return batch.errors[0] or (batch.images[0] * 255).round().to(torch.int64)


@pytest.fixture
def pets(tmp_path):
    """A folder with classes by sub-folder; the image's seed is its name."""
    root = tmp_path / "pets"
    for name, seed in (("dog", 3), ("dog", 2), ("cat", 1), ("emu/young", 4)):
        write(root / name / f"{seed}.png", png(seed))
    return root


# folders


def test_folder(pets):
    batch, source = read(pets, batch_size=2)
    assert batch.paths == tuple(
        f"{pets.as_posix()}/{name}"
        for name in ("cat/1.png", "dog/2.png", "dog/3.png", "emu/young/4.png")
    )
    assert batch.labels.tolist() == [0, 1, 1, 2]
    assert batch.errors == (None,) * 4
    assert torch.equal(batch.images, torch.stack([pixels_of(seed) for seed in (1, 2, 3, 4)]))
    assert source.note is None
    assert source.name == str(pets)


def test_images_are_normalised(pets):
    batch, _ = read(pets, IMAGENET)
    expected = transforms.Normalize(IMAGENET.mean, IMAGENET.std)(pixels_of(1))
    torch.testing.assert_close(batch.images[0], expected)


def test_folder_with_other_classes_has_no_labels(pets):
    batch, source = read(pets, class_names=("cat", "dog", "fox"))
    assert batch.labels.tolist() == [-1] * 4
    assert "emu" in source.note
    assert "labels unknown" in source.note


def test_folder_whose_classes_nobody_named(pets):
    batch, source = read(pets, class_names=NUMBERS)
    assert batch.labels.tolist() == [0, 1, 1, 2]
    assert "0 (cat) to 2 (emu)" in source.note
    batch, source = read(pets, class_names=("0", "1", "2", "3"))
    assert batch.labels.tolist() == [-1] * 4
    assert "labels unknown" in source.note


def test_folder_without_sub_folders(tmp_path):
    write(tmp_path / "b.png", png(1))
    write(tmp_path / "a.png", png(2))
    batch, source = read(tmp_path)
    assert [Path(path).name for path in batch.paths] == ["a.png", "b.png"]
    assert batch.labels.tolist() == [-1, -1]
    assert source.note is None


def test_classes_below_a_single_folder_that_is_no_class(tmp_path):
    for name in ("images/dog/1.png", "images/cat/2.png"):
        write(tmp_path / name, png(1))
    assert read(tmp_path)[0].labels.tolist() == [0, 1]


def test_images_beside_the_classes_have_no_label(pets):
    write(pets / "stray.png", png(9))
    assert read(pets)[0].labels.tolist() == [0, 1, 1, 2, -1]


def test_what_is_no_image_by_its_name_is_left_out(pets):
    for name in (".DS_Store", "notes.txt", ".hidden.png", ".git/x.png", "cat/Thumbs.db", "jpg"):
        write(pets / name, b"")
    write(pets / "cat/UPPER.PNG", png(7))
    assert [Path(path).name for path in read(pets)[0].paths][:2] == ["1.png", "UPPER.PNG"]
    assert len(read(pets)[0].paths) == 5


def test_links_are_followed_and_loops_end(pets, tmp_path):
    (pets / "cat" / "loop").symlink_to(pets, target_is_directory=True)
    (pets / "cat" / "self").symlink_to(".", target_is_directory=True)
    write(tmp_path / "elsewhere" / "5.png", png(5))
    (pets / "dog" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (pets / "cat" / "gone.png").symlink_to(pets / "nowhere.png")
    (pets / "cat" / "me.png").symlink_to("me.png")
    batch, _ = read(pets)
    names = [path.removeprefix(f"{pets.as_posix()}/") for path in batch.paths]
    assert names == sorted(names)
    assert "dog/more/5.png" in names
    assert len(names) == 7
    assert "symbolic links" in batch.errors[names.index("cat/me.png")]
    assert batch.errors[names.index("cat/gone.png")] == "No such file or directory"


def test_a_folder_that_cannot_be_listed_is_a_row(pets, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("emu"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    batch, _ = read(pets)
    assert batch.paths[-1] == f"{pets.as_posix()}/emu"
    assert batch.errors[:3] == (None,) * 3
    assert batch.errors[3] == "not a regular file"


def test_names_that_are_not_utf8(tmp_path):
    name = b"caf\xe9.png"
    try:
        (tmp_path / os.fsdecode(name)).write_bytes(png(1))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    batch, _ = read(tmp_path)
    assert batch.errors == (None,)
    assert batch.paths[0].endswith("caf\\xe9.png")
    (tmp_path / "list.txt").write_bytes(name + b"\n")
    batch, _ = read(tmp_path / "list.txt")
    assert batch.errors == (None,)


def test_a_pipe_named_as_an_image_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert only(tmp_path) == "not a regular file"


def test_one_image_file(pets):
    batch, _ = read(pets / "cat" / "1.png")
    assert torch.equal(batch.images[0], pixels_of(1))


# lists


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ('path,label\n"dog/a, b.png",dog\ncat/1.png,cat\n', [1, 0]),
        ('label;path\r\ndog;"dog/a, b.png"\r\n;cat/1.png\r\n\r\n', [1, -1]),
        ('\ufeffpath\tpredicted\n"dog/a, b.png"\tcat\ncat/1.png\tdog\n', [-1, -1]),
        (
            "path,label,predicted,confidence,msp,error\n"
            '"dog/a, b.png",dog,cat,0.5,0.5,\ncat/1.png,,cat,0.9,0.1,\n',
            [1, -1],
        ),
        ('image,class\n"dog/a, b.png",dog\ncat/1.png,cat\n', [1, 0]),
        ('"dog/a, b.png",dog\ncat/1.png,cat\n', [1, 0]),
        ('"dog/a, b.png"\n"cat/1.png"\n', [-1, -1]),
    ],
)
def test_lists_in_csv(pets, text, labels):
    (pets / "dog/a, b.png").write_bytes((pets / "dog/2.png").read_bytes())
    (pets / "list.csv").write_text(text, encoding="utf-8", newline="")
    batch, _ = read(pets / "list.csv")
    assert batch.errors == (None, None)
    assert batch.paths == tuple(f"{pets}/{name}" for name in ("dog/a, b.png", "cat/1.png"))
    assert batch.labels.tolist() == labels


@pytest.mark.parametrize("row", ["dog", "dog," + "x" * 200_000])
def test_a_row_without_its_columns_is_named(pets, row):
    (pets / "list.csv").write_text(f"label,path,x\ndog,dog/2.png,1\n{row}\n")
    with pytest.raises(ImagesError, match="row 2 does not have the 3 columns"):
        read(pets / "list.csv")


def test_list(pets):
    (pets / "list.txt").write_text("dog/3.png\tdog\r\n\ncat/1.png cat\ndog/2.png,1\n emu/no.png \n")
    batch, source = read(pets / "list.txt")
    root = pets.as_posix()
    assert batch.paths == tuple(
        f"{root}/{name}" for name in ("dog/3.png", "cat/1.png", "dog/2.png", "emu/no.png")
    )
    assert batch.labels.tolist() == [-1] * 4  # names and numbers mixed: "1" is no class's name
    assert "1" in source.note
    assert batch.errors == (None, None, None, "No such file or directory")
    assert torch.equal(batch.images[1], pixels_of(1))


@pytest.mark.parametrize(
    ("text", "paths", "labels"),
    [
        ("a.png", ["a.png"], [-1]),
        ("my photo, 3.png", ["my photo, 3.png"], [-1]),
        ("my photo, 3.png, dog", ["my photo, 3.png"], [1]),
        ("my photo.png 3.png 2", ["my photo.png 3.png"], [2]),
        ("a.png\t0\nb.png\t2\nc.png", ["a.png", "b.png", "c.png"], [0, 2, -1]),
        ("a.JPG -1\nb.jpeg 0", ["a.JPG", "b.jpeg"], [-1, 0]),
        ("a.png 3\nb.png 0", ["a.png", "b.png"], [-1, -1]),
        ("a.png 99999999999999999999999\nb.png 0", ["a.png", "b.png"], [-1, -1]),
        ("a.png zebra\nb.png cat", ["a.png", "b.png"], [-1, -1]),
        ("raw/0001 1\nraw/0002 2", ["raw/0001", "raw/0002"], [1, 2]),
        ("raw/0001,dog", ["raw/0001"], [1]),
        ("raw/00 01\traw dog\nraw/2\tcat", ["raw/00 01", "raw/2"], [-1, -1]),
        ("raw/my file", ["raw/my file"], [-1]),
        ("file 2", ["file 2"], [-1]),  # such a file is there
        ("file 3", ["file"], [-1]),
        ("\ufeffa.png 1", ["a.png"], [1]),
        ("/abs/a.png 1", ["/abs/a.png"], [1]),
    ],
)
def test_lines_of_a_list(tmp_path, text, paths, labels):
    (tmp_path / "file 2").touch()
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    batch, _ = read(tmp_path / "list.csv")
    beside = "" if text.startswith("/") else f"{tmp_path.as_posix()}/"
    assert list(batch.paths) == [beside + path for path in paths]
    assert batch.labels.tolist() == labels


def test_labels_that_have_spaces_and_commas(tmp_path):
    (tmp_path / "list").write_text("a.png tench, Tinca tinca\nb.png,great white shark\n")
    names = ("tench, Tinca tinca", "great white shark")
    batch, _ = read(tmp_path / "list", class_names=names)
    assert batch.labels.tolist() == [0, 1]


def test_list_on_standard_input(pets, monkeypatch):
    monkeypatch.chdir(pets)
    batch, source = read("-", stdin=io.StringIO("dog/2.png dog\ncat/1.png cat\n"))
    assert batch.paths == ("dog/2.png", "cat/1.png")
    assert batch.labels.tolist() == [1, 0]
    assert source.name == "-"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9.png\n"), "utf-8"))
    assert read("-")[0].paths == ("caf\\xe9.png",)


# archives


def members_of(root):
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.png"))}


@pytest.fixture(params=["zip", "stored.zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
def archive(request, pets, tmp_path):
    """The pets, with things that are to be left out, in archive order sorted by path."""
    path = tmp_path / f"pets.{request.param}"
    junk = (".hidden.png", "__MACOSX/cat/1.png", "readme.txt")
    if path.suffix == ".zip":
        kind = zipfile.ZIP_STORED if "stored" in path.name else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", kind) as out:
            for name, file in reversed(members_of(pets).items()):
                out.write(file, name)
            for name in junk:
                out.writestr(name, b"junk")
    else:
        with tarfile.open(
            path, f"w:{ {'tgz': 'gz', 'tar': ''}.get(path.suffix[1:], path.suffix[1:]) }"
        ) as out:
            for name, file in members_of(pets).items():
                out.add(file, f"./{name}")
            for name in junk:
                out.addfile(tarfile.TarInfo(name))
    return path


def test_archive_is_read_as_its_folder(archive, pets):
    batch, source = read(archive)
    expected, _ = read(pets)
    dot = "" if archive.suffix == ".zip" else "./"
    assert batch.paths == tuple(f"{archive.as_posix()}/{dot}{name}" for name in members_of(pets))
    assert torch.equal(batch.images, expected.images)
    assert torch.equal(batch.labels, expected.labels)
    assert source.note is None
    assert torch.equal(read(archive)[0].images, batch.images)


def test_truncated_archive(archive):
    content = archive.read_bytes()
    for size in (len(content) // 3, 1100, 300, 0):  # a tar: in its data, in its second header, …
        archive.write_bytes(content[:size] if size < len(content) - 100 else content[:-100])
        with pytest.raises(ImagesError, match=r"is damaged or not such an archive"):
            open_images(str(archive), PLAIN, PETS)


def test_damaged_header_in_a_tar(pets, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as out:
        out.add(pets, "pets")
    content = bytearray((tmp_path / "x.tar").read_bytes())
    content[content.index(b"pets/dog/3.png") + 3] ^= 1  # the header's checksum fails
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ImagesError, match="damaged header at byte"):
        open_images(str(tmp_path / "x.tar"), PLAIN, PETS)


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_order_of_an_unsorted_tar(tmp_path, kind):
    with tarfile.open(tmp_path / f"x.{kind}", "w:gz" if kind == "tar.gz" else "w") as out:
        for seed in (2, 1, 3):
            info = tarfile.TarInfo(f"{seed}.png")
            info.size = len(png(seed))
            out.addfile(info, io.BytesIO(png(seed)))
    batch, source = read(tmp_path / f"x.{kind}")
    order = (1, 2, 3) if kind == "tar" else (2, 1, 3)
    assert torch.equal(batch.images, torch.stack([pixels_of(seed) for seed in order]))
    assert (source.note is None) == (kind == "tar")


def test_odd_members_of_a_tar(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as out:
        for content in (png(8), png(1)):  # the last of a name counts
            info = tarfile.TarInfo("a/real.png")
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
        for name, kind, target in (
            ("b/hard.png", tarfile.LNKTYPE, "a/real.png"),
            ("b/soft.png", tarfile.SYMTYPE, "../a/real.png"),
            ("c/loop.png", tarfile.SYMTYPE, "loop.png"),
            ("c/out.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("d/pipe.png", tarfile.FIFOTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            out.addfile(info)
    batch, _ = read(tmp_path / "x.tar")
    assert [path.rpartition("/")[2].removesuffix(".png") for path in batch.paths] == [
        "real", "hard", "soft", "loop", "out", "pipe",
    ]  # fmt: skip
    assert torch.equal(batch.images, torch.stack([pixels_of(1)] * 3))
    assert batch.errors[:3] == (None,) * 3
    assert "link" in batch.errors[3]
    assert "link" in batch.errors[4]
    assert "not a file" in batch.errors[5]


def test_broken_members_of_a_zip(tmp_path, monkeypatch):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as out:
        for name in ("1bad.png", "2good.png", "3locked.png"):
            out.writestr(name, png(1))
        out.writestr("4large.png", png(1, (64, 64)))
        out.writestr("5empty.png", b"")
        out.writestr("6text.png", b"no image")
    content = bytearray(path.read_bytes())
    content[content.index(b"1bad.png") + 30] ^= 255  # inside the stored image: the CRC fails
    locked = content.rindex(b"3locked.png") - 46 + 8  # the flags in the central directory
    content[locked] |= 1
    path.write_bytes(content)
    monkeypatch.setattr(image_files, "LARGEST_MEMBER", 5000)
    batch, _ = read(path)
    assert "CRC" in batch.errors[0]
    assert batch.errors[1] is None
    assert batch.errors[2] == "cannot be unpacked: it is encrypted"
    assert "too many" in batch.errors[3]
    assert batch.errors[4] == "empty file"
    assert batch.errors[5] == "not an image, or damaged"


# .npz


def test_npz_of_the_right_size(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    np.savez_compressed(tmp_path / "x.npz", images=images, labels=[2, 0, -1, 1, 1])
    batch, source = read(tmp_path / "x.npz", IMAGENET)
    expected = torch.stack(
        [
            transforms.Normalize(IMAGENET.mean, IMAGENET.std)(transforms.ToTensor()(i))
            for i in images
        ]
    )
    torch.testing.assert_close(batch.images, expected)
    assert batch.labels.tolist() == [2, 0, -1, 1, 1]
    assert batch.paths[4] == f"{(tmp_path / 'x.npz').as_posix()}[4]"
    assert source.note is None


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("preprocessing", [PLAIN, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3), (8, 8, 4), (9, 7), (9, 7, 3)])
def test_npz_of_any_shape_is_read_as_image_files(tmp_path, save, order, preprocessing, shape):
    images = np.random.default_rng(0).integers(0, 256, (7, *shape)).astype(np.uint8)
    save(tmp_path / "x.npz", images=np.asarray(images, order=order))
    batch, _ = read(tmp_path / "x.npz", preprocessing)
    for row, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(tmp_path / f"{row}.png")
    expected, _ = read(tmp_path, preprocessing)
    assert torch.equal(batch.images, expected.images)


def test_npz_with_a_larger_resize_is_not_taken_as_it_is(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", images=images)
    crop = Preprocessing((8, 8), PLAIN.mean, PLAIN.std, resize=10)
    expected = np.stack([fit(Image.fromarray(image), crop) for image in images])
    batch, _ = read(tmp_path / "x.npz", crop)
    assert torch.equal(batch.images, torch.from_numpy(expected).permute(0, 3, 1, 2) / 255)
    assert not np.array_equal(expected, images)


@pytest.mark.parametrize(
    ("labels", "classes", "class_names", "expected", "noted"),
    [
        ([0, 1, 2], None, PETS, [0, 1, 2], False),
        ([0, 1, 3], None, PETS, [-1, -1, -1], True),
        ([0, 1, -2], None, PETS, [-1, -1, -1], True),
        ([[0], [1], [2]], None, PETS, [0, 1, 2], False),
        (["emu", "cat", "dog"], None, PETS, [2, 0, 1], False),
        (["emu", "cat", "fox"], None, PETS, [-1, -1, -1], True),
        ([0, 1, -1], ["emu", "cat"], PETS, [2, 0, -1], False),
        ([0, 1, -1], [b"emu", b"cat"], PETS, [2, 0, -1], False),
        ([0, 1, 2], ["emu", "cat", "fox"], PETS, [-1, -1, -1], True),
        ([0, 1, 2], ["emu", "cat", "fox"], NUMBERS, [0, 1, 2], True),
        ([0, 1, 1], ["emu", "cat"], NUMBERS, [-1, -1, -1], True),
        ([0, 1, 1], ["2", "0"], NUMBERS, [2, 0, 0], False),
        ([0, 1, 2], ["crane", "crane", "emu"], ("crane", "crane", "emu"), [0, 1, 2], False),
        ([0, 1, 1], ["emu", "crane"], ("crane", "crane", "emu"), [-1, -1, -1], True),
    ],
)
def test_labels_of_an_npz(tmp_path, labels, classes, class_names, expected, noted):
    arrays = {"images": np.zeros((3, 8, 8), np.uint8), "labels": np.array(labels)}
    if classes is not None:
        arrays["classes"] = np.array(classes)
    np.savez(tmp_path / "x.npz", **arrays)
    batch, source = read(tmp_path / "x.npz", class_names=class_names)
    assert batch.labels.tolist() == expected
    assert (source.note is not None) == noted


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "has no array 'images'"),
        ({"images": np.zeros((2, 8, 8, 3))}, "is float64, expected uint8"),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, "transpose it"),
        ({"images": np.zeros((2, 8), np.uint8)}, "has shape"),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, "is empty"),
        ({"images": np.array([None, {}])}, "has shape"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.zeros(3, int)}, "'labels' is"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.zeros(2)}, "'labels' is"),
        (
            {"images": np.zeros((2, 8, 8), np.uint8), "labels": np.array([0, 2]), "classes": ["a"]},
            "'classes' has 1 names",
        ),
    ],
)
def test_wrong_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ImagesError, match=message):
        open_images(str(tmp_path / "x.npz"), PLAIN, PETS)


def test_damaged_npz(tmp_path):
    path = tmp_path / "x.npz"
    images = np.random.default_rng(0).integers(0, 256, (600, 8, 8, 3)).astype(np.uint8)
    np.savez(path, images=images)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-1000])
    with pytest.raises(ImagesError, match="damaged or not an"):
        open_images(str(path), PLAIN, PETS)
    content[len(content) // 2] ^= 255  # seen only once the data are read to the end
    path.write_bytes(content)
    source = open_images(str(path), PLAIN, PETS)
    with pytest.raises(ImagesError, match=r"x\.npz is damaged at image"):
        list(batches(source, PLAIN, 64))
    assert_no_threads()


def test_memory_does_not_grow_with_an_npz(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((200_000, 8, 8, 3), np.uint8))
    tracemalloc.start()
    try:
        source = open_images(str(tmp_path / "x.npz"), PLAIN, PETS)
        with closing(batches(source, PLAIN, 256, 2)) as stream:
            for _, _ in zip(range(20), stream, strict=False):
                pass
        assert tracemalloc.get_traced_memory()[1] < 10e6  # the array alone has 38 MB
    finally:
        tracemalloc.stop()


def test_shared_cifar(shared_data):
    names = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    cifar = Preprocessing((32, 32), IMAGENET.mean, IMAGENET.std)
    source = open_images(str(shared_data / "cifar10-test.npz"), cifar, names)
    assert (len(source), source.labelled, source.note) == (10_000, True, None)
    began = time.process_time()
    found = list(batches(source, cifar, 500))
    assert time.process_time() - began < 5  # 0.1 s; a loop over images: many seconds
    with np.load(shared_data / "cifar10-test.npz") as arrays:
        labels, last = torch.from_numpy(arrays["labels"]), arrays["images"][-1]
    assert torch.equal(torch.cat([batch.labels for batch in found]), labels)
    expected = cifar.normalise(torch.from_numpy(last).permute(2, 0, 1)[None].float() / 255)[0]
    assert torch.equal(found[-1].images[-1], expected)


# virtual images


def write_virtual(path, images, labels, preprocessing=IMAGENET, format_name="oodcli-virtual"):
    with h5py.File(path, "w") as file:
        file.attrs["format"] = format_name
        file.attrs["preprocessing"] = json.dumps(preprocessing.to_dict())
        file["images"] = images.astype(np.float16)
        file["label"] = np.asarray(labels)


def test_virtual_images(tmp_path):
    path = tmp_path / "v.h5"
    stored = np.random.default_rng(0).normal(size=(100, 3, 8, 8)).astype(np.float16)
    write_virtual(path, stored, np.arange(100) % 3)
    batch, source = read(path, IMAGENET, batch_size=70)
    torch.testing.assert_close(batch.images, torch.from_numpy(stored).float(), rtol=1e-5, atol=1e-5)
    assert batch.labels.tolist() == [row % 3 for row in range(100)]
    assert batch.paths[99] == f"{path.as_posix()}[99]"
    assert source.note is None
    batch, _ = read(path, PLAIN)  # pixels beyond [0, 1] are kept
    expected = IMAGENET.to_pixels(torch.from_numpy(stored).float())
    torch.testing.assert_close(batch.images, expected)
    assert float(batch.images.min()) < 0


def test_virtual_images_at_another_size_and_in_other_colours(tmp_path):
    stored = np.random.default_rng(0).normal(size=(3, 3, 8, 8))
    write_virtual(tmp_path / "v.h5", stored, [0, 1, 2], PLAIN)
    small = Preprocessing((4, 6), PLAIN.mean, PLAIN.std)
    batch, source = read(tmp_path / "v.h5", small)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(stored.astype(np.float16)).float(), (4, 6), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(batch.images, expected)
    assert "8x8 are resized to 4x6" in source.note
    batch, _ = read(tmp_path / "v.h5", GREY)
    weights = torch.tensor([0.299, 0.587, 0.114])
    grey = torch.einsum("nchw,c->nhw", torch.from_numpy(stored.astype(np.float16)).float(), weights)
    torch.testing.assert_close(batch.images[:, 0], grey)
    write_virtual(tmp_path / "grey.h5", stored[:, :1], [0, 1, 2], GREY)
    batch, _ = read(tmp_path / "grey.h5", PLAIN)
    assert batch.images.shape == (3, 3, 8, 8)
    assert torch.equal(batch.images[:, 0], batch.images[:, 2])


def test_labels_of_virtual_images_beyond_the_network(tmp_path):
    write_virtual(tmp_path / "v.h5", np.zeros((2, 3, 8, 8)), [0, 7])
    batch, source = read(tmp_path / "v.h5")
    assert batch.labels.tolist() == [-1, -1]
    assert "labels unknown" in source.note


def test_wrong_h5(tmp_path):
    path = tmp_path / "v.h5"
    write_virtual(path, np.zeros((2, 3, 8, 8)), [0, 1], format_name="oodcli-features")
    with pytest.raises(ImagesError, match="is a feature cache"):
        open_images(str(path), PLAIN, PETS)
    write_virtual(path, np.zeros((2, 3, 8, 8)), [0, 1], format_name="other")
    with pytest.raises(ImagesError, match="not one of virtual images"):
        open_images(str(path), PLAIN, PETS)
    write_virtual(path, np.zeros((2, 3, 8, 8)), [0, 1, 2])
    with pytest.raises(ImagesError, match=r"/images has shape \(2, 3, 8, 8\) and /label \(3,\)"):
        open_images(str(path), PLAIN, PETS)
    write_virtual(path, np.zeros((0, 3, 8, 8)), np.zeros(0, int))
    with pytest.raises(ImagesError, match="has no images"):
        open_images(str(path), PLAIN, PETS)
    with h5py.File(path, "r+") as file:
        del file["images"]
    with pytest.raises(ImagesError, match="lacks a part of a virtual file"):
        open_images(str(path), PLAIN, PETS)
    with h5py.File(path, "r+") as file:
        file.attrs["preprocessing"] = "{}"
    with pytest.raises(ImagesError, match="lacks a part of a virtual file"):
        open_images(str(path), PLAIN, PETS)


def test_truncated_h5(tmp_path):
    path = tmp_path / "v.h5"
    write_virtual(path, np.zeros((200, 3, 8, 8)), np.zeros(200, int))
    content = path.read_bytes()
    for size in (0, 100, len(content) // 2):
        path.write_bytes(content[:size])
        with pytest.raises(ImagesError, match="damaged, truncated or not"):
            open_images(str(path), PLAIN, PETS)


# torchvision


def test_torchvision_dataset(pets, monkeypatch):
    monkeypatch.setattr(datasets.utils, "download_url", None)
    batch, source = read(f"torchvision:ImageFolder?root={pets}")
    assert batch.paths[1] == "torchvision:ImageFolder[1]"
    assert batch.labels.tolist() == [0, 1, 1, 2]
    assert torch.equal(batch.images, torch.stack([pixels_of(seed) for seed in (1, 2, 3, 4)]))
    assert source.note is None
    batch, source = read(f"torchvision:ImageFolder?root={pets}", class_names=("a", "b", "c"))
    assert batch.labels.tolist() == [-1] * 4
    assert "cat" in source.note
    batch, source = read(f"torchvision:ImageFolder?root={pets}", class_names=NUMBERS)
    assert batch.labels.tolist() == [0, 1, 1, 2]
    assert "0 (cat)" in source.note


def test_torchvision_without_classes_and_with_converted_arguments():
    spec = "torchvision:FakeData?size=5&num_classes=3&random_offset=1"
    batch, source = read(spec, batch_size=2)
    assert len(source) == 5
    assert batch.labels.tolist() == [-1] * 5
    assert "does not name its classes" in source.note
    image, _ = datasets.FakeData(5, num_classes=3, random_offset=1)[4]
    assert torch.equal(batch.images[4], transforms.ToTensor()(image.resize((8, 8), 2)))


def test_unreadable_item_of_a_dataset(pets):
    (pets / "dog" / "2.png").write_bytes(b"no image")
    batch, _ = read(f"torchvision:ImageFolder?root={pets}")
    assert [error is None for error in batch.errors] == [True, False, True, True]
    assert len(batch.images) == 3


def test_torchvision_arguments(tmp_path, monkeypatch):
    seen = {}

    class Recorder(datasets.VisionDataset):
        classes = (("cat", "pussy"), ("dog",))  # as ImageNet's

        def __init__(self, root, year: str = "2012", split="x", train=True, n=1, download=True):
            seen.update(root=root, year=year, split=split, train=train, n=n, download=download)

        def __len__(self):
            return 2

        def __getitem__(self, row):
            return noise_image(row), 1 - row

    monkeypatch.setattr(datasets, "FakeData", Recorder)
    batch, _ = read("torchvision:FakeData?root=7&year=2007&split=1&train=False&n=3")
    assert seen == {
        "root": "7", "year": "2007", "split": "1", "train": False, "n": 3, "download": False,
    }  # fmt: skip
    assert batch.labels.tolist() == [1, 0]
    read("torchvision:FakeData?root=x&download=true")
    assert seen["download"] is True


def test_torchvision_passes_keyword_arguments_on_to_the_base(tmp_path):
    with pytest.raises(ImagesError, match="cannot be opened"):  # EMNIST takes train by **kwargs
        open_images(f"torchvision:EMNIST?root={tmp_path}&split=digits&train=false", PLAIN, PETS)
    with pytest.raises(ImagesError, match="'transform' is not one of"):
        open_images("torchvision:CIFAR10?transform=x", PLAIN, PETS)


# noise


@pytest.mark.parametrize("kind", NOISES)
def test_noise_is_reproducible_whatever_the_batch(kind):
    batch, source = read(f"noise:{kind}?n=70", batch_size=70)
    again, _ = read(f"noise:{kind}?n=90&seed=0", batch_size=7)
    assert torch.equal(batch.images, again.images[:70])
    other, _ = read(f"noise:{kind}?n=70&seed=1", batch_size=70)
    assert not torch.equal(batch.images, other.images)
    assert not torch.equal(batch.images[0], batch.images[1])
    assert float(batch.images.min()) >= 0
    assert float(batch.images.max()) <= 1
    assert batch.paths[69] == f"noise:{kind}[69]"
    assert batch.labels.tolist() == [-1] * 70
    assert (source.labelled, source.note) == (False, None)
    normalised, _ = read(f"noise:{kind}?n=70", IMAGENET, batch_size=70)
    torch.testing.assert_close(normalised.images, IMAGENET.normalise(batch.images))
    assert read(f"noise:{kind}?n=2", GREY)[0].images.shape == (2, 1, 8, 8)


def test_distributions_of_noise():
    images = {kind: read(f"noise:{kind}?n=500", batch_size=500)[0].images for kind in NOISES}
    # N(0.5, 1) beyond [0, 1] with probability 2·Φ(−0.5) = 0.617, half of it on each side.
    assert (images["gaussian"] == 0).float().mean().item() == pytest.approx(0.3085, abs=0.005)
    assert (images["gaussian"] == 1).float().mean().item() == pytest.approx(0.3085, abs=0.005)
    assert images["uniform"].mean().item() == pytest.approx(0.5, abs=0.005)
    assert images["uniform"].var().item() == pytest.approx(1 / 12, abs=0.002)
    assert set(images["rademacher"].unique().tolist()) == {0.0, 1.0}
    assert images["rademacher"].mean().item() == pytest.approx(0.5, abs=0.005)
    assert not ((images["blob"] > 0) & (images["blob"] < 0.75)).any()
    assert 0.1 < (images["blob"] > 0).float().mean().item() < 0.6


def test_blob_is_blurred_over_space_only():
    from oodcli.images.generated import blob

    image = blob(np.random.default_rng(0), (3, 40, 40))
    ones = np.random.default_rng(0).random((3, 40, 40)) < 0.7
    # The Gaussian of scipy and scikit-image is cut at 4 σ.
    kernel = np.exp(-(np.arange(-6, 7) ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    padded = np.pad(ones[1].astype(float), 6, mode="edge")
    rows = np.stack([np.convolve(row, kernel, "valid") for row in padded])
    blurred = np.stack([np.convolve(column, kernel, "valid") for column in rows.T]).T
    np.testing.assert_allclose(image[1], np.where(blurred < 0.75, 0, blurred), atol=1e-12)


def test_leaves_are_flat_shapes_on_top_of_each_other():
    """Against a naive painter: pixel by pixel, in the order of the leaves."""
    from oodcli.images.generated import LEAF, LEAVES, leaves

    shape = (2, 9, 14)
    image = leaves(np.random.default_rng(5), shape)
    random = np.random.default_rng(5)
    radii = random.uniform(LEAF[1] ** -2, LEAF[0] ** -2, LEAVES) ** -0.5 * 9
    places = random.random((LEAVES, 2)) * (9, 14)
    kinds = random.integers(0, 3, LEAVES)
    colours = random.random((LEAVES + 1, 2, 1))[..., 0]
    lengths = [np.linalg.norm, lambda v: max(abs(v)), lambda v: sum(abs(v))]
    for row, column in np.ndindex(9, 14):
        way = np.array([row + 0.5, column + 0.5]) - places
        over = [i for i in range(LEAVES) if lengths[kinds[i]](way[i]) < radii[i]]
        expected = colours[over[-1] if over else LEAVES]
        np.testing.assert_array_equal(image[:, row, column], expected)


def test_leaves_have_flat_areas():
    images = read("noise:leaves?n=9", replace(PLAIN, input_size=(64, 64)), batch_size=9)[0].images
    assert 0.6 < (images[..., 1:] == images[..., :-1]).float().mean().item() < 0.95


@pytest.mark.parametrize("size", [(32, 32), (17, 40)])
def test_amplitudes_of_fractals_fall_with_the_frequency(size):
    images = read("noise:fractal?n=300", replace(PLAIN, input_size=size), batch_size=300)[0].images
    assert images.mean().item() == pytest.approx(0.5, abs=0.01)
    power = np.abs(np.fft.fft2(images.double().numpy())).__pow__(2).mean((0, 1))
    along = np.sqrt(power[0, [2, 8]])
    assert along[0] / along[1] == pytest.approx(4, rel=0.1)
    red, green = images[:, 0].flatten(), images[:, 1].flatten()
    assert np.corrcoef(red, green)[0, 1] == pytest.approx(0.5, abs=0.05)


def test_a_million_noise_images_stream():
    source = open_images("noise:uniform?n=1000000", PLAIN, PETS)
    assert len(source) == 1_000_000
    tracemalloc.start()
    try:
        with closing(batches(source, PLAIN, 64)) as stream:
            first = next(stream)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
    assert first.images.shape == (64, 3, 8, 8)


# what cannot be opened


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "does not exist"),
        ("nowhere.npz", "does not exist"),
        ("empty", "has no images"),
        ("empty.zip", "has no images"),
        ("empty.tar", "has no images"),
        ("empty.txt", "lists no images"),
        ("binary.txt", "is not a text list"),
        ("text.zip", "is damaged"),
        ("text.tar", "is damaged"),
        ("text.npz", "is damaged"),
        ("text.h5", "is damaged"),
        ("some.docx", r"'\.docx' are not supported"),
        ("noise:pink", "'pink' is not one of gaussian"),
        ("noise:", "'' is not one of gaussian"),
        ("noise:gaussian?m=3", "'m' is not one of n, seed"),
        ("noise:gaussian?n=0", "n=0 must be an integer of at least 1"),
        ("noise:gaussian?n=many", "n=many must be"),
        ("noise:gaussian?seed=-1", "seed=-1 must be"),
        ("noise:gaussian?n", "'n' lacks a value"),
        ("torchvision:Nothing", "no dataset 'Nothing'"),
        ("torchvision:VisionDataset?root=x", "no dataset|cannot be opened"),
        ("torchvision:utils", "no dataset 'utils'"),
        ("torchvision:CIFAR10?root=x&colour=red", "'colour' is not one of"),
        ("torchvision:CIFAR10", "cannot be opened"),
        ("torchvision:CIFAR10?root=empty", "cannot be opened"),
    ],
)
def test_what_cannot_be_opened(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(png(0))
    (tmp_path / "some.docx").touch()
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    tarfile.open(tmp_path / "empty.tar", "w").close()
    for kind in ("zip", "tar", "npz", "h5"):
        (tmp_path / f"text.{kind}").write_text("not what the suffix says")
    with pytest.raises(ImagesError, match=message) as caught:
        open_images(spec, PLAIN, PETS)
    assert "\n" not in str(caught.value)


# colours, sizes, damage


def save(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path


def test_grey_becomes_rgb_and_rgb_grey(tmp_path):
    grey = noise_image(0, mode="L")
    found = only(save(tmp_path, grey))
    assert torch.equal(found, torch.from_numpy(np.array(grey)).long().expand(3, -1, -1))
    colour = noise_image(0)
    found = only(save(tmp_path, colour), preprocessing=GREY)
    assert torch.equal(found[0], torch.from_numpy(np.array(colour.convert("L"))).long())


def test_alpha_is_dropped(tmp_path):
    image = noise_image(0, mode="RGBA")
    found = only(save(tmp_path, image))
    assert torch.equal(found, torch.from_numpy(np.array(image)[..., :3]).permute(2, 0, 1).long())


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(16))], ids=["none", "one", "table"])
def test_palette(tmp_path, transparency):
    image = noise_image(0).quantize(16)
    options = {} if transparency is None else {"transparency": transparency}
    found = only(save(tmp_path, image, **options))
    assert torch.equal(
        found, torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).long()
    )


def test_one_bit(tmp_path):
    image = noise_image(0, mode="L").convert("1")
    assert set(only(save(tmp_path, image)).unique().tolist()) == {0, 255}


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_16_bit_is_scaled_not_clipped(tmp_path, name):
    levels = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    found = only(save(tmp_path, Image.fromarray(levels), name))
    assert found[0].tolist() == np.rint(levels / 257).astype(int).tolist()
    assert len(found[0].unique()) == 64


def test_16_bit_big_endian(tmp_path):
    levels = np.linspace(0, 65535, 64).reshape(8, 8).astype(">u2")
    image = Image.frombytes("I;16B", (8, 8), levels.tobytes())
    assert np.asarray(colours(image, 1)).tolist() == np.rint(levels / 257).astype(int).tolist()


def test_32_bit(tmp_path):
    fractions = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    found = only(save(tmp_path, Image.fromarray(fractions), "x.tif"))
    assert found[0].tolist() == np.rint(fractions * 255).astype(int).tolist()
    for values in (fractions * 2, fractions - 1):
        error = only(save(tmp_path, Image.fromarray(values), "x.tif"))
        assert error == (
            "floating-point pixels outside [0, 1]: save them as 8 or 16 bits, or give "
            "--image-range LOW,HIGH"
        )
    for options in ({}, {"preprocessing": replace(PLAIN, image_range=(0, 2))}):
        error = only(save(tmp_path, Image.fromarray(fractions * np.nan), "x.tif"), **options)
        assert error == "floating-point pixels that are not numbers (NaN)"
    image = Image.fromarray(np.full((8, 8), 70000, np.int32))
    assert "32-bit pixels" in only(save(tmp_path, image, "x.tif"))


def test_cmyk(tmp_path):
    image = noise_image(0).convert("CMYK")
    found = only(save(tmp_path, image, "x.tif"))
    assert torch.equal(
        found, torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).long()
    )


def test_colour_mode_that_pillow_cannot_convert(tmp_path, monkeypatch):
    def refuse(image, mode):  # LAB, before Pillow 12
        raise ValueError("conversion not supported")

    write(tmp_path / "x.png", encoded(noise_image(0, mode="L")))
    monkeypatch.setattr(Image.Image, "convert", refuse)
    assert only(tmp_path) == "colour mode L cannot be converted to RGB"


def test_premultiplied_alpha():
    opaque = Image.merge("RGBA", (*noise_image(0).split(), Image.new("L", (8, 8), 255)))
    assert np.array_equal(colours(opaque.convert("RGBa"), 3), noise_image(0))


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, name, orientation):
    image = Image.new("L", (8, 8))
    image.paste(255, (0, 0, 4, 2))  # a bar at the left of the top edge
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name.endswith("webp") else {}
    found = only(save(tmp_path, image.convert("RGB"), name, exif=exif, **options))[0] > 127
    # What the standard says of the stored row 0 and column 0.
    stored = torch.from_numpy(np.array(image)) > 127
    expected = {
        1: stored, 2: stored.flip(1), 3: stored.flip(0, 1), 4: stored.flip(0),
        5: stored.T, 6: stored.T.flip(1), 7: stored.T.flip(0, 1), 8: stored.T.flip(0),
    }[orientation]  # fmt: skip
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_spoil_the_image(tmp_path):
    write(
        tmp_path / "x.jpg", encoded(noise_image(0), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    )
    assert not isinstance(only(tmp_path), str)


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp", "x.tif"])
def test_first_frame_of_an_animation(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    options = {"lossless": True} if name == "x.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert only(tmp_path)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("kind", "name"), [("JPEG", "x.jpg"), ("PNG", "x.png"), ("GIF", "x.gif")])
def test_truncated_image_is_a_row(tmp_path, kind, name):
    content = encoded(noise_image(0, (64, 64)), kind)
    write(tmp_path / name, content[: len(content) // 2])
    write(tmp_path / "good.png", png(1))
    batch, _ = read(tmp_path)
    assert batch.errors[0] is None
    assert "truncated" in batch.errors[1] or "damaged" in batch.errors[1]
    assert torch.equal(batch.images[0], pixels_of(1))


def test_files_that_are_no_images(tmp_path):
    write(tmp_path / "1.png", b"")
    write(tmp_path / "2.png", b"some text")
    write(tmp_path / "3.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    write(tmp_path / "4.jpg", png(1))  # the content counts, not the suffix
    (tmp_path / "5.png").mkdir()
    batch, _ = read(tmp_path)
    assert batch.errors == ("empty file", *["not an image, or damaged"] * 2, None)


def test_all_rows_unreadable(tmp_path):
    for row in range(5):
        write(tmp_path / f"{row}.png", b"")
    batch, _ = read(tmp_path, batch_size=2)
    assert batch.images.shape == (0, 3, 8, 8)
    assert batch.errors == ("empty file",) * 5


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name, size in (("1.png", (8, 8)), ("2.png", (40, 40)), ("3.png", (100, 100))):
        write(tmp_path / name, png(1, size))
    batch, _ = read(tmp_path)
    assert batch.errors[0] is None
    assert "40x40 pixels, more than Pillow's limit of 1000" in batch.errors[1]
    assert "bomb" in batch.errors[2]
    assert all("--max-pixels" in error for error in batch.errors[1:])
    limit_pixels(10_000)
    batch, _ = read(tmp_path)
    assert batch.errors == (None, None, None)


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=60), st.integers(0, 10**6), st.sampled_from(["PNG", "JPEG", "TIFF", "GIF"])
)
def test_no_damage_crashes_the_decoder(patch, where, kind):
    content = bytearray(encoded(noise_image(0), kind))
    where %= len(content)
    content[where : where + len(patch)] = patch
    reason = "none"
    try:
        assert fit(load_bytes(bytes(content)), PLAIN).shape == (8, 8, 3)
    except UnreadableError as error:
        reason = str(error)
    assert reason
    assert "0x" not in reason


SIZES = [(8, 8), (9, 9), (10, 31), (31, 10), (100, 7), (7, 100), (33, 64), (1, 50), (640, 3)]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("resize", [None, 10, 13])
@pytest.mark.parametrize("input_size", [(8, 8), (7, 10), (10, 5)])
def test_sizes_as_torchvision_has_them(interpolation, resize, input_size):
    preprocessing = Preprocessing(input_size, PLAIN.mean, PLAIN.std, resize, interpolation)
    mode = transforms.InterpolationMode(interpolation)
    steps = [transforms.Resize(input_size if resize is None else resize, mode)]
    if resize is not None:
        steps.append(transforms.CenterCrop(input_size))
    reference = transforms.Compose(steps)
    for seed, size in enumerate(SIZES):
        image = noise_image(seed, size)
        assert np.array_equal(fit(image, preprocessing), np.array(reference(image))), size


def test_extreme_shapes_need_no_extreme_memory(monkeypatch):
    preprocessing = Preprocessing((8, 8), PLAIN.mean, PLAIN.std, resize=10)
    from oodcli.images import pixels

    shapes = [(300, 20), (20, 300), (301, 7), (7, 301)]
    exact = [fit(noise_image(1, size), preprocessing) for size in shapes]
    monkeypatch.setattr(pixels, "LARGEST_RESIZED", 0)
    for size, expected in zip(shapes, exact, strict=True):
        found = fit(noise_image(1, size), preprocessing)
        assert np.abs(found.astype(int) - expected).max() <= 1
    monkeypatch.undo()
    large = Preprocessing((224, 224), PLAIN.mean, PLAIN.std, resize=256)
    assert fit(noise_image(1, (60_000, 1)), large).shape == (224, 224, 3)
    assert fit(noise_image(1, (1, 60_000)), large).shape == (224, 224, 3)
    assert fit(noise_image(1, (60_000, 1)), PLAIN).shape == (8, 8, 3)


# reading


def assert_no_threads():
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("oodcli")]
    assert names == []


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
@pytest.mark.parametrize(("allowed", "expected"), [({3}, 1), (set(range(100)), 32)])
def test_as_many_workers_as_the_process_may_use(tmp_path, monkeypatch, allowed, expected):
    (tmp_path / "a.png").write_bytes(png(1))
    asked = []
    pool = reading.ThreadPoolExecutor
    monkeypatch.setattr(os, "cpu_count", lambda: 100)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed)
    monkeypatch.setattr(
        reading, "ThreadPoolExecutor", lambda count, name: asked.append(count) or pool(count, name)
    )
    assert len(list(batches(open_images(str(tmp_path), PLAIN, PETS), PLAIN, 4))) == 1
    assert asked == [1, expected]  # one fetches


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 7, 100])
def test_batches_do_not_depend_on_workers_or_size(tmp_path, workers, batch_size):
    for row in range(23):
        write(tmp_path / f"{row:02}.png", b"" if row % 5 == 3 else png(row))
    source = open_images(str(tmp_path), PLAIN, PETS)
    found = list(batches(source, PLAIN, batch_size, workers))
    assert [path for batch in found for path in batch.paths] == source.paths(0, 23)
    assert torch.equal(
        torch.cat([batch.images for batch in found]),
        torch.stack([pixels_of(row) for row in range(23) if row % 5 != 3]),
    )
    for batch in found:
        assert len(batch.images) == batch.errors.count(None)
    assert_no_threads()


@pytest.mark.parametrize("spec", ["pets", "x.npz", "noise:uniform?n=4"])
def test_reading_from_a_row_on(pets, tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    np.savez_compressed("x.npz", images=np.stack([np.array(noise_image(row)) for row in range(4)]))
    source = open_images(spec, PLAIN, PETS)
    whole = torch.cat([batch.images for batch in batches(source, PLAIN, 2)])
    rest = list(batches(source, PLAIN, 2, start=3))
    assert rest[0].paths == tuple(source.paths(3, 4))
    assert torch.equal(rest[0].images, whole[3:])
    assert list(batches(source, PLAIN, 2, start=4)) == []


class Slow(ImageSource):
    """Counts what has been read; fails at one row if told to."""

    name = "slow"
    grain = 1

    def __init__(self, fails_at=None):
        self.fetched = 0
        self.fails_at = fails_at
        self.opened = 0

    def __len__(self):
        return 10_000

    def paths(self, start, stop):
        return [str(row) for row in range(start, stop)]

    @contextmanager
    def reading(self):
        def fetch(start, stop):
            assert start == self.fetched  # in order
            self.fetched = stop

            def decode(preprocessing):
                if self.fails_at is not None and stop > self.fails_at:
                    raise AttributeError("a fault in the program")
                return Rows(torch.zeros(1).long(), [None], torch.zeros(1, 3, 8, 8))

            return decode

        self.opened += 1
        try:
            yield fetch
        finally:
            self.opened -= 1


def test_reading_ahead_is_bounded_and_ends_when_closed():
    source = Slow()
    stream = batches(source, PLAIN, 4, workers=3)
    next(stream)
    deadline = time.monotonic() + 60
    while source.fetched < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert source.fetched == 12  # the batch in hand, and two ahead
    assert source.opened == 1
    stream.close()
    assert source.opened == 0
    assert_no_threads()


def test_reading_ends_when_the_loop_breaks_off():
    source = Slow()

    def interrupted():
        for _ in batches(source, PLAIN, 4):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert source.opened == 0
    assert_no_threads()


def test_faults_of_the_program_are_passed_on():
    source = Slow(fails_at=20)
    with pytest.raises(AttributeError, match="a fault in the program"):
        list(batches(source, PLAIN, 4))
    assert source.opened == 0
    assert_no_threads()


def test_an_empty_word_is_not_the_working_directory():
    with pytest.raises(ImagesError, match="IMAGES is empty"):
        open_images("", PLAIN, PETS)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batch_size=0"):
        list(batches(Slow(), PLAIN, 0))


@pytest.mark.slow
def test_import_is_light():
    code = "import sys; from oodcli.images import open_images; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "PIL.Image" in done.stdout.split()
    assert not {"h5py", "torchvision", "scipy", "sklearn"} & set(done.stdout.split())


def test_shared_photos(shared_data):
    cifar = Preprocessing((32, 32), IMAGENET.mean, IMAGENET.std)
    batch, source = read(shared_data / "photos", cifar, batch_size=16)
    assert len(source) == 40
    assert set(batch.errors) == {None}
    path = shared_data / "photos" / "banded_0002.jpg"
    image = Image.open(path).convert("RGB")
    with image:
        small = transforms.Resize((32, 32))(image)
    torch.testing.assert_close(
        batch.images[0], cifar.normalise(transforms.ToTensor()(small)[None])[0]
    )
