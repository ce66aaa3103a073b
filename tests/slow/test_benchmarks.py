"""``python -m benchmarks``: its helpers, its tables, and one run from end to end."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import oodcli

import benchmarks.__main__ as command
from benchmarks import parts, stream
from benchmarks.bench_growth import Line
from benchmarks.measure import in_turns, peak, pinned, ratio
from oodcli.metrics import auroc, tnr95
from oodcli.stages.demo import CARD

ROOT = Path(__file__).resolve().parents[2]


def test_all_take_turns_and_the_warm_up_does_not_count():
    made = []
    times = in_turns({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, 2, warm_up=1)
    assert made == ["a", "b"] * 3
    assert {name: len(spent) for name, spent in times.items()} == {"a": 2, "b": 2}
    assert all(second >= 0 for spent in times.values() for second in spent)


def test_a_ratio_is_the_median_of_paired_rounds():
    # A machine that is ten times as slow in the last round; the ratio of medians would be 1.
    assert ratio([2, 4, 90], [1, 4, 30]) == 2
    with pytest.raises(ValueError, match="argument"):
        ratio([1, 2], [1])


def test_peak_memory_is_the_command_s_own():
    seconds, idle = peak([sys.executable, "-c", ""])
    assert seconds > 0
    assert 1 < idle < 60  # not that of this process, which has imported torch
    _, busy = peak([sys.executable, "-c", "bytearray(b'x' * 100_000_000)"])
    assert busy > idle + 90
    with pytest.raises(SystemExit, match="no such thing"):
        peak([sys.executable, "-c", "import sys; sys.exit('no such thing')"])


def test_threads_are_pinned(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert pinned(3)["OMP_NUM_THREADS"] == "3"


def test_a_line_through_points():
    at_zero, slope, r_squared = Line("seconds", "image", ((1, 5), (2, 7), (4, 11))).fitted()
    assert (at_zero, slope, r_squared) == pytest.approx((3, 2, 1))
    # By hand: slope 1/2, so that of a spread of 2 a residual sum of 3/2 stays.
    assert Line("", "", ((0, 0), (1, 2), (2, 1))).fitted() == pytest.approx((0.5, 0.5, 0.25))


REPORT = {
    "machine": {"processor": "Z80", "logical_cores": 1, "gpu": "", "instructions": ["ld", "jp"]},
    "date": "1976-07-01",
    "checkpoint": "digits",
    "threads": 1,
    "command": "python -m benchmarks",
    "benchmarks": {
        "some": {
            "batch_size": 128,
            "results": {
                "bare": {"images_per_second": 12345.6, "ratio": 1},
                "ours": {"ratio": 0.81234, "peak_mb": 9},
            },
            "points": {"a line": [[1, 2]]},
            "seconds": 1.5,
        },
        "other": {"error": "exit status 2\nno such option", "seconds": 0.1},
    },
}


def test_markdown_has_a_table_for_each():
    assert command.markdown(REPORT).split("\n") == [
        "# Benchmarks",
        "",
        "processor: Z80; logical cores: 1; instructions: ld, jp",
        "",
        "date: 1976-07-01; checkpoint: digits; threads: 1",
        "",
        "`python -m benchmarks`",
        "",
        "## some",
        "",
        "batch size: 128; seconds: 1.5",
        "",
        "|  | images per second | ratio | peak mb |",
        "| --- | ---: | ---: | ---: |",
        "| bare | 12,346 | 1 |  |",
        "| ours |  | 0.8123 | 9 |",
        "",
        "## other",
        "",
        "It failed:",
        "",
        "```",
        "exit status 2",
        "no such option",
        "```",
        "",
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.00001234, "1.234e-05"), (1_074_000, "1,074,000"), (99.999, "100"), (None, ""), (2, "2")],
)
def test_cells(number, text):
    assert command.cell(number) == text


def test_a_failure_is_reported_and_the_others_go_on(tmp_path, monkeypatch, trained, capsys):
    monkeypatch.setattr(
        command,
        "BENCHMARKS",
        {"no-such": command.Benchmark(()), "startup": command.Benchmark(("CHECKPOINT",))},
    )
    words = [str(trained / "digits.pt"), "-o", str(tmp_path), "--threads", "1"]
    ran = []

    def run(words, **settings):
        ran.append((words, settings["env"]["OMP_NUM_THREADS"]))
        failed = words[2].endswith("no-such")
        found = json.dumps({"results": {"import typer": {"best_s": 0.1}}})
        return subprocess.CompletedProcess(words, int(failed), "" if failed else found, "gone\n")

    monkeypatch.setattr(command.subprocess, "run", run)
    assert command.main([*words, "--", "--rounds", "1"]) == 1
    checkpoint = str((trained / "digits.pt").resolve())
    assert ran == [
        ([sys.executable, "-m", "benchmarks.bench_no-such", "--rounds", "1"], "1"),
        ([sys.executable, "-m", "benchmarks.bench_startup", checkpoint, "--rounds", "1"], "1"),
    ]
    report = json.loads((tmp_path / "benchmarks.json").read_text())
    assert report["command"].endswith("--threads 1 -- --rounds 1")
    assert report["machine"]["torch"]
    assert report["benchmarks"]["no-such"]["error"] == "exit status 1\ngone"
    assert report["benchmarks"]["startup"]["results"] == {"import typer": {"best_s": 0.1}}
    assert capsys.readouterr().out == (tmp_path / "benchmarks.md").read_text()
    assert command.main([*words, "--only", "startup"]) == 0


def test_what_prints_no_object_has_failed(monkeypatch, tmp_path):
    def run(words, **_):
        return subprocess.CompletedProcess(words, 0, "[1]", "")

    monkeypatch.setattr(command.subprocess, "run", run)
    assert "error" in command.run("startup", tmp_path, 1, full=False)


def test_without_a_checkpoint_the_demo_s_is_trained(monkeypatch):
    monkeypatch.setattr("oodcli.stages.demo.train", lambda *_: {"weight": torch.ones(2)})
    with command.checkpoint_of(None) as path:
        assert torch.load(path)["weight"].sum() == 2
        assert path.with_suffix(".toml").read_text() == CARD
    assert not path.exists()


@pytest.mark.slow
def test_memory_from_end_to_end(trained, tmp_path):
    words = ["--only", "memory", "-o", tmp_path, "--threads", "1", "--", "--rows", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", trained / "digits.pt", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "benchmarks.json").read_text())["benchmarks"]["memory"]
    assert list(found["results"]) == [
        f"{what}, 1 rows" for what in ("score noise", "extract noise", "score the cache")
    ]
    assert all(row["peak_mb"] > 100 and row["seconds"] > 0 for row in found["results"].values())
    assert "| score the cache, 1 rows |" in (tmp_path / "benchmarks.md").read_text()


def test_the_gains_of_a_stream(trained, tmp_path, capsys):
    for name, images in (("id", trained / "test.npz"), ("blobs", "noise:blob?n=90")):
        words = ("extract", trained / "digits.pt", images, "-o", tmp_path / f"{name}.h5")
        assert oodcli(*words).status == 0
    words = [str(tmp_path / "id.h5"), f"blobs={tmp_path / 'blobs.h5'}", "-d", "energy", "-d", "msp"]
    few = ["--rows", "300", "--share", "0.1", "0.3", "--draws", "2"]
    assert stream.main([*words, *few]) == 0
    table = capsys.readouterr().out.splitlines()[-4:]
    found = [[cell.strip(" |") for cell in line.split("|")[1:-1]] for line in table]
    shares = [(share, name) for share in ("0.1", "0.3") for name in ("`energy`", "`msp`")]
    assert [(row[0], row[1]) for row in found] == shares
    known, ood = (
        stream.rows_of(tmp_path / f"{name}.h5", ["energy", "msp"], tmp_path)
        for name in ("id", "blobs")
    )
    for row, (share, name) in zip(found, shares, strict=True):
        jobs = [stream.drawn(known, ood, 300, float(share), seed) for seed in range(2)]
        count = round(300 * float(share))
        plain = [job.scores[name.strip("`")] for job in jobs]
        mean = sum(100 * tnr95(each[:-count], each[-count:]) for each in plain) / 2
        assert float(row[2]) == pytest.approx(mean, abs=0.051)
        assert row[4] == f"{row[3]} (blobs)"  # the only set is the worst
    assert len({*found[0][3:4], *found[2][3:4]}) == 2
    with pytest.raises(SystemExit, match="90 rows, but a job needs 150: lower --rows"):
        stream.main([*words, "--rows", "300", "--share", "0.5"])


def test_the_parts_of_a_sum(trained, tmp_path, capsys):
    sets = {"id": trained / "test.npz", "blobs": "noise:blob?n=90", "noise": "noise:uniform?n=50"}
    for name, images in sets.items():
        words = ("extract", trained / "digits.pt", images, "-o", tmp_path / f"{name}.h5")
        assert oodcli(*words).status == 0
    words = ("fit", tmp_path / "id.h5", "-d", "c2ir-peak", "-d", "mds", "-o", tmp_path)
    assert oodcli(*words, "--noise", tmp_path / "noise.h5").status == 0
    artefact = tmp_path / "c2ir-peak.safetensors"
    given = [str(tmp_path / "id.h5"), f"blobs={tmp_path / 'blobs.h5'}"]
    assert parts.main([str(artefact), *given]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    rows = {cells[1].strip(): cells[2].strip() for cells in (line.split("|") for line in lines)}
    assert {"energy", "c2ir-z", "nci", "without nci", "sum"} <= rows.keys()
    for detector, row in ((artefact, "sum"), ("energy", "energy")):
        scores = []
        for name in ("id", "blobs"):
            words = ("score", tmp_path / f"{name}.h5", "-d", detector, "-o", tmp_path / "s.csv")
            assert oodcli(*words, "--force").status == 0
            with (tmp_path / "s.csv").open(newline="") as file:
                found = list(csv.DictReader(file))
            scores.append([float(each[artefact.stem if row == "sum" else row]) for each in found])
        # A score of float32 may tie where the logarithm of float64 does not.
        auc, tnr = map(float, rows[row].split("/"))
        assert auc == pytest.approx(100 * auroc(*scores), abs=0.06)
        assert tnr == pytest.approx(100 * tnr95(*scores), abs=0.06)
    with pytest.raises(SystemExit, match="mds is no sum of parts"):
        parts.main([str(tmp_path / "mds.safetensors"), *given])
