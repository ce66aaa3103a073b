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
from oodcli.jobs.kept import About, Kept, Stored, kept_work, partial_path, read_about

JOB = {"--seed": 0, "the images": "photos"}
COMMAND = "oodcli extract net.pt photos"


def batch(number: int) -> Stored:
    values = np.full((3, 2), number, dtype=np.float32)
    return Stored(3, {"values": values}, {"paths": [f"{number} ä\n", "b", "c"]})


def as_it_is(stored: Stored) -> Stored:
    return stored


def stored(path: Path, job=JOB) -> list[int]:
    """The numbers of the batches that are there, each of which is what it was."""
    with pytest.raises(StopAsyncIteration), kept_work(path, job, COMMAND) as kept:
        numbers = sorted(kept.numbers)
        for (number,) in numbers:
            found = kept.read((number,), as_it_is)
            assert (found.rows, found.words) == (3, batch(number).words)
            assert np.array_equal(found.arrays["values"], batch(number).arrays["values"])
            assert kept.rows((number,)) == 3
        raise StopAsyncIteration
    return [number for (number,) in numbers]


def interrupted(path: Path, *numbers: int, job=JOB) -> None:
    with pytest.raises(KeyboardInterrupt), kept_work(path, job, COMMAND) as kept:
        for number in numbers:
            kept.write((number,), batch(number))
        raise KeyboardInterrupt


# ------------------------------------------------------------------------------- stored batches


def test_stored_batches_are_there_the_next_time(tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "x.h5"
    interrupted(path, 1, 2)
    interrupted(path, 7)  # in any order
    interrupted(path, 3, 7)  # and twice
    assert f"resuming: 9 images saved in {path}.partial" in caplog.text
    assert f"12 images saved in {path}.partial; re-run the same command" in caplog.text
    assert stored(path) == [1, 2, 3, 7]
    with pytest.raises(KeyboardInterrupt), kept_work(path, JOB, "another spelling") as kept:
        assert kept.about == About(COMMAND, JOB, {}, complete=False)
        raise KeyboardInterrupt
    folder = partial_path(path)
    assert read_about(folder) == (About(COMMAND, JOB, {}), 12)
    batches = [f"{number:06d}.safetensors" for number in (1, 2, 3, 7)]
    assert sorted(os.listdir(folder)) == [*batches, "job.json", "lock"]
    with kept_work(path, JOB, COMMAND):
        pass
    assert os.listdir(tmp_path) == []


def test_what_was_decided_holds_for_the_rest(tmp_path):
    path = tmp_path / "x.h5"
    with pytest.raises(KeyboardInterrupt), kept_work(path, JOB, COMMAND) as kept:
        assert kept.about.decided == {}
        kept.about.decided.update(batch_size=7)
        kept.write((0,), batch(0))
        raise KeyboardInterrupt
    with kept_work(path, JOB, COMMAND) as kept:
        assert kept.about.decided == {"batch_size": 7}


def test_nothing_is_left_of_a_job_that_stored_nothing(tmp_path):
    interrupted(tmp_path / "x.h5")
    assert os.listdir(tmp_path) == []


def test_an_unfinished_batch_does_not_count(tmp_path):
    """As a killed process leaves it: at a temporary name. The next one overwrites or removes it."""
    path = tmp_path / "x.h5"
    interrupted(path, 1)
    folder = partial_path(path)
    (folder / ".000002.new.safetensors").write_bytes(b"half")
    (folder / ".job.new.json").write_bytes(b"{")
    assert stored(path) == [1]
    interrupted(path, 2)
    assert stored(path) == [1, 2]
    with kept_work(path, JOB, COMMAND):
        pass
    assert os.listdir(tmp_path) == []


def test_batches_without_their_job_do_not_count(tmp_path):
    path = tmp_path / "x.h5"
    interrupted(path, 1)
    (partial_path(path) / "job.json").unlink()
    with pytest.raises(FileError, match=r"has no job\.json: nothing can be resumed"):
        read_about(partial_path(path))
    assert stored(path) == []


def test_another_job_is_refused_with_the_difference_named(tmp_path):
    path = tmp_path / "x.h5"
    interrupted(path, 1)
    for job, words in (
        (
            {**JOB, "--seed": 1},
            r"x\.h5\.partial was started with --seed 0, but now it is 1: .*--rest",
        ),
        ({**JOB, "the images": "b"}, "with the images photos, but now it is b"),
        ({"the images": "photos"}, "with --seed 0, but now it is null"),
    ):
        with pytest.raises(FileError, match=words), kept_work(path, job, COMMAND):
            pass
    assert stored(path) == [1]
    with kept_work(path, {"--seed": 1}, COMMAND, restart=True) as kept:
        assert (kept.numbers, kept.about.job) == (set(), {"--seed": 1})


def test_a_damaged_batch_is_named(tmp_path):
    path = tmp_path / "x.h5"
    interrupted(path, 1, 2)
    file = partial_path(path) / "000002.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    words = r"000002\.safetensors is damaged: delete it to redo its part, or use --restart"
    with pytest.raises(FileError, match=words):
        stored(path)
    file.unlink()
    assert stored(path) == [1]
    with pytest.raises(FileError, match=r"1\.safet.* is damaged"), kept_work(path, JOB, "") as kept:
        kept.read((1,), lambda stored: stored.arrays["something else"])
    for text in ("", "[]", '{"format": "oodcli-partial 2"}', "{" * 10**5):
        (partial_path(path) / "job.json").write_text(text, encoding="utf-8")
        with pytest.raises(FileError, match=r"job\.json is damaged"):
            stored(path)


def test_what_others_wrote_is_left_alone(tmp_path):
    path = tmp_path / "x.h5"
    partial_path(path).write_bytes(b"my notes")
    for restart in (False, True):
        with (
            pytest.raises(FileError, match="was not written by oodcli: move it away first"),
            kept_work(path, JOB, COMMAND, restart=restart),
        ):
            pass
    assert partial_path(path).read_bytes() == b"my notes"
    partial_path(path).unlink()
    partial_path(path).mkdir()
    (partial_path(path) / "notes.txt").write_text("mine")
    with (
        pytest.raises(FileError, match=r"notes\.txt was not written by oodcli: move it"),
        kept_work(path, JOB, COMMAND),
    ):
        pass
    assert os.listdir(partial_path(path)) == ["notes.txt"]


def test_what_other_versions_wrote_is_refused(tmp_path):
    path = tmp_path / "x.h5"
    partial_path(path).write_bytes(b"oodcli-partial 1: what is done of the file" + bytes(9))
    words = r"x\.h5\.partial was written by an older version of oodcli: resume with that"
    with pytest.raises(FileError, match=words), kept_work(path, JOB, COMMAND):
        pass
    assert partial_path(path).is_file()
    with kept_work(path, JOB, COMMAND, restart=True) as kept:
        kept.write((0,), batch(0))
    interrupted(path, 1)
    job = partial_path(path) / "job.json"
    job.write_text(job.read_text().replace("oodcli-partial 2", "oodcli-partial 3"))
    with pytest.raises(FileError, match="was written by another version of oodcli"):
        stored(path)
    with kept_work(path, JOB, COMMAND, restart=True):
        pass
    assert os.listdir(tmp_path) == []


def test_two_processes_do_not_write_the_same_output(tmp_path):
    path = tmp_path / "x.h5"
    with kept_work(path, JOB, COMMAND) as first:
        first.write((1,), batch(1))
        with (
            pytest.raises(FileError, match=r"x\.h5 is being written by another process"),
            kept_work(path, JOB, COMMAND, restart=True),
        ):
            pass
        assert first.rows((1,)) == 3
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
from oodcli.jobs.kept import kept_work
with kept_work(Path("x.h5"), {}, ""), atomic(Path("x.h5")) as unfinished:
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
    with kept_work(tmp_path / "x.h5", {}, "") as kept, atomic(tmp_path / "x.h5") as unfinished:
        assert not kept.numbers
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


@pytest.mark.slow
def test_a_job_resumes_after_a_fault_in_a_write(small, tmp_path):
    """At three of its writes; tests/slow has the others, and other jobs."""
    command = f"score net.pt {NOISE} --batch-size 3 -d energy -d msp -o s.csv"
    with Process() as process:
        check_resumes(process, command, small, tmp_path, first_middle_last)


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
        pytest.param(
            "score net.pt photos -d all --mirror --explain -o new.csv", 3, marks=pytest.mark.slow
        ),
        ("score net.pt photos -d energy -d odin -d pro -d gaia-z --mirror -o new.csv", 3),
        ("extract net.pt photos --for pro,adascale-l -p pro.confidence=msp -o new.h5", 3),
        pytest.param(
            "score net.pt photos -d energy --contamination 0.2 -o new.parquet",
            3,
            marks=needs_parquet,
        ),
        ("score net.pt photos -d energy -d act --threshold energy=0.5 -o new.jsonl", 3),
        ("invert net.pt --per-class 3 --steps 4 --objective paper -o new.h5", 0),
        ("invert net.pt --per-class 3 --steps 4 --objective patches -o new.h5", 0),
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
    write = Kept.write

    def two(self, number, batch):
        write(self, number, batch)
        if len(self.numbers) % 2 == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Kept, "write", two)
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
    assert "was started with the list of images " in result.err
    result = oodcli(*command, "--restart")
    assert result.status == 3, result.err
    assert "resuming" not in result.err
    assert not partial_path(Path("other.h5")).exists()


def interrupt_after_a_batch(command, monkeypatch) -> None:
    write = Kept.write

    def once(self, number, batch):
        write(self, number, batch)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Kept, "write", once)
        assert oodcli(*command).status == 130


@pytest.mark.parametrize("words", ["extract net.pt photos", "score net.pt photos -d energy"])
def test_a_replaced_image_is_noticed_by_its_size(small, photos, monkeypatch, tmp_path, words):
    """Not by its time, which copies on another host do not share."""
    monkeypatch.chdir(small)
    suffix = "csv" if words.startswith("score") else "h5"
    command = (*words.split(), "--batch-size", "4", "-o", tmp_path / f"out.{suffix}")
    interrupt_after_a_batch(command, monkeypatch)
    image = Path("photos/3.png")
    pixels = image.read_bytes()
    image.write_bytes(pixels + b"more")
    result = oodcli(*command)
    image.write_bytes(pixels)
    os.utime(image, (0, 0))
    total = sum(path.stat().st_size for path in Path("photos").iterdir())
    assert result.status == 1
    assert f"was started with the size of the images {total:,} bytes in all, " in result.err
    assert f"but now it is {total + 4:,} bytes in all, " in result.err
    result = oodcli(*command)
    assert result.status == 3, result.err
    assert "resuming: 4 images saved" in result.err


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
    interrupt_after_a_batch(command, monkeypatch)
    result = oodcli(*command, *more)
    assert result.status == 1
    assert f"was started with {difference}" in result.err


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
        assert "saved" not in result.err
    assert sorted(os.listdir(tmp_path)) == ["0.png", "1.png", "2.png"]


def test_inspect_says_what_a_partial_folder_is(small, tmp_path, monkeypatch):
    command = ("extract", small / "net.pt", NOISE, "--batch-size", 3, "-o", tmp_path / "f.h5")
    with monkeypatch.context() as patch:
        patch.setattr("oodcli.files.cache.CacheWriter.append", interrupt)
        assert oodcli(*command).status == 130
    page = oodcli("inspect", tmp_path / "f.h5.partial").out
    assert "finished batches of an interrupted job" in page
    assert "re-run that command" in page
    found = json.loads(oodcli("inspect", tmp_path / "f.h5.partial", "--json").out)
    assert (found["kind"], found["rows"], found["complete"]) == ("partial", 3, False)
    assert found["job"]["--batch-size"] == 3
    assert found["command"].startswith("oodcli extract ")
    (tmp_path / "f.h5.partial" / "job.json").write_bytes(b'{"form')
    result = oodcli("inspect", tmp_path / "f.h5.partial")
    assert result.status == 1
    assert result.err.startswith("oodcli: ")
