"""Interrupted jobs go on, whatever interrupted them, and give the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import oodcli
from faults import Process, check_resumes, first_middle_last
from optional import needs_parquet
from PIL import Image

from oodcli.errors import FileError
from oodcli.files.atomic import atomic
from oodcli.files.journal import Journal, Record, journal, partial_path, read_about

JOB = {"--seed": 0, "the images": "photos"}
COMMAND = "oodcli extract net.pt photos"


def block(number: int) -> Record:
    values = np.full((3, 2), number, dtype=np.float32)
    return Record(3, {"values": values}, {"paths": [f"{number} ä\n", "b", "c"]})


def as_it_is(record: Record) -> Record:
    return record


def kept(path: Path, job=JOB) -> list[int]:
    with journal(path, job, COMMAND) as found, pytest.raises(StopAsyncIteration):
        records = list(found.kept(as_it_is))
        numbers = [int(record.arrays["values"][0, 0]) for record in records]
        assert [record.words for record in records] == [block(n).words for n in numbers]
        assert (found.records, found.rows) == (len(numbers), 3 * len(numbers))
        raise StopAsyncIteration
    return numbers


def interrupted(path: Path, *numbers: int, job=JOB) -> None:
    with pytest.raises(KeyboardInterrupt), journal(path, job, COMMAND) as new:
        for number in numbers:
            new.append(block(number))
        raise KeyboardInterrupt


# ------------------------------------------------------------------------------- the journal


def test_what_was_kept_is_there_the_next_time(tmp_path):
    path = tmp_path / "x.h5"
    interrupted(path, 1, 2)
    interrupted(path, 3)
    with pytest.raises(KeyboardInterrupt), journal(path, JOB, "another spelling") as found:
        assert found.about.command == COMMAND
        assert [int(record.arrays["values"][0, 0]) for record in found.kept(as_it_is)] == [1, 2, 3]
        assert (found.records, found.rows, found.complete) == (3, 9, False)
        raise KeyboardInterrupt
    about, rows, complete = read_about(partial_path(path))
    assert (about.command, about.job, rows, complete) == (COMMAND, JOB, 9, False)
    assert partial_path(path).read_bytes().startswith(b"oodcli-partial 1: what is done of the file")
    with journal(path, JOB, COMMAND):
        pass
    assert os.listdir(tmp_path) == []


def test_what_was_decided_holds_for_the_rest(tmp_path):
    path = tmp_path / "x.h5"
    with pytest.raises(KeyboardInterrupt), journal(path, JOB, COMMAND) as new:
        assert new.about.decided == {}
        new.about.decided.update(batch_size=7)
        new.append(block(1))
        raise KeyboardInterrupt
    with journal(path, JOB, COMMAND) as found:
        assert found.about.decided == {"batch_size": 7}


def test_nothing_is_left_of_a_job_that_kept_nothing(tmp_path):
    interrupted(tmp_path / "x.h5")
    assert os.listdir(tmp_path) == []


def test_a_record_that_was_cut_off_is_dropped(tmp_path):
    """At every byte: the records before it stay, and what is appended then is read again."""
    path = tmp_path / "x.h5"
    partial = partial_path(path)
    sizes = []
    for number in (1, 2, 3):
        interrupted(path, number)
        sizes.append(partial.stat().st_size)
    whole = partial.read_bytes()
    for size in [*range(0, len(whole), 7), *(size + off for size in sizes for off in (-1, 0))]:
        partial.write_bytes(whole[:size])
        interrupted(path, 9)
        expected = [n for n, end in zip((1, 2, 3), sizes, strict=True) if end <= size]
        assert kept(path) == [*expected, 9]
    partial.write_bytes(whole + bytes(1000))  # as some file systems leave it when the power fails
    assert kept(path) == [1, 2, 3]


def test_a_changed_byte_loses_what_follows_and_no_more(tmp_path):
    path = tmp_path / "x.h5"
    partial = partial_path(path)
    interrupted(path, 1)
    first = partial.stat().st_size
    interrupted(path, 2, 3)
    whole = partial.read_bytes()
    for place in range(first, len(whole), 5):
        partial.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert kept(path) in ([1], [1, 2])


def test_another_job_is_refused_with_the_difference_named(tmp_path):
    path = tmp_path / "x.h5"
    interrupted(path, 1)
    for job, words in (
        (
            {**JOB, "--seed": 1},
            r"x\.h5\.partial was begun with --seed 0, but now it is 1: .*--rest",
        ),
        ({**JOB, "the images": "b"}, "with the images photos, but now it is b"),
        ({"the images": "photos"}, "with --seed 0, but now it is null"),
    ):
        with pytest.raises(FileError, match=words), journal(path, job, COMMAND):
            pass
    assert kept(path) == [1]
    with journal(path, {"--seed": 1}, COMMAND, restart=True) as new:
        assert (new.rows, new.about.job) == (0, {"--seed": 1})


def test_records_that_make_no_sense_are_damage(tmp_path):
    path = tmp_path / "x.h5"
    interrupted(path, 1)

    def restore(record):
        return record.arrays["something else"]

    with (
        pytest.raises(FileError, match=r"x\.h5\.partial is damaged: begin again with --restart"),
        journal(path, JOB, COMMAND) as found,
    ):
        list(found.kept(restore))


def test_a_file_of_somebody_elses_is_left_alone(tmp_path):
    path = tmp_path / "x.h5"
    for text, words in (
        (b"my notes", "is no partial file of oodcli: move it away"),
        (b"oodcli-partial 2: of the future\n" * 9, "is of another version of oodcli"),
    ):
        partial_path(path).write_bytes(text)
        for restart in (False, True) if text == b"my notes" else (False,):
            with (
                pytest.raises(FileError, match=words),
                journal(path, JOB, COMMAND, restart=restart),
            ):
                pass
        assert partial_path(path).read_bytes() == text
    with journal(path, JOB, COMMAND, restart=True):
        pass


def test_two_processes_do_not_write_the_same_output(tmp_path):
    path = tmp_path / "x.h5"
    with journal(path, JOB, COMMAND) as first:
        first.append(block(1))
        with (
            pytest.raises(FileError, match=r"x\.h5 is being written by another process"),
            journal(path, JOB, COMMAND, restart=True),
        ):
            pass
        assert first.path.stat().st_size > 100
    with (
        atomic(tmp_path / "y.csv"),
        pytest.raises(FileError, match=r"y\.csv is being written by another process"),
        atomic(tmp_path / "y.csv", force=True),
    ):
        pass


def test_a_crash_leaves_no_lock_behind(tmp_path):
    script = """
import os, sys
from pathlib import Path
from oodcli.files.atomic import atomic
from oodcli.files.journal import journal
with journal(Path("x.h5"), {}, ""), atomic(Path("x.h5")) as unfinished:
    unfinished.write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            with pytest.raises(FileError, match="another process"), atomic(tmp_path / "x.h5"):
                pass
        finally:
            process.kill()
    with journal(tmp_path / "x.h5", {}, "") as found, atomic(tmp_path / "x.h5") as unfinished:
        assert found.rows == 0
        unfinished.write_text("whole")
    assert os.listdir(tmp_path) == ["x.h5"]
    assert (tmp_path / "x.h5").read_text() == "whole"


def test_a_link_in_place_of_the_new_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".x.new.csv").symlink_to("precious")
    with pytest.raises(FileError, match=r"x\.csv could not be written"), atomic(tmp_path / "x.csv"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


# ------------------------------------------------------------------------------- whole jobs


@pytest.fixture(scope="module")
def small(small, tmp_path_factory) -> Path:
    """A copy, as these tests add files."""
    return shutil.copytree(small, tmp_path_factory.mktemp("resuming") / "small")


NOISE = "noise:uniform?n=9"


def test_a_job_resumes_after_a_fault_in_a_write(small, tmp_path):
    """At three of its writes; tests/slow has the others, and other jobs."""
    command = f"score net.pt {NOISE} --batch-size 3 -d energy -d msp -o s.csv"
    process = Process()
    check_resumes(process, command, small, tmp_path, first_middle_last)
    process.end()


@pytest.fixture(scope="module")
def photos(small) -> Path:
    """A folder of images, of which two cannot be read, beside the small network, and virtual
    images of it."""
    folder = small / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(9):
        pixels = generator.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    for number in (0, 5):
        (folder / f"{number}.png").write_bytes(b"no image")
    words = ("--per-class", 3, "--steps", 2, "--batch-size", 4)
    result = oodcli("invert", small / "net.pt", *words, "-o", small / "v.h5")
    assert result.status == 0, result.err
    return folder


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("extract net.pt photos --record all --mirror -o new.h5", 3),
        ("extract net.pt photos --precision bfloat16 -o new.h5", 3),
        ("extract net.pt v.h5 -o new.h5", 0),
        ("extract net.pt v.h5 --match-accuracy 0.3333333333333333 -o new.h5", 0),
        ("score net.pt photos -d all --mirror --explain -o new.csv", 3),
        pytest.param(
            "score net.pt photos -d energy --contamination 0.2 -o new.parquet",
            3,
            marks=needs_parquet,
        ),
        ("score net.pt photos -d energy -d act --threshold energy=0.5 -o new.jsonl", 3),
        ("invert net.pt --per-class 3 --steps 4 --objective paper -o new.h5", 0),
    ],
)
def test_a_job_that_goes_on_gives_the_same_bytes(
    small, photos, tmp_path, monkeypatch, words, status
):
    """Rows that cannot be read, both views, gradients, sensitivities, words and verdicts."""
    monkeypatch.chdir(small)
    command = (*words.split(), "--batch-size", "2", "--seed", "3")
    output = Path(command[command.index("-o") + 1])
    result = oodcli(*command)
    assert result.status == status, result.err
    expected, summary = output.read_bytes(), result.err.splitlines()[-1]
    output.unlink()
    output.with_suffix(".png").unlink(missing_ok=True)
    append = Journal.append

    def until_the_third(self, record):
        append(self, record)
        if self.records % 2 == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", until_the_third)
        for _ in range(2):
            assert oodcli(*command).status == 130
    assert read_about(partial_path(output))[1] >= 6
    result = oodcli(*command, "--force")  # what began it is what the output says
    assert result.status == status, result.err
    assert output.read_bytes() == expected
    assert result.err.splitlines()[-1] == summary
    output.unlink()
    output.with_suffix(".png").unlink(missing_ok=True)


def test_other_images_are_refused(small, photos, monkeypatch):
    monkeypatch.chdir(small)
    command = ("extract", "net.pt", "photos", "--batch-size", 2, "-o", "other.h5")
    with monkeypatch.context() as patch:
        patch.setattr("oodcli.files.cache.CacheWriter.append", interrupt)
        assert oodcli(*command).status == 130
    Image.new("RGB", (8, 8)).save("photos/10.png")
    result = oodcli(*command)
    Path("photos/10.png").unlink()
    assert result.status == 1
    assert "was begun with the list of images " in result.err
    result = oodcli(*command, "--restart")
    assert result.status == 3, result.err
    assert "going on" not in result.err
    assert not partial_path(Path("other.h5")).exists()


@pytest.mark.parametrize(
    ("words", "more", "difference"),
    [
        ("score net.pt photos -d energy --contamination 0.2", ("--contamination", "0.3"), "--cont"),
        ("score net.pt photos -d energy", ("--threshold", "energy=1"), "--threshold"),
        ("score net.pt photos -d energy", ("--ema",), "--ema"),
        ("score c.h5 -d energy", ("--threshold", "split"), "--threshold"),
        ("extract net.pt photos", ("--layers", "layer1"), "--layers"),
        ("invert net.pt --per-class 3", ("--ema",), "--ema"),
    ],
)
def test_other_options_are_refused(small, photos, monkeypatch, tmp_path, words, more, difference):
    """Of the network and of the verdict."""
    monkeypatch.chdir(small)
    suffix = "csv" if words.startswith("score") else "h5"
    command = (*words.split(), "--batch-size", "4", "-o", tmp_path / f"out.{suffix}")
    append = Journal.append

    def once(self, record):
        append(self, record)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", once)
        assert oodcli(*command).status == 130
    result = oodcli(*command, *more)
    assert result.status == 1
    assert f"was begun with {difference}" in result.err


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_job_without_a_readable_image_keeps_nothing(small, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    for words in (("extract",), ("score", "-d", "msp")):
        name = "f.h5" if words == ("extract",) else "s.csv"
        result = oodcli(
            words[0],
            small / "net.pt",
            tmp_path,
            *words[1:],
            "--batch-size",
            2,
            "-o",
            tmp_path / name,
        )
        assert result.status == 1
        assert "not one of 3 images could be read; " in result.err
        assert "keeps" not in result.err
    assert sorted(os.listdir(tmp_path)) == ["0.png", "1.png", "2.png"]


def test_inspect_says_what_a_partial_file_is(small, tmp_path, monkeypatch):
    command = ("extract", small / "net.pt", NOISE, "--batch-size", 3, "-o", tmp_path / "f.h5")
    with monkeypatch.context() as patch:
        patch.setattr("oodcli.files.cache.CacheWriter.append", interrupt)
        assert oodcli(*command).status == 130
    page = oodcli("inspect", tmp_path / "f.h5.partial").out
    assert "partial results of an interrupted job" in page
    assert "run the same command again" in page
    found = json.loads(oodcli("inspect", tmp_path / "f.h5.partial", "--json").out)
    assert (found["kind"], found["rows"], found["complete"]) == ("partial", 3, False)
    assert found["job"]["--batch-size"] == 3
    assert found["command"].startswith("oodcli extract ")
    (tmp_path / "f.h5.partial").write_bytes(b"oodcli-partial 1: what is do")
    result = oodcli("inspect", tmp_path / "f.h5.partial")
    assert result.status == 1
    assert result.err.startswith("oodcli: ")
