"""``oodcli demo``, and what the console makes of its lines."""

from __future__ import annotations

import io

import pytest
import torch
from commands import oodcli

from oodcli.cli import console, demo


@pytest.mark.parametrize(("fault", "status"), [(KeyboardInterrupt, 130), (SystemExit(7), 7)])
def test_it_stops_with_the_command_that_stopped(fault, status, tmp_path, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(demo, "_prepare", lambda output: None)
    monkeypatch.setattr("oodcli.checkpoint.load_classifier", stop)
    result = oodcli("demo", "-o", tmp_path / "demo")
    assert result.status == status
    assert result.err.count("$ oodcli") == 1


def test_quiet_is_handed_on(tmp_path, monkeypatch):
    handed = []
    monkeypatch.setattr(demo, "_prepare", lambda output: None)
    monkeypatch.setattr(demo, "_run", lambda story, words, quiet: handed.append(quiet))
    assert oodcli("demo", "-q", "-o", tmp_path / "demo").err == ""
    assert len(handed) >= 6
    assert all(handed)


def test_its_checkpoint_is_the_same_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr("oodcli.demo.train", lambda *_: {"weight": torch.ones(2)})
    monkeypatch.setattr("oodcli.demo.photograph_crops", lambda folder: 0)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    demo._prepare(tmp_path / "a")
    demo._prepare(tmp_path / "b")
    one, other = (tmp_path / name / "digits.safetensors" for name in "ab")
    assert one.read_bytes() == other.read_bytes()


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
