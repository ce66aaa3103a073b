"""The same command makes the same bytes; a score belongs to its image alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from pathlib import Path

import pytest
from commands import oodcli
from pipeline import RETRAINED, ROOT, prepared, step

from oodcli import detectors
from oodcli.files.scores import read_scores

VIRTUAL = ("c2ir", "c2ir-z")
NOISE = ("1c-sum",)
POOL = ("c2ir-peak", "duo", "trio")
PLAIN = tuple(
    name
    for name in detectors.names()
    if not (detectors.get(name).fitted or name in (*RETRAINED, "joint-energy", "mc-dropout"))
)
REAL = tuple(
    name
    for name in detectors.names()
    if detectors.get(name).fitted and name not in (*VIRTUAL, *NOISE, *POOL)
)
ARTEFACTS = tuple(
    f"{folder}/{name}.safetensors"
    for folder, names in (("virtual", VIRTUAL), ("noise", NOISE), ("pool", POOL), ("real", REAL))
    for name in names
)


Scores = dict[str, dict[str, float]]
"""Detector → name of the image → score."""


def choose(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(word for name in names for word in ("-d", name))


EVERY = choose((*PLAIN, *ARTEFACTS))
FEW = choose(("energy", "virtual/c2ir-z.safetensors", "real/knn.safetensors"))


PIPELINE = (
    step("invert net.pt --per-class 4 --steps 3 --no-compile --batch-size 5 -o v.h5"),
    step("extract net.pt v.h5 -o v.features.h5"),
    step("extract net.pt id.npz --record all -o id.h5"),
    step("extract net.pt noise:blob?n=40 --record all -o blobs.h5"),
    step("extract net.pt noise:uniform?n=50 -o noise.h5"),
    step("extract net.pt photos --record all --mirror --batch-size 6 -o photos.h5", status=3),
    step("fit v.features.h5 -o virtual", *choose(VIRTUAL)),
    step("fit noise.h5 -o noise", *choose(NOISE)),
    step("fit v.features.h5 --noise noise.h5 --calibrate id.h5 -o pool", *choose(POOL)),
    step("fit id.h5 --ood blobs.h5 -p lsgm.components=4 -p lsgm.pca=8 -o real", *choose(REAL)),
    step("score id.h5 -o id.csv", *EVERY),
    step("score net.pt photos --batch-size 6 -o photos.csv", *EVERY, status=3),
    step("score net.pt photos --mirror --explain -o mirror.jsonl", *FEW, status=3),
    step("score net.pt photos --threshold split -o photos.parquet", *FEW, status=3),
    step("evaluate --id id.csv --ood p=photos.csv -d energy -d knn --resamples 20 -o report"),
)

RUN = """
import json, os, sys
workers = int(sys.argv[1])
os.sched_getaffinity = lambda process: set(range(workers))  # as many threads read images
from commands import oodcli
for status, words in json.load(sys.stdin):
    result = oodcli(*words)
    if result.status != status:
        sys.exit(f"{words}: {result}")
"""


def pipeline(folder: Path, workers: int) -> Path:
    """A file of every kind, by commands in a process of their own."""
    folders = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(workers)],
        cwd=prepared(folder),
        env=os.environ | {"PYTHONHASHSEED": str(workers), "PYTHONPATH": folders},
        input=json.dumps(PIPELINE),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def twice(tmp_path_factory) -> tuple[Path, Path]:
    """Two folders of files by the same commands, whose processes had other numbers of threads that
    read images, and other hashes of strings."""
    folder = tmp_path_factory.mktemp("determinism")
    with ThreadPoolExecutor() as pool:
        one, other = (pool.submit(pipeline, folder / str(count), count) for count in (1, 8))
    return one.result(), other.result()


@pytest.fixture(scope="module")
def made(twice) -> Path:
    return twice[0]


def test_the_same_bytes(twice):
    one, other = twice
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert {str(name) for name in names} >= {
        *("v.h5", "v.png", "v.features.h5", "id.h5", "photos.h5"),
        *ARTEFACTS,
        *("photos.csv", "mirror.jsonl", "photos.parquet"),
        *("report/metrics.csv", "report/metrics.json"),
    }
    assert {name.suffix for name in names if name.parts[0] == "report"} >= {".md", ".png"}
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def scores(folder: Path, *words: object) -> Scores:
    """Of the images that can be read."""
    with chdir(folder):
        result = oodcli("score", *words, "-o", "again.csv", "--force")
    assert result.status == 3, result.err
    found = read_scores(folder / "again.csv")
    rows = zip(found.paths, found.readable, strict=True)
    names = [Path(path).name for path, readable in rows if readable]
    return {
        name: dict(zip(names, values.tolist(), strict=True))
        for name, values in found.detectors.items()
    }


@pytest.fixture(scope="module")
def cached(made) -> Scores:
    """From a cache whose images came in batches of six."""
    return scores(made, "photos.h5", *EVERY)


def unlike(found: Scores, expected: Scores) -> dict[str, float]:
    """Detector → the largest difference where it is above 1e-5 of the range of its scores. The
    network works in float32, and rounds batches of other sizes otherwise: by 1e-7 of a logit, of
    which an indicator that is a difference of large numbers makes up to 5e-6 of its range."""
    assert found.keys() == expected.keys()
    gaps = {}
    for name, values in expected.items():
        assert found[name].keys() == values.keys()
        largest = max(abs(found[name][image] - values[image]) for image in values)
        gaps[name] = largest / (max(values.values()) - min(values.values()))
    return {name: value for name, value in gaps.items() if value > 1e-5}


@pytest.mark.parametrize("size", [1, 7, 64])
def test_scores_do_not_depend_on_batches(made, cached, size):
    found = scores(made, "net.pt", "photos", "--batch-size", size, *EVERY)
    assert len(found) == len(PLAIN) + len(ARTEFACTS)
    assert unlike(found, cached) == {}


def test_scores_do_not_depend_on_the_order(made, cached):
    paths = sorted(map(str, (made / "photos").iterdir()), reverse=True)
    (made / "reversed.txt").write_text("\n".join(paths))
    assert unlike(scores(made, "net.pt", "reversed.txt", *EVERY), cached) == {}


@pytest.mark.parametrize("name", RETRAINED)
def test_the_same_of_heads_of_their_own(made, name):
    with chdir(made):
        words = ("extract", f"{name}.pt", "photos", "--record", "all", "--force", "-o", "x.h5")
        assert oodcli(*words, "--batch-size", 6).status == 3
    expected = scores(made, "x.h5", "-d", name)
    for size in (1, 7, 64):
        found = scores(made, f"{name}.pt", "photos", "-d", name, "--batch-size", size)
        assert unlike(found, expected) == {}
