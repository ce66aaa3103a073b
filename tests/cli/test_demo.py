"""``oodcli demo``, and what the console makes of its lines."""

from __future__ import annotations

import csv
import io
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import oodcli

from oodcli import api
from oodcli.cli import console
from oodcli.errors import OodcliError
from oodcli.stages import demo


class StoppedError(Exception):
    """By the program that watches."""


@pytest.mark.parametrize(("fault", "status"), [(KeyboardInterrupt, 130), (SystemExit(7), 7)])
def test_it_stops_with_the_command_that_stopped(fault, status, tmp_path, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(demo, "write_data", lambda folder, progress: (0, 0))
    monkeypatch.setattr("oodcli.networks.load.load_classifier", stop)
    result = oodcli("demo", "-o", tmp_path / "demo")
    assert result.status == status
    assert result.err.count("$ oodcli") == 1


def test_it_reports_each_command_and_stops_where_it_is_told(tmp_path, monkeypatch, caplog):
    """From Python, with the first command alone: the others take half a minute."""
    monkeypatch.setattr(demo, "inspect", lambda model: {"checkpoint": str(model.path)})
    monkeypatch.setattr(demo, "write_data", lambda folder, progress: (1, 2))
    caplog.set_level(logging.INFO, "oodcli")
    told, done = [], []

    def stop(step: demo.DemoStep) -> None:
        done.append(step)
        raise StoppedError

    with pytest.raises(StoppedError):
        api.demo(tmp_path / "demo", progress=lambda *far: told.append(far), finished=stop)
    checkpoint = str(tmp_path / "demo" / "digits.safetensors")
    assert done == [
        demo.DemoStep(
            "What is this checkpoint?", ("inspect", checkpoint), {"checkpoint": checkpoint}
        )
    ]
    assert told == [(0, 8)]
    assert caplog.messages[-1] == f"\n# What is this checkpoint?\n$ oodcli inspect {checkpoint}"
    with pytest.raises(OodcliError, match="demo exists"):
        api.demo(str(tmp_path / "demo"))


def test_its_checkpoint_is_the_same_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr("oodcli.stages.demo.train", lambda *_: {"weight": torch.ones(2)})
    monkeypatch.setattr("oodcli.stages.demo.photograph_crops", lambda folder: 0)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    demo.write_data(tmp_path / "a", lambda count: None)
    demo.write_data(tmp_path / "b", lambda count: None)
    one, other = (tmp_path / name / "digits.safetensors" for name in "ab")
    assert one.read_bytes() == other.read_bytes()


FILES = {
    "digits.safetensors",
    "digits.toml",
    "digits-test.npz",
    "digits.safetensors.oodcli",
    "photographs",
    "photographs.html",
    "report",
    *(f"{name}.csv" for name in ("digits", "photographs", "noise", "blobs")),
    *(f"{name}.csv.json" for name in ("digits", "photographs", "noise", "blobs")),
}
PREPARED = ("invert", "extract", "invert", "extract", "extract", "fit", "score")
"""What prepare prints: its steps, and the next command."""
COMMANDS = ("inspect", "prepare", *PREPARED, *["score"] * 4, "show", "evaluate")


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """As a user runs it, its output in pipes."""
    return subprocess.run(
        [sys.executable, "-m", "oodcli", "demo", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Files in which no time or command line stands: that has --force the second time."""
    without = (".json", ".html")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in without
    }


@pytest.mark.slow
def test_all_of_it(tmp_path, monkeypatch, capfd):
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "oodcli-demo"
    assert os.listdir(tmp_path) == ["oodcli-demo"]
    assert set(os.listdir(folder)) == FILES
    assert (folder / "digits.safetensors.oodcli" / "prepared.json").exists()
    assert {"report.html", "metrics.csv", "roc.png"} <= set(os.listdir(folder / "report"))
    assert len(list((folder / "photographs").glob("*/*.png"))) == 120

    # On standard error the story, with commands that can be repeated; on standard output results.
    commands = [shlex.split(line[2:]) for line in done.stderr.splitlines() if line[:2] == "$ "]
    assert tuple(words[1] for words in commands) == COMMANDS
    assert done.stderr.startswith("Training a small network on 1200 of scikit-learn's digits.\n")
    assert "note: sub-folders (china, flower) are not the network's classes" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Everything is in oodcli-demo: ")
    assert "\x1b" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["checkpoint", "oodcli-demo/digits.safetensors"]
    table = lines[next(k for k, line in enumerate(lines) if line.startswith("percent")) :]
    means = {words[0]: float(words[-2]) for words in map(str.split, table[4:9])}
    assert list(means) == list(demo.DETECTORS)
    assert min(means["c2ir-peak"], means["c2ir-z"]) > 2 + max(means["msp"], means["energy"])
    assert re.match(r"Accuracy on the 597 labelled ID rows: 9[5-9]\.\d\d %\.", table[9])
    for name, count in (("digits", 597), ("photographs", 120), ("noise", 500), ("blobs", 500)):
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert len(rows) == count
        assert not any(row["error"] for row in rows)
        flagged = sum(row["c2ir-peak.ood"] == "1" for row in rows) / count
        assert (flagged < 0.15) == (name == "digits")

    # In the same place it refuses, and with --force makes the same again.
    before = contents(folder)
    refused = run(tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        "oodcli: oodcli-demo exists: choose another -o, or overwrite it with --force\n"
    )
    assert contents(folder) == before
    again = run(tmp_path, "--force", "--quiet")
    assert (again.returncode, again.stderr, again.stdout) == (0, "", done.stdout)
    assert set(os.listdir(folder)) == FILES
    assert contents(folder) == before

    # From Python: the same files, and nothing printed.
    (tmp_path / "python").mkdir()
    monkeypatch.chdir(tmp_path / "python")
    # Commands that ran in this process print what is logged.
    monkeypatch.setattr(logging.getLogger("oodcli"), "handlers", [])
    capfd.readouterr()
    told: list[tuple[float, int]] = []
    made = api.demo(progress=lambda *far: told.append(far))
    assert tuple(capfd.readouterr()) == ("", "")
    assert contents(Path("oodcli-demo")) == before
    assert made.folder == Path("oodcli-demo")
    assert [step.words[0] for step in made.steps] == [
        *("inspect", "prepare", *["score"] * 4, "show", "evaluate")
    ]
    assert told == [(done, len(made.steps)) for done in range(len(made.steps) + 1)]
    assert {name: f"{100 * mean:.2f}" for name, mean in made.mean_auroc.items()} == {
        name: f"{mean:.2f}" for name, mean in means.items()
    }


def test_lines_on_a_terminal_break_between_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(console, "quiet", False)
    err = io.StringIO()
    monkeypatch.setattr(err, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", err)
    console.say("\n# one two three four five six\n$ oodcli score one two three four")
    assert err.getvalue().split("\n") == [
        "",
        "# one two three four",
        "five six",
        "$ oodcli score one two three four",
        "",
    ]
