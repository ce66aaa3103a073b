"""Scores over a Ray cluster: those of one process, whatever is lost on the way."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from commands import oodcli
from pictures import picture, write_tar

pytest.importorskip("fsspec")


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
    words += ["-d", "pro", "-p", "pro.steps=2", "-d", "gaia-z", "-d", "odin"]
    words += ["-p", "odin.where=largest"]
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
        from oodcli.jobs.kept import Kept
        from oodcli.stages import ray as ours
        ours.BATCHES = 2
        other = cluster.add_node(**node())
        write = Kept.write
        pieces = set()
        def losing(self, number, batch):
            global other
            write(self, number, batch)
            pieces.add(number[0])
            if len(pieces) == 5 and other is not None:
                cluster.remove_node(other)
                other = None
                print("=> lost", file=sys.__stdout__, flush=True)
            if len(pieces) == 20:
                pieces.update(range(100))
                raise KeyboardInterrupt
        Kept.write = losing
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
