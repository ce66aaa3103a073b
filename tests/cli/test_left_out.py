"""Files that are no rows, and pictures that cannot be read: nothing is passed over in silence."""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from commands import oodcli
from PIL import Image

from oodcli.errors import ImagesError
from oodcli.files.cache import open_cache
from oodcli.images import batches, open_images, pixels
from oodcli.images.files import listed
from oodcli.images.pieces import Piece, chunks, left_out, pieces
from oodcli.images.pixels import (
    SUFFIXES,
    TEXTS,
    UNREADABLE,
    UnreadableError,
    load_bytes,
    load_file,
    upright,
)
from oodcli.networks.preprocessing import Preprocessing
from oodcli.stages.score import Doubts, doubts

PLAIN = Preprocessing((8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
WRONG = ("photo.dng", "photo.JXL", "b/photo.psd", "photo.dcm", "drawing.svg", "photo.cr2")
OTHERS = ("no_suffix", "movie.mp4", "notes.txt", "b/more.TXT", "Thumbs.db", "README", "photo.0001")
HIDDEN = (".DS_Store", ".git/x.jpg", "__MACOSX/b/photo.dng", "s.csv.partial", "__MACOSX/x.txt")
COUNTED = {"no suffix": 1, ".mp4": 1, ".txt": 2, "thumbs.db": 1, "readme": 1, "other suffix": 1}


def png(seed: int = 0) -> bytes:
    image = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def mixed(tmp_path) -> Path:
    root = tmp_path / "mixed"
    for name in ("a.png", *WRONG, *OTHERS, *HIDDEN):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png())
    return root


def packed(root: Path, kind: str) -> Path:
    path = root.parent / f"x.{kind}"
    files = sorted(each for each in root.rglob("*") if each.is_file())
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as zipped:
            for each in files:
                zipped.write(each, each.relative_to(root))
    else:
        with tarfile.open(path, "w") as tar:
            for each in files:
                tar.add(each, str(each.relative_to(root)))
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_files_that_are_no_rows_are_counted_and_pictures_are_rows(mixed, kind):
    spec = mixed if kind == "folder" else packed(mixed, kind)
    source = open_images(str(spec), PLAIN, ("a", "b"))
    assert dict(source.left_out) == COUNTED
    errors: dict[str, str | None] = {}
    for batch in batches(source, PLAIN, 4):
        names = [str(Path(path).relative_to(spec)) for path in batch.paths]
        errors |= dict(zip(names, batch.errors, strict=True))
    assert errors.keys() == {"a.png", *WRONG}
    assert errors["a.png"] is None
    for name in WRONG:  # although their content is a PNG: that of a real .dng is a small preview
        assert f"{Path(name).suffix.lower()} is" in errors[name]
        assert "to PNG, TIFF or JPEG first" in errors[name]


def test_files_elsewhere_are_counted_alike(mixed):
    spec = f"file://{mixed}"
    assert dict(left_out(spec)) == COUNTED
    found = [chunk for piece in pieces(spec, 100) for chunk in chunks(piece, 100)]
    rows = {Path(path).name: load for c in found for path, load in zip(c.paths, c.loads)}  # noqa: B905
    assert rows.keys() == {Path(name).name for name in ("a.png", *WRONG)}
    with pytest.raises(UnreadableError, match="camera raw data"):
        rows["photo.dng"]()
    assert rows["a.png"]().size == (8, 8)
    tar = packed(mixed, "tar")
    assert not left_out(f"file://{tar}")
    (chunk,) = chunks(Piece(0, "tar", str(tar)), 100)
    (dng,) = (load for path, load in zip(chunk.paths, chunk.loads) if path.endswith(".dng"))  # noqa: B905
    with pytest.raises(UnreadableError, match="camera raw data"):
        dng()


def test_a_folder_of_nothing_but_others_says_what_is_there(tmp_path):
    (tmp_path / "x").mkdir()
    for name in ("a.mp4", "b.mp4", "c.txt"):
        (tmp_path / "x" / name).touch()
    with pytest.raises(ImagesError, match=r"no images: .*\(only \.mp4 2, \.txt 1\)"):
        open_images(str(tmp_path / "x"), PLAIN, ("a", "b"))


def test_a_picture_that_cannot_be_read_in_a_list(tmp_path):
    (tmp_path / "photo.nef").write_bytes(png())
    (tmp_path / "list.txt").write_text("photo.nef 1\n")
    (batch,) = batches(open_images(str(tmp_path / "list.txt"), PLAIN, ("a", "b")), PLAIN, 4)
    assert "raw data" in batch.errors[0]
    assert batch.labels.tolist() == [1]


def test_kinds_of_files_do_not_overlap():
    assert not SUFFIXES & UNREADABLE.keys()
    assert not SUFFIXES & TEXTS
    assert not UNREADABLE.keys() & TEXTS


def test_listing():
    assert listed({".a": 1, ".b": 3}) == ".b 3, .a 1"
    many = {f".x{i}": i for i in range(1, 9)}
    assert listed(many) == ".x8 8, .x7 7, .x6 6, .x5 5, .x4 4, 3 other suffixes"


# the gate


def test_doubts_by_hand():
    each = Doubts(rows=10, flagged=1, unjudged=2, unreadable=3, left_out=2)
    assert each.share == 8 / 12
    assert each.words == "1 OOD, 2 without a verdict, 3 unreadable, 2 left out, of 12"
    assert Doubts(10, 0, 0, 0, 0).words == "0 OOD, of 10"
    found = doubts(10, 1, {"a": 2, "b": 0}, {"b": 4}, {".mp4": 3, ".txt": 5, "thumbs.db": 1})
    assert found == {"a": Doubts(10, 2, 0, 1, 3), "b": Doubts(10, 0, 4, 1, 3)}


def score(fitted, images, *words):
    common = ("-d", "energy", "--threshold", "energy=1e9")  # nothing is OOD by it
    return oodcli("score", fitted / "digits.pt", images, *common, *words)


def test_summary_json_and_what_lies_beside_scores(fitted, mixed, tmp_path):
    result = score(fitted, mixed, "-o", tmp_path / "s.csv", "--json")
    assert result.status == 3
    assert "7 files left out: no suffix of an image (.txt 2, .mp4 1, " in result.err
    assert json.loads(result.out)["left_out"] == COUNTED
    assert json.loads((tmp_path / "s.csv.json").read_text())["left_out"] == COUNTED
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "a.png").write_bytes(png())
    result = score(fitted, plain, "-o", tmp_path / "p.csv", "--json")
    assert result.status == 0
    assert "left out" not in result.err
    assert json.loads(result.out)["left_out"] == {}


def test_extract_keeps_what_was_left_out_for_the_gate(fitted, mixed, tmp_path):
    made = oodcli("extract", fitted / "digits.pt", mixed, "-o", tmp_path / "f.h5", "--json")
    assert made.status == 3
    assert "7 files left out" in made.err
    assert json.loads(made.out)["left_out"] == COUNTED
    with open_cache(tmp_path / "f.h5") as cache:
        assert cache.provenance.left_out == COUNTED
    words = ("-d", "energy", "--threshold", "energy=1e9", "-o", tmp_path / "s.csv")
    result = oodcli("score", tmp_path / "f.h5", *words, "--max-ood-fraction", 0.5)
    assert result.status == 4
    assert "6 unreadable, 3 left out, of 10" in result.err
    with h5py.File(tmp_path / "f.h5", "a") as file:  # as an older oodcli made it
        del file.attrs["left_out"]
    with open_cache(tmp_path / "f.h5") as cache:
        assert cache.provenance.left_out == {}


def test_the_gate_counts_what_could_not_be_looked_at(fitted, tmp_path):
    root = tmp_path / "x"
    root.mkdir()
    for i in range(6):
        (root / f"{i}.png").write_bytes(png(i))
    assert score(fitted, root, "--max-ood-fraction", 0.0).status == 0
    (root / "notes.txt").touch()
    assert score(fitted, root, "--max-ood-fraction", 0.0).status == 0
    (root / "photo").touch()
    (root / "x.dng").touch()
    assert score(fitted, root, "--max-ood-fraction", 0.25).status == 3  # 2 of 8
    result = score(fitted, root, "--max-ood-fraction", 0.24)
    assert result.status == 4
    assert (
        "gate failed: 25.0% are not known to be in-distribution by energy, more than 24.0% "
        "(1 unreadable, 1 left out, of 8)"
    ) in result.err


def test_shards_count_left_out_files_once(fitted, tmp_path):
    root = tmp_path / "x"
    root.mkdir()
    for i in range(6):
        (root / f"{i}.png").write_bytes(png(i))
    (root / "photo").touch()
    for n in (1, 2):
        words = ("--shard", f"{n}/2", "--batch-size", 2, "-o", tmp_path / f"{n}.csv")
        result = score(fitted, root, *words, "--max-ood-fraction", 0.0)
        assert result.status == 0, result.err
    parts = ("merge", tmp_path / "1.csv", tmp_path / "2.csv", "--force", "-o", tmp_path / "m.csv")
    result = oodcli(*parts, "--max-ood-fraction", 0.1)
    assert result.status == 4
    assert "(1 left out, of 7)" in result.err
    assert oodcli(*parts, "--max-ood-fraction", 0.15).status == 0
    assert json.loads((tmp_path / "m.csv.json").read_text())["left_out"] == {"no suffix": 1}


# HEIC and AVIF


def photo(kind: str, **options) -> bytes:
    """A picture that is red in its upper left quarter, black elsewhere; 32 x 16."""
    image = Image.new("RGB", (32, 16))
    image.paste((255, 0, 0), (0, 0, 16, 8))
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def red_corner(image: Image.Image) -> str:
    """Where the red quarter is."""
    array = np.asarray(image.convert("RGB")).astype(int)
    height, width = array.shape[:2]
    corners = {
        "upper left": array[: height // 2, : width // 2],
        "upper right": array[: height // 2, width // 2 :],
        "lower left": array[height // 2 :, : width // 2],
        "lower right": array[height // 2 :, width // 2 :],
    }
    return max(corners, key=lambda name: corners[name][..., 0].mean())


def oriented(tag: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif.tobytes()


@pytest.fixture
def heif():
    module = pytest.importorskip("pillow_heif")
    module.register_heif_opener()  # for saving in these tests


@pytest.mark.usefixtures("heif")
@pytest.mark.parametrize("suffix", [".heic", ".HEIF", ".hif", ".jpg"])
def test_heic_is_read_whatever_its_suffix(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(photo("HEIF", quality=95))
    image = load_file(path)
    assert image.size == (32, 16)
    assert red_corner(image) == "upper left"
    if suffix != ".jpg":
        assert len(open_images(str(tmp_path), PLAIN, ("a", "b"))) == 1


@pytest.mark.usefixtures("heif")
@pytest.mark.parametrize(
    ("tag", "size", "corner"),
    [
        (1, (32, 16), "upper left"),
        (2, (32, 16), "upper right"),
        (3, (32, 16), "lower right"),
        (6, (16, 32), "upper right"),
        (8, (16, 32), "lower left"),
    ],
)
def test_the_orientation_of_heic_is_applied_once(tag, size, corner):
    """pillow-heif turns the pixels and resets the tag; in a JPEG it is ours to do."""
    for kind in ("HEIF", "JPEG"):
        image = upright(load_bytes(photo(kind, quality=95, exif=oriented(tag))))
        assert (image.size, red_corner(image)) == (size, corner), kind


@pytest.mark.usefixtures("heif")
def test_heic_in_processes_of_their_own(tmp_path):
    (tmp_path / "x.heic").write_bytes(photo("HEIF", quality=95))
    source = open_images(str(tmp_path), PLAIN, ("a", "b"))
    (batch,) = batches(source, PLAIN, 4, timeout=60)
    (plain,) = batches(source, PLAIN, 4)
    assert batch.errors == (None,)
    assert torch.equal(batch.images, plain.images)


@pytest.mark.usefixtures("heif")
def test_heic_without_the_library_says_what_to_install(tmp_path, monkeypatch):
    data = photo("HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    pixels.heif_is_read.cache_clear()
    try:
        with pytest.raises(UnreadableError, match=r"pip install 'oodcli\[heic\]'"):
            load_bytes(data)
        with pytest.raises(UnreadableError, match="not an image, or damaged"):
            load_bytes(b"\0\0\0\x18ftypavifmif1" + b"\0" * 100)
    finally:
        pixels.heif_is_read.cache_clear()


@pytest.mark.usefixtures("heif")
def test_damaged_heic_is_a_row_with_an_error():
    data = photo("HEIF")
    for cut in (20, 100, len(data) // 2):
        with pytest.raises(UnreadableError):
            load_bytes(data[:cut])


def test_pillow_heif_is_not_imported_before_it_is_needed():
    import subprocess

    code = "import sys; from oodcli.images import pixels; print('pillow_heif' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_avif_is_read(tmp_path):
    if "AVIF" not in pixels.FORMATS:
        pytest.skip("this Pillow has no AVIF")
    (tmp_path / "x.avif").write_bytes(photo("AVIF", quality=90))
    image = load_file(tmp_path / "x.avif")
    assert (image.size, red_corner(image)) == ((32, 16), "upper left")


def test_rows_of_pictures_that_cannot_be_read_have_their_reason(fitted, mixed):
    result = oodcli("score", fitted / "digits.pt", mixed, "-d", "msp")
    assert result.status == 3
    found = {
        Path(row["path"]).name: row["error"] for row in csv.DictReader(io.StringIO(result.out))
    }
    assert found["a.png"] == ""
    assert "convert it" in found["photo.psd"]
