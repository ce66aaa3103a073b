"""Pieces of what a cluster scores: shards, Parquet and folders anywhere."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from commands import oodcli
from pictures import picture, write_tar

from oodcli.errors import ImagesError, OodcliError
from oodcli.images.pieces import Piece, chunks, is_remote, labels_of, pieces, sizes
from oodcli.images.pixels import UnreadableError

pytest.importorskip("fsspec")


def read(piece: Piece, size: int = 100) -> list[tuple[str, str | int | None, str]]:
    """Path, label, and what the image is, or why it cannot be read."""
    found = []
    for chunk in chunks(piece, size):
        assert 0 < len(chunk.paths) <= size
        for path, label, load in zip(*chunk, strict=True):
            try:
                found.append((path, label, "x".join(map(str, load().size))))
            except UnreadableError as reason:
                found.append((path, label, str(reason)))
    return found


@pytest.mark.parametrize(
    ("spec", "remote"),
    [
        ("s3://bucket/images", True),
        ("memory://a/b.tar", True),
        ("shards/{000..127}.tar", True),
        ("shards/*.tar.gz", True),
        ("data/*.parquet", True),
        ("data/x.parquet", True),
        ("photos/", False),
        ("shard.tar", False),
        ("list[1].txt", False),
        ("noise:uniform?n=5", False),
        ("torchvision:CIFAR10?root=data", False),
    ],
)
def test_which_images_are_for_a_cluster_alone(spec, remote):
    assert is_remote(spec) == remote


def test_tar_shards_in_webdatasets_style(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        {
            "b/1.png": picture(1),
            "b/1.cls": b"7",
            "b/2.cls": b"cat\n",
            "b/2.jpg": picture(2, "JPEG"),
            "b/2.json": b"{}",
            "c/1.png": picture(3),
            "c/._1.png": b"of macOS",
            "c/2.png": b"no image",
        },
    )
    found = read(Piece(0, "tar", str(tmp_path / "a.tar")))
    place = tmp_path / "a.tar"
    assert found == [
        (f"{place}/b/1.png", 7, "8x8"),
        (f"{place}/b/2.jpg", "cat", "8x8"),
        (f"{place}/c/1.png", None, "8x8"),
        (f"{place}/c/2.png", None, "not an image, or damaged"),
    ]
    assert read(Piece(0, "tar", str(place)), 3) == found
    data = place.read_bytes()
    place.write_bytes(data[:1700])
    with pytest.raises(ImagesError, match=r"a\.tar cannot be read|ends within"):
        read(Piece(0, "tar", str(place)))


def test_shards_by_pattern(tmp_path):
    for number in range(12):
        write_tar(tmp_path / f"s{number:03}.tar", {"1.png": picture(number)})
    for spec in ("s{000..011}.tar", "s*.tar"):
        found = pieces(str(tmp_path / spec), 5)
        assert [each.number for each in found] == list(range(12))
        assert [Path(each.where).name for each in found] == [f"s{i:03}.tar" for i in range(12)]
    assert len(pieces(str(tmp_path / "s{003..005}.tar"), 5)) == 3
    with pytest.raises(ImagesError, match=r"s012\.tar does not exist"):
        pieces(str(tmp_path / "s{000..012}.tar"), 5)
    before = sizes(str(tmp_path / "s*.tar"))
    write_tar(tmp_path / "s000.tar", {"1.png": picture(1), "2.png": picture(2) * 100})
    assert sizes(str(tmp_path / "s*.tar")) != before


def test_parquet_with_the_bytes_of_images(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    cells = [picture(number) for number in range(5)] + [b"no image", None]
    plain = pyarrow.table({"png": cells, "label": [3, None, 9, 1, 1, 0, 0]})
    pyarrow.parquet.write_table(plain, tmp_path / "plain.parquet", row_group_size=4)
    found = pieces(str(tmp_path / "plain.parquet"), 5)
    assert [(each.kind, each.start) for each in found] == [("parquet", 0), ("parquet", 1)]
    place = tmp_path / "plain.parquet"
    rows = [row for piece in found for row in read(piece, 3)]
    assert [row[0] for row in rows] == [f"{place}#{number}" for number in range(7)]
    assert [row[1] for row in rows] == [3, None, 9, 1, 1, 0, 0]
    assert [row[2] for row in rows[4:]] == [
        "8x8",
        "not an image, or damaged",
        "the row has no image",
    ]
    nested = pyarrow.table({"image": [{"bytes": cells[0], "path": "a.png"}], "label": ["cat"]})
    pyarrow.parquet.write_table(nested, tmp_path / "nested.parquet")
    (piece,) = pieces(str(tmp_path / "*ed.parquet"), 5)
    assert read(piece) == [(f"{tmp_path}/nested.parquet#0/a.png", "cat", "8x8")]
    # Where an image is larger than what fits in the memory, they are read one by one.
    images = pyarrow.parquet.read_metadata(place).row_group(0).column(0)
    monkeypatch.setattr("oodcli.images.pieces.LARGEST_MEMBER", images.total_uncompressed_size - 1)
    assert len(read(found[0])) == 4
    other = pyarrow.table({"text": ["a"]})
    pyarrow.parquet.write_table(other, tmp_path / "other.parquet")
    with pytest.raises(ImagesError, match="has the columns text, but none of image"):
        read(pieces(str(tmp_path / "other.parquet"), 5)[0])
    (tmp_path / "other.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ImagesError, match="is not parquet, or damaged"):
        pieces(str(tmp_path / "other.parquet"), 5)


@pytest.mark.slow
def test_large_images_in_parquet_are_read_in_small_batches(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    large = picture(0) + bytes(10**7)
    repeated = pyarrow.table({"image": pyarrow.array([large]).take([0] * 70)})
    pyarrow.parquet.write_table(repeated, tmp_path / "large.parquet")
    assert (tmp_path / "large.parquet").stat().st_size < 2 * 10**6
    found_sizes = []
    batches = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "iter_batches",
        lambda file, rows, **options: [
            found_sizes.append(each.nbytes) or each for each in batches(file, rows, **options)
        ],
    )
    rows = read(pieces(str(tmp_path / "large.parquet"), 5)[0])
    assert [size for _, _, size in rows] == ["8x8"] * 70
    assert 10**8 < max(found_sizes) < 1 << 28  # of 700 MB


def test_folders_anywhere():
    import fsspec

    memory = fsspec.filesystem("memory")
    for number in range(7):
        memory.pipe_file(f"/photos/{'ab'[number % 2]}/{number}.png", picture(number))
    memory.pipe_file("/photos/top.png", b"")
    memory.pipe_file("/photos/notes.txt", b"")
    found = pieces("memory://photos", 3)
    assert [len(each.names) for each in found] == [3, 3, 2]
    rows = [row for piece in found for row in read(piece)]
    assert rows[0] == ("memory:///photos/a/0.png", "a", "8x8")
    assert [row[1] for row in rows] == [*"aaaabbb", None]
    assert rows[-1][2] == "empty file"
    memory.rm("/photos/a/0.png")
    assert read(found[0])[0][2] == "/photos/a/0.png"  # what the file system says
    with pytest.raises(ImagesError, match="has no images"):
        pieces("memory://nowhere", 3)
    with pytest.raises(ImagesError, match="cannot be reached"):
        pieces("nothing-of-this-kind://nowhere", 3)


def test_labels_are_names_or_numbers():
    assert labels_of(["b", 1, None, "z", 9, -1], ("a", "b")).tolist() == [1, 1, -1, -1, -1, -1]


def test_what_only_a_cluster_reads_is_refused_without(fitted, tmp_path):
    for spec in ("s3://bucket/photos", "shards/{000..127}.tar", "x/*.parquet"):
        result = oodcli("score", fitted / "digits.pt", spec, "-d", "msp")
        assert result.status == 1
        assert "'oodcli score … --engine ray'" in result.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--engine", "spark"], "expected ray, or ray://HOST:PORT"),
        (["--engine", "ray", "--shard", "1/2", "-o", "x.csv"], "leave out --shard"),
        (["--engine", "ray", "--timeout-per-image", "5", "-o", "x.csv"], "leave one of them out"),
        (["--engine", "ray"], "name one with -o"),
    ],
)
def test_what_does_not_go_with_an_engine(words, sentence, fitted):
    result = oodcli("score", fitted / "digits.pt", fitted / "test.npz", "-d", "msp", *words)
    assert result.status == 1
    assert sentence in result.err


def test_without_ray(fitted, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["score", fitted / "digits.pt", fitted / "test.npz", "-d", "msp", "-o"]
    result = oodcli(*words, tmp_path / "x.csv", "--engine", "ray")
    assert result.status == 1
    assert "pip install 'oodcli[ray]'" in result.err


def test_batches_are_ordered_and_counted_once(tmp_path, monkeypatch):
    """Those of pieces come in any order, and some twice."""
    from oodcli.jobs.kept import Stored, kept_work
    from oodcli.stages import ray as cluster

    def batch(piece: int, number: int, last: bool, value: int) -> Stored:
        return Stored(1, {"x": np.array([value])}, {cluster.PLACE: [piece, number, last]})

    made = [(2, 0, True, 5), (0, 1, True, 2), (0, 0, False, 1), (2, 0, True, 9), (1, 0, True, 3)]
    monkeypatch.setattr(cluster, "_connected", lambda address: nullcontext())
    monkeypatch.setattr(cluster, "_made", lambda job, left: (batch(*each) for each in made))
    found = []
    with kept_work(tmp_path / "x", {}, "oodcli") as kept:
        all_of_it = [Piece(number, "rows", "x", 0, 1) for number in range(3)]
        work = cluster.ClusterWork(kept, job=object(), pieces=all_of_it)
        blocks = work.blocks(
            *(0, 1, lambda stored: int(stored.arrays["x"][0]), lambda block: block),
            *(lambda start, stop: (), found.append),
        )
        assert list(blocks) == [1, 2, 3, 5]
        assert work.rows(0) == 4
        more = [*all_of_it, Piece(7, "rows", "x")]
        lost = cluster.ClusterWork(kept, job=object(), pieces=more)
        with pytest.raises(OodcliError, match=r"has lost 1 of 4 pieces: re-run the same command"):
            lost.blocks(0, 1, int, int, lambda start, stop: (), found.append)
