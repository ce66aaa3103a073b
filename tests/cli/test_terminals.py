"""Terminals that are not UTF-8, and images above Pillow's limit."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import oodcli
from PIL import Image

from oodcli.cli import main


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_encoding_ends_in_a_traceback(
    encoding: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that the encoding lacks are escaped."""
    checkpoint = tmp_path / "n€t.pt"
    for suffix in (".pt", ".toml"):
        shutil.copy(trained / f"digits{suffix}", checkpoint.with_suffix(suffix))
    names = ",".join(f"β{digit}" for digit in range(10))
    for words in (
        ("score", "--help"),
        ("inspect", checkpoint, "--class-names", names),
        ("score", checkpoint, "noise:uniform?n=2", "--class-names", names, "-v"),
        ("inspect", tmp_path / "missing→.pt"),
    ):
        printed = {name: io.BytesIO() for name in ("stdout", "stderr")}
        for name, stream in printed.items():
            monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding, write_through=True))
        monkeypatch.setattr(sys, "argv", ["oodcli", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == (1 if "missing" in str(words) else 0)
        if "-v" in words:
            text = printed["stdout"].getvalue().decode(encoding)
            assert ("β" if encoding == "utf-8" else r"\u03b2") in text


@pytest.mark.slow
def test_a_terminal_of_another_encoding_is_written_to() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    run = [sys.executable, "-m", "oodcli", "inspect", "missing→.pt"]
    done = subprocess.run(run, env=environment, capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(rb"oodcli: missing\u2192.pt does not exist"), done.stderr


def test_a_larger_image_is_read_with_max_pixels(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (20, 20)).save(tmp_path / "large.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    score = ("score", trained / "digits.pt", tmp_path, "-d", "msp")
    refused = oodcli(*score)
    assert refused.status == 3
    assert "--max-pixels" in refused.out
    allowed = oodcli(*score, "--max-pixels", 400)
    assert (allowed.status, "--max-pixels" in allowed.out) == (0, False)
    isolated = oodcli(*score, "--max-pixels", 400, "--timeout-per-image", 60)
    assert isolated.out == allowed.out
