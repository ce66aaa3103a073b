"""Nothing is fetched while a command runs, and nothing is written as a pickle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from pipeline import ROOT, prepared, step

STEPS = (
    step("--help"),
    step("detectors"),
    step("inspect net.pt --write-card --force"),
    step("invert net.pt --per-class 2 --steps 2 --no-compile -o v.h5"),
    step("extract net.pt v.h5 -o v.features.h5"),
    step("inspect --verify v.features.h5 net.pt"),
    step("extract net.pt id.npz --record all -o id.h5"),
    step("fit v.features.h5 -d c2ir -d c2ir-z -o virtual"),
    step("fit id.h5 -d knn -d react -d energy -o real"),
    step("score id.h5 -d energy -d real/knn.safetensors -o id.csv"),
    step("score net.pt photos -d energy -d odin -d real/knn.safetensors -o p.csv", status=3),
    step("score net.pt photos -d virtual/c2ir-z.safetensors -o p.jsonl", status=3),
    step("score net.pt noise:uniform?n=9 -d msp -o n.parquet"),
    step("evaluate --id id.csv --ood photos=p.csv -d energy -d knn --resamples 9 -o report"),
    step("demo"),
)
"""Of the demo its own part: what it runs are the commands above."""

FETCHES = step("score net.pt torchvision:MNIST?root=data&download=true -d msp", status=1)
"""The one way to the network: a user says so."""

RUN = """
import json, os, pickle, sys
import jinja2  # makes a constant by pickle when it is imported

reached, pickled = [], []

def watch(event, args):
    kind, _, what = event.partition(".")
    away = kind == "socket" and what not in ("__new__", "gethostname")
    outside = what == "__new__" and args[1] in (2, 10)  # IPv4, IPv6
    if away or outside or kind in ("urllib", "http", "ftplib", "smtplib"):
        reached.append(event)
        raise OSError("there is no network")

def caller():
    frame = sys._getframe(2)
    while frame is not None:
        _, found, name = frame.f_code.co_filename.rpartition("/oodcli/")
        if found:
            return name
        frame = frame.f_back
    return "elsewhere"

def watched(function):
    def call(*args, **settings):
        pickled.append(caller())
        return function(*args, **settings)
    return call

class Pickler(pickle.Pickler):
    def dump(self, value):
        pickled.append(caller())
        return super().dump(value)

sys.addaudithook(watch)
pickle.dump, pickle.dumps, pickle.Pickler = watched(pickle.dump), watched(pickle.dumps), Pickler

from commands import oodcli
import oodcli.stages.demo
oodcli.stages.demo.EPOCHS, oodcli.stages.demo.photograph_crops = 1, lambda folder: 0
oodcli.stages.demo._commands = lambda *_: []

def run(status, words):
    from commands import oodcli
    result = oodcli(*words)
    if result.status != status:
        sys.exit(f"{words}: {result}")

steps, fetches = json.load(sys.stdin)
for each in steps:
    run(*each)
found = {"reached": list(reached), "pickled": list(pickled)}
run(*fetches)
found["fetched"] = list(reached)
import io, numpy, torch
for write in (
    lambda: torch.save({"a": torch.ones(1)}, io.BytesIO()),
    lambda: numpy.save(io.BytesIO(), numpy.array([{}])),
    lambda: pickle.dumps(1),
):
    pickled.clear()
    write()
    found.setdefault("noticed", []).append(bool(pickled))
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("supply") / "files")


@pytest.fixture(scope="module")
def before(folder) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def seen(folder, before) -> dict[str, list[object]]:
    """What a process noticed that ran every command."""
    folders = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": folders},
        input=json.dumps((STEPS, FETCHES)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[object]] = json.loads(done.stdout)
    return found


def test_no_network(seen):
    assert seen["reached"] == []


def test_a_fetch_would_have_been_noticed(seen):
    assert seen["fetched"] != []


def test_no_pickle_is_made(seen):
    assert set(seen["pickled"]) <= {
        "images/decoding.py"
    }  # to processes that decode images: no files


def test_a_pickle_would_have_been_noticed(seen):
    assert seen["noticed"] == [True] * 3


def pickles(path: Path) -> list[str]:
    """Where in a file there is one."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
    else:
        parts = {path.name: path.read_bytes()}
    return [
        name
        for name, data in parts.items()
        if data[:2] in {b"\x80" + bytes([protocol]) for protocol in range(2, 6)}
        or (data.startswith(b"\x93NUMPY") and b"'|O'" in data[:128])
    ]


def test_no_file_is_a_pickle(folder, before, seen):
    made = {path for path in folder.rglob("*") if path.is_file()} - before
    assert {path.suffix for path in made} >= {
        *(".h5", ".png", ".safetensors", ".csv", ".jsonl", ".parquet", ".json", ".md", ".toml"),
        ".npz",
    }
    found = {path.name: pickles(path) for path in made}
    assert {name for name, inside in found.items() if inside} == set()
