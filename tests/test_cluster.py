"""Scores over a Ray cluster: those of one process, whatever is lost on the way."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from commands import oodcli
from PIL import Image

from oodcli.errors import ImagesError
from oodcli.images.pieces import Piece, chunks, is_remote, labels_of, pieces, sizes
from oodcli.images.pixels import UnreadableError

pytest.importorskip("fsspec")


def picture(number: int, kind: str = "PNG") -> bytes:
    draws = np.random.default_rng(number)
    stream = io.BytesIO()
    Image.fromarray(draws.integers(0, 256, (8, 8), dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


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


# ------------------------------------------------------------------------------------- the pieces


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
        "the row has no bytes of an image",
    ]
    nested = pyarrow.table({"image": [{"bytes": cells[0], "path": "a.png"}], "label": ["cat"]})
    pyarrow.parquet.write_table(nested, tmp_path / "nested.parquet")
    (piece,) = pieces(str(tmp_path / "*ed.parquet"), 5)
    assert read(piece) == [(f"{tmp_path}/nested.parquet#0/a.png", "cat", "8x8")]
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
    # Where an image is larger than what fits in the memory, they are read one by one.
    images = pyarrow.parquet.read_metadata(place).row_group(0).column(0)
    monkeypatch.setattr("oodcli.images.pieces.LARGEST_MEMBER", images.total_uncompressed_size - 1)
    assert len(read(found[0])) == 4
    other = pyarrow.table({"text": ["a"]})
    pyarrow.parquet.write_table(other, tmp_path / "other.parquet")
    with pytest.raises(ImagesError, match="has the columns text, none of which is image"):
        read(pieces(str(tmp_path / "other.parquet"), 5)[0])
    (tmp_path / "other.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ImagesError, match="is not parquet, or damaged"):
        pieces(str(tmp_path / "other.parquet"), 5)


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
    with pytest.raises(ImagesError, match="is out of reach"):
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


# ------------------------------------------------------------------------------------ the cluster

BEGIN = """
import os, sys
from ray.cluster_utils import Cluster

def node(**more):
    return dict(num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, **more)

cluster = Cluster(initialize_head=True, head_node_args=node())
print("=> up", flush=True)
os.environ["RAY_ADDRESS"] = cluster.address
def run(*words):
    from oodcli.cli import main
    sys.argv = ["oodcli", *map(str, words)]
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0
"""


END = """
print("=> end", flush=True)
"""


def in_a_cluster(script: str, folder: Path) -> str:
    """Runs a script in a process of its own, which has a cluster; the lines that it prints after
    an arrow. Skips where no cluster can be started."""
    pytest.importorskip("ray")
    path = folder / "script.py"
    path.write_text(BEGIN + textwrap.dedent(script) + END, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, path],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_DISABLE_IMPORT_WARNING": "1"},
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("=> ")]
    if "=> up" not in lines:
        pytest.skip(f"no cluster can be started: {result.stderr[-500:]}")
    # Not the status: Ray's threads may break something while they end.
    assert lines[-1] == "=> end", f"status {result.returncode}: {result.stderr[-5000:]}"
    return " ".join(line.removeprefix("=> ") for line in lines[1:-1])


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """70 images in folders, of which two cannot be read; some as shards, and as Parquet."""
    import pyarrow
    import pyarrow.parquet

    place = tmp_path_factory.mktemp("images")
    encoded = [b"no image" if number in (5, 60) else picture(number) for number in range(70)]
    for number, data in enumerate(encoded):
        path = place / "photos" / str(number % 10) / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for shard in range(3):
        members = {}
        for number in range(shard * 10, shard * 10 + 10):
            members |= {f"{number:02}.png": encoded[number], f"{number:02}.cls": b"3"}
        write_tar(place / f"s{shard}.tar", members)
    table = pyarrow.table({"image": encoded[:20], "label": list(range(10)) * 2})
    pyarrow.parquet.write_table(table, place / "x.parquet", row_group_size=7)
    return place


def test_scores_are_those_of_one_process(fitted, images, tmp_path, monkeypatch):
    words = ["-d", "energy", "-d", str(fitted / "fitted" / "c2ir-z.safetensors")]
    words += ["--batch-size", "4", "--mirror", "--explain", "--threshold", "energy=-5"]
    monkeypatch.chdir(images)  # which is not where the cluster's processes are
    checkpoint, photos = str(fitted / "digits.pt"), "photos"
    result = oodcli("score", checkpoint, photos, *words, "-o", tmp_path / "one.csv")
    assert result.status == 3, result.err
    more = {"npz": str(fitted / "test.npz"), "noise": "noise:blob?n=50"}
    for name, spec in more.items():
        oodcli("score", checkpoint, spec, "-d", "msp", "-o", tmp_path / f"{name}1.csv")
    shards, parquet = str(images / "s{0..2}.tar"), str(images / "x.parquet")
    script = f"""
        more = {more!r}
        os.chdir({str(images)!r})
        for name, images, words in (
            ("many", {photos!r}, {words!r}),
            *((name + "2", spec, ["-d", "msp"]) for name, spec in more.items()),
            ("tar", {shards!r}, ["-d", "energy", "--batch-size", "4"]),
            ("parquet", {parquet!r}, ["-d", "energy", "--batch-size", "4"]),
            ("lost", "s3.tar,", ["-d", "energy"]),
        ):
            print("=>", name, run(
                "score", {checkpoint!r}, images, *words, "--engine", "ray",
                "-o", {str(tmp_path)!r} + "/" + name + ".csv"
            ), flush=True)
        os.chdir({str(tmp_path)!r})
        open("bad.tar", "wb").write(open({str(images / "s0.tar")!r}, "rb").read()[:2000])
        open("bad2.tar", "wb").write(b"x")
        print("=> bad", run(
            "score", {checkpoint!r}, "bad*.tar", "-d", "msp", "--engine", "ray", "-o", "bad.csv"
        ), flush=True)
    """
    printed = in_a_cluster(script, tmp_path).split()
    assert dict(zip(printed[::2], map(int, printed[1::2]), strict=True)) == {
        "many": 3,
        "npz2": 0,
        "noise2": 0,
        "tar": 3,
        "parquet": 3,
        "lost": 1,
        "bad": 1,
    }
    assert (tmp_path / "many.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    for name in more:
        one, two = (tmp_path / f"{name}{n}.csv" for n in (1, 2))
        assert one.read_bytes() == two.read_bytes()
    oodcli("score", checkpoint, photos, "-d", "energy", "--batch-size", 4, "-o", tmp_path / "e.csv")
    rows = (tmp_path / "e.csv").read_text(encoding="utf-8").splitlines()
    energy = {line.split(",")[0].rpartition("/")[2]: line.split(",") for line in rows}
    for name, count in (("tar", 30), ("parquet", 20)):
        found = (tmp_path / f"{name}.csv").read_text(encoding="utf-8").splitlines()[1:]
        assert len(found) == count
        for number, line in enumerate(found):
            path, label, predicted, _, score, error = line.split(",", 5)
            mine = energy[f"{number:02}.png"]
            assert path.endswith(f"/{number:02}.png" if name == "tar" else f"x.parquet#{number}")
            assert label == ("3" if name == "tar" else str(number % 10))
            assert bool(error) == (number == 5)
            if not error:
                assert float(score) == pytest.approx(float(mine[4]), rel=1e-5)
                assert predicted == mine[2]
    made = json.loads((tmp_path / "tar.csv.json").read_text(encoding="utf-8"))
    assert made["source"] == shards
    assert made["device"] == "ray"
    assert not list(tmp_path.glob("bad.csv*"))


def test_a_host_is_lost_in_the_middle(fitted, images, tmp_path):
    """Every row is there, once; so it is when the job itself is interrupted and given again."""
    checkpoint, photos = str(fitted / "digits.pt"), str(images / "photos")
    words = ["-d", "energy", "--batch-size", "1"]
    result = oodcli("score", checkpoint, photos, *words, "-o", tmp_path / "one.csv")
    assert result.status == 3, result.err
    script = f"""
        from oodcli.files.journal import Journal
        from oodcli.stages import ray as ours
        ours.BATCHES = 2
        other = cluster.add_node(**node())
        append = Journal.append
        pieces = set()
        def losing(self, record):
            global other
            append(self, record)
            pieces.add(record.words["place"][0])
            if len(pieces) == 5 and other is not None:
                cluster.remove_node(other)
                other = None
                print("=> lost", file=sys.__stdout__, flush=True)
            if len(pieces) == 20:
                pieces.update(range(100))
                raise KeyboardInterrupt
        Journal.append = losing
        words = ["score", {checkpoint!r}, {photos!r}, *{words!r}, "--engine", "ray"]
        words += ["-o", "many.csv"]
        print("=>", run(*words), flush=True)
        print("=>", run(*words), flush=True)
    """
    printed = in_a_cluster(script, tmp_path)
    assert printed.split() == ["lost", "130", "3"]
    assert (tmp_path / "many.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.fixture
def head(tmp_path):
    """The ray:// address of a cluster in processes of its own, which asks for no token."""
    pytest.importorskip("grpc")
    pytest.importorskip("ray")
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    words = ["start", "--head", "--block", "--num-cpus", "2", "--include-dashboard", "false"]
    words += ["--port", str(ports[0]), "--ray-client-server-port", str(ports[1])]
    words += ["--min-worker-port", "0", "--max-worker-port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", *words, "--disable-usage-stats"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"},
    )
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            pytest.skip(f"no cluster can be started: {''.join(said)[-500:]}")
        yield f"ray://127.0.0.1:{ports[1]}"
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.slow
def test_a_cluster_from_outside(head, fitted, images, tmp_path):
    words = ["score", fitted / "digits.pt", images / "photos", "-d", "energy", "-o"]
    one = oodcli(*words, tmp_path / "one.csv")
    for _ in range(4):  # a server that has just started, on a busy machine, refuses some
        result = subprocess.run(
            [sys.executable, "-m", "oodcli", *words, tmp_path / "many.csv", "--engine", head],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"},
        )
        if "the Ray cluster is out of reach" not in result.stderr:
            break
    assert result.returncode == one.status == 3, result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "many.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


@pytest.mark.slow
def test_a_cluster_out_of_reach(fitted, tmp_path):
    pytest.importorskip("ray")
    words = ["score", fitted / "digits.pt", fitted / "test.npz", "-d", "msp", "-o"]
    result = oodcli(*words, tmp_path / "x.csv", "--engine", "ray://127.0.0.1:1")
    assert result.status == 1
    assert "the Ray cluster is out of reach" in result.err
    assert "RAY_AUTH_MODE=token" in result.err
    assert os.listdir(tmp_path) == []


def test_without_ray(fitted, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["score", fitted / "digits.pt", fitted / "test.npz", "-d", "msp", "-o"]
    result = oodcli(*words, tmp_path / "x.csv", "--engine", "ray")
    assert result.status == 1
    assert "pip install 'oodcli[ray]'" in result.err


def test_records_are_ordered_and_counted_once(tmp_path):
    from oodcli.files.journal import Record, journal

    def record(place: tuple[int, int], value: int) -> Record:
        return Record(1, {"x": np.array([value])}, {"place": list(place)})

    with journal(tmp_path / "x", {}, "oodcli") as kept:
        for place, value in (((2, 0), 5), ((0, 1), 2), ((0, 0), 1), ((2, 0), 9), ((1, 0), 3)):
            kept.append(record(place, value))
        order = kept.kept_by(
            lambda each: tuple(each.words["place"]), lambda each: int(each.arrays["x"][0])
        )
        assert list(order) == [1, 2, 3, 5]
