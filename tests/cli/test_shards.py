"""Jobs in parts: --shard and merge, and the processes of torchrun. What comes out is what one
process makes."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from itertools import chain
from pathlib import Path

import h5py
import numpy as np
import pytest
from commands import oodcli
from PIL import Image
from team import Store, Teams

from oodcli.errors import OodcliError
from oodcli.inversion.quality import report
from oodcli.jobs.kept import Kept
from oodcli.jobs.shards import Shard, Share

# ------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("count", [0, 1, 7, 64, 65, 1000])
@pytest.mark.parametrize("of", [1, 2, 3, 64])
@pytest.mark.parametrize("unit", [1, 8, 100])
def test_the_parts_are_the_whole_in_the_same_units(count, of, unit):
    parts = [Share(number, of).part(count, unit) for number in range(1, of + 1)]
    assert list(chain(*parts)) == list(range(count))
    assert all(part.start % unit == 0 or part.start == count for part in parts)
    units = [-(-len(part) // unit) for part in parts]
    assert max(units) - min(units) <= 1


@pytest.mark.parametrize("text", ["", "3", "0/3", "4/3", "1/0", "-1/3", "a/b", "1/3/5", "1.0/3"])
def test_what_is_no_shard(text):
    with pytest.raises(OodcliError, match=r"--shard .*: expected .* such as 3/64"):
        Share.parse(text)


def test_a_shard_in_a_file_is_checked():
    good = {"number": 2, "of": 3, "start": 4, "stop": 8, "rows": 12, "listing": "x"}
    assert str(Shard.from_dict(good)) == "2/3"
    for wrong in (
        {"number": 4},
        {"number": 0},
        {"start": 9},
        {"stop": 13},
        {"rows": "12"},
        {"number": True},
        {"listing": None},
        {"more": 1},
    ):
        with pytest.raises(ValueError, match="shard"):
            Shard.from_dict({**good, **wrong})


# ------------------------------------------------------------------------------------- the stages


def contents(path: Path) -> dict[str, object]:
    """Everything in an HDF5 file but the command that made it."""
    with h5py.File(path) as file:
        found: dict[str, object] = {
            f"@{name}": str(value) for name, value in file.attrs.items() if name != "command"
        }

        def add(name: str, each: h5py.Dataset | h5py.Group) -> None:
            found[name] = {key: str(value) for key, value in each.attrs.items()}
            if isinstance(each, h5py.Dataset):
                text = h5py.check_string_dtype(each.dtype)
                found[f"{name} values"] = (
                    list(each.asstr()[()]) if text else (each.shape, each[()].tobytes())
                )

        file.visititems(add)
    return found


def made(path: Path) -> dict[str, object]:
    """What stands beside scores, but for the command."""
    found = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
    del found["command"]
    return found


def same(one: Path, other: Path) -> None:
    if one.suffix == ".h5":
        assert contents(one) == contents(other)
    else:
        assert one.read_bytes() == other.read_bytes()
        assert made(one) == made(other)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """41 small images in three classes, of which three cannot be read."""
    place = tmp_path_factory.mktemp("images")
    draws = np.random.default_rng(0)
    for number in range(41):
        path = place / "028"[number % 3] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        if number in (3, 20, 21):
            path.write_bytes(b"no image")
        else:
            Image.fromarray(draws.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return place


CHANGED = ("--for", "pro,gaia-z,adascale-a", "-p", "pro.steps=2", "-p", "adascale-a.epsilon=0.1")
"""Records of changed images, and how they are made."""


def commands(fitted: Path, folder: Path) -> dict[str, list[object]]:
    """A job of each kind, without its output; the suffix of that behind the name."""
    checkpoint = fitted / "digits.pt"
    return {
        "invert.h5": ["invert", checkpoint, "--per-class", 5, "--steps", 3, "--batch-size", 8],
        "virtual.h5": ["extract", checkpoint, fitted / "v.h5", "--batch-size", 16],
        "folder.h5": ["extract", checkpoint, folder, "--batch-size", 4, "--mirror"],
        "second.h5": ["extract", checkpoint, folder, "--batch-size", 8, *CHANGED],
        "pool.h5": ["extract", checkpoint, fitted / "v.h5", "--match-accuracy", 0.9],
        "scores.csv": [
            *("score", checkpoint, folder, "--batch-size", 4, "-d", "energy", "-d", "odin"),
            *("-d", "pro", "-d", "gaia-z"),
            *("-d", fitted / "fitted" / "c2ir-z.safetensors", "--explain"),
            *("--threshold", "energy=-5"),
        ],
        "lines.jsonl": ["score", checkpoint, folder, "--batch-size", 4, "-d", "msp"],
        "cache.csv": ["score", fitted / "v.features.h5", "-d", "energy"],
    }


JOBS = (
    *("invert.h5", "virtual.h5", "folder.h5", "second.h5", "pool.h5"),
    *("scores.csv", "lines.jsonl", "cache.csv"),
)


@pytest.fixture(scope="module")
def whole(fitted, folder, tmp_path_factory):
    """What each job makes in one process."""
    place = tmp_path_factory.mktemp("whole")

    def get(job: str) -> Path:
        if not (place / job).exists():
            result = oodcli(*commands(fitted, folder)[job], "-o", place / job)
            assert result.status in (0, 3), result.err
        return place / job

    return get


@pytest.fixture
def cut(fitted, folder, tmp_path):
    """Makes shards of a job."""

    def make(job: str, of: int, *more: object) -> list[Path]:
        stem, _, suffix = job.partition(".")
        paths = []
        for number in range(1, of + 1):
            paths.append(tmp_path / f"{stem}{number}.{suffix}")
            words = commands(fitted, folder)[job]
            result = oodcli(*words, "--shard", f"{number}/{of}", "-o", paths[-1], *more)
            assert result.status in (0, 3), result.err
        return paths

    return make


@pytest.mark.parametrize(
    "job",
    [pytest.param(job, marks=pytest.mark.slow) if job.endswith(".h5") else job for job in JOBS],
)
def test_merged_shards_are_what_one_process_makes(job, whole, cut, tmp_path):
    shards = cut(job, 3)
    result = oodcli("merge", *reversed(shards), "-o", tmp_path / job)
    assert result.status == (3 if job[0] in "fls" else 0), result.err
    same(whole(job), tmp_path / job)
    if job == "invert.h5":
        sheet = whole(job).with_suffix(".png").read_bytes()
        assert (tmp_path / "invert.png").read_bytes() == sheet
    assert "3 of 3, rows" in oodcli("inspect", shards[2]).out
    assert oodcli("inspect", "--verify", tmp_path / job).status == 0
    assert "--shard 1/3" in oodcli("inspect", tmp_path / job, "--json").out


def test_parquet_is_merged(fitted, folder, tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    words = ["score", fitted / "digits.pt", folder, "--batch-size", 4, "-d", "energy"]
    shards = [tmp_path / f"{number}.parquet" for number in (1, 2)]
    oodcli(*words, "-o", tmp_path / "whole.parquet")
    for number, path in enumerate(shards, 1):
        oodcli(*words, "--shard", f"{number}/2", "-o", path)
    result = oodcli("merge", *shards, "-o", tmp_path / "merged.parquet")
    assert result.status == 3, result.err
    one, other = (
        pyarrow.parquet.read_table(tmp_path / f"{n}.parquet") for n in ("whole", "merged")
    )
    assert one.equals(other)
    assert one.schema == other.schema


@pytest.mark.slow
def test_more_shards_than_batches(cut, whole, tmp_path):
    """Some have no row; one has none that could be read."""
    shards = cut("folder.h5", 14)
    result = oodcli("merge", *shards, "-o", tmp_path / "folder.h5")
    assert result.status == 3, result.err
    same(whole("folder.h5"), tmp_path / "folder.h5")
    shards = cut("lines.jsonl", 14)
    assert oodcli("merge", *shards, "-o", tmp_path / "lines.jsonl").status == 3
    same(whole("lines.jsonl"), tmp_path / "lines.jsonl")


def test_a_shard_without_a_readable_image_is_no_error(fitted, tmp_path):
    place = tmp_path / "images"
    place.mkdir()
    for number in range(4):
        (place / f"{number}.png").write_bytes(b"no image")
    words = ["extract", fitted / "digits.pt", place, "--batch-size", 2]
    shards = [tmp_path / f"{number}.h5" for number in (1, 2)]
    for number, path in enumerate(shards, 1):
        assert oodcli(*words, "--shard", f"{number}/2", "-o", path).status == 3
    result = oodcli("merge", *shards, "-o", tmp_path / "all.h5")
    assert result.status == 1
    assert "not one of 4 images could be read" in result.err
    assert not (tmp_path / "all.h5").exists()


def test_scores_of_shards_of_a_cache_can_be_merged(fitted, folder, cut, whole, tmp_path):
    shards = []
    for path in cut("folder.h5", 3):
        shards.append(path.with_suffix(".csv"))
        assert oodcli("score", path, "-d", "energy", "-o", shards[-1]).status in (0, 3)
    result = oodcli("score", tmp_path / "folder2.h5", "-d", "energy", "--shard", "1/2")
    assert result.status == 1
    assert "already is shard 2/3" in result.err
    result = oodcli("merge", *shards, "-o", tmp_path / "merged.csv")
    assert result.status == 3, result.err
    oodcli("score", whole("folder.h5"), "-d", "energy", "-o", tmp_path / "whole.csv")
    assert (tmp_path / "merged.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_the_gate_counts_the_whole(cut, whole, tmp_path):
    shards = cut("scores.csv", 2)
    flagged = made(whole("scores.csv"))["flagged"]["energy"]
    assert 0 < flagged < 38
    share = (flagged + 3) / 41  # the unreadable count, too
    for limit, status in ((share + 0.01, 3), (share - 0.01, 4)):
        words = ("merge", *shards, "-o", tmp_path / "all.csv", "--force", "--json")
        result = oodcli(*words, "--max-ood-fraction", limit)
        assert result.status == status, result.err
        assert json.loads(result.out)["ood_fraction"] == {"energy": pytest.approx(flagged / 38)}
    plain = cut("lines.jsonl", 2)
    result = oodcli("merge", *plain, "-o", tmp_path / "l.jsonl", "--max-ood-fraction", 0.5)
    assert result.status == 1
    assert "these shards have none" in result.err
    assert not (tmp_path / "l.jsonl").exists()


def refused(sentence: str, *words: object) -> None:
    result = oodcli("merge", *words)
    assert result.status == 1, (result.status, result.out, result.err)
    assert sentence in result.err
    assert result.err.count("\n") == 1


@pytest.mark.slow
def test_records_that_were_made_differently_are_refused(fitted, folder, tmp_path):
    words = commands(fitted, folder)["second.h5"]
    for number, more in ((1, []), (2, ["-p", "pro.epsilon=0.01"])):
        shard = ("--shard", f"{number}/2", "-o", tmp_path / f"{number}.h5")
        assert oodcli(*words, *more, *shard).status in (0, 3)
    both = (tmp_path / "1.h5", tmp_path / "2.h5", "-o", tmp_path / "x.h5")
    refused('was made with /pro {"confidence": "gen", "epsilon": 0.0001, "steps": 2', *both)


def test_what_does_not_belong_together_is_refused(cut, whole, fitted, folder, tmp_path):
    out = ("-o", tmp_path / "x.h5")
    one, two, three = cut("folder.h5", 3)
    refused("of 3 shards, 2 is missing", one, three, *out)
    refused("are both shard 2/3: give each once", one, two, tmp_path / "folder2.h5", *out) if (
        two != tmp_path / "folder2.h5"
    ) else None
    copy = tmp_path / "copy.h5"
    copy.write_bytes(two.read_bytes())
    refused(f"{two} and {copy} are both shard 2/3: give each once", one, two, copy, three, *out)
    refused("is no shard, but a whole", one, whole("folder.h5"), *out)
    refused("is no shard, but checkpoint", fitted / "digits.pt", *out)
    refused("merge one kind at a time", one, *cut("scores.csv", 2), *out)
    refused("expected a name that ends in .h5", one, two, three, "-o", tmp_path / "x.csv")
    assert not (tmp_path / "x.h5").exists()
    damaged = bytearray(two.read_bytes())
    place = damaged.find(h5py.File(two)["logits"][0].tobytes())
    damaged[place] ^= 1
    copy.write_bytes(damaged)
    refused("the file is damaged", one, copy, three, *out)

    words = commands(fitted, folder)["folder.h5"]
    for number, (option, name) in enumerate(
        (
            (["--seed", 1], "--seed"),
            (["--batch-size", 8], "begins with row"),
            (["--record", "logits"], "--record"),
        )
    ):
        other = tmp_path / f"other{number}.h5"
        assert oodcli(*words, *option, "--shard", "2/3", "-o", other).status in (0, 3)
        result = oodcli("merge", one, other, three, *out)
        assert result.status == 1
        assert name in result.err
        assert str(other) in result.err
    more = tmp_path / "more"
    more.mkdir()
    for path in folder.rglob("*.png"):
        target = more / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    words = ["extract", fitted / "digits.pt", more, "--batch-size", 4, "--mirror"]
    other = tmp_path / "elsewhere.h5"
    assert oodcli(*words, "--shard", "2/3", "-o", other).status == 0
    refused("with the list of images", one, other, three, *out)


def test_scores_that_do_not_belong_together(cut, fitted, folder, tmp_path):
    one, two = cut("scores.csv", 2)
    out = ("-o", tmp_path / "x.csv")
    text = two.read_text(encoding="utf-8")
    two.write_text(text.replace("0", "1", 1), encoding="utf-8")
    refused("damaged", one, two, *out) if False else None
    result = oodcli("merge", one, two, *out)
    assert result.status == 1
    assert not (tmp_path / "x.csv").exists()
    two.write_text(text, encoding="utf-8")
    beside = Path(f"{two}.json")
    kept = beside.read_text(encoding="utf-8")
    beside.unlink()
    refused("is no shard, which scores2.csv.json beside it would say", one, two, *out)
    beside.write_text(kept.replace('"number": 2', '"number": 9'), encoding="utf-8")
    refused("is damaged (shard", one, two, *out)
    beside.write_text(kept, encoding="utf-8")
    words = commands(fitted, folder)["scores.csv"]
    other = tmp_path / "other.csv"
    assert oodcli(*words, "--mirror", "--shard", "2/2", "-o", other).status == 3
    refused("was made with --mirror false", one, other, *out)


def test_a_shard_that_cannot_be(fitted, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = fitted / "digits.pt"
    for words, sentence in (
        (("invert", checkpoint, "--per-class", 5, "--shard", "1/2"), "use at most 1 of them"),
        (("score", checkpoint, folder, "--contamination", 0.1, "--shard", "1/2"), "whole stream"),
        (("extract", checkpoint, folder, "--shard", "3/2"), "such as 3/64"),
    ):
        result = oodcli(*words)
        assert result.status == 1
        assert sentence in result.err


def test_a_shard_goes_on_after_an_interruption(fitted, folder, cut, tmp_path, monkeypatch):
    expected = cut("folder.h5", 2)[1].read_bytes()
    words = [*commands(fitted, folder)["folder.h5"], "--shard", "2/2", "-o"]
    write = Kept.write

    def once(self, number, batch):
        write(self, number, batch)
        if len(self.numbers) == 2:
            raise KeyboardInterrupt

    (tmp_path / "folder2.h5").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Kept, "write", once)
        assert oodcli(*words, tmp_path / "folder2.h5").status == 130
    result = oodcli(*words[:-3], "--shard", "1/2", "-o", tmp_path / "folder2.h5")
    assert "was started with --shard 2/2, but now it is 1/2" in result.err
    assert oodcli(*words, tmp_path / "folder2.h5").status == 3
    assert (tmp_path / "folder2.h5").read_bytes() == expected


def test_quality_does_not_depend_on_how_it_is_added():
    draws = np.random.default_rng(0)

    def part() -> dict[str, np.ndarray]:
        first = draws.normal(size=(1, 6))
        sums = np.concatenate([first * 10, first**2 * 10 + 5])
        return {"counts": np.array([10.0, 3.3, 9.0]), "moments/a": sums, "memory/a": sums * 0 + 1}

    parts = [part() for _ in range(5)]
    parts[4]["counts"] = np.array([10.0, 8.3, 4.0])
    added = {name: sum(each[name] for each in parts[1:]) for name in parts[0]}
    added["memory/a"] = parts[0]["memory/a"]
    found = report(parts)
    assert found == report([parts[0], added])
    assert found["cross_entropy"] == pytest.approx(0.43)
    assert found["agreement"] == 0.8


# --------------------------------------------------------------------------------------- torchrun


@pytest.fixture(scope="module")
def teams():
    with Teams() as found:
        yield found


@pytest.fixture
def team(teams, tmp_path):
    """Runs a command in the processes of a team at once."""
    return partial(teams, folder=tmp_path)


@pytest.mark.parametrize(
    ("job", "size"),
    [
        ("folder.h5", 3),
        ("scores.csv", 3),
        *(
            pytest.param(job, 3, marks=pytest.mark.slow)
            for job in JOBS
            if job not in ("folder.h5", "scores.csv")
        ),
        pytest.param("folder.h5", 13, marks=pytest.mark.slow),
    ],
)
def test_a_team_makes_what_one_process_makes(job, size, team, whole, fitted, folder, tmp_path):
    results = team(size, *commands(fitted, folder)[job], "-o", tmp_path / job)
    for result in results:
        assert result.status == 0, result.err
        assert not result.out
    assert all(not result.err for result in results[1:])
    stored = sorted(chain(*(result.stored for result in results)))
    assert stored == list(range(len(stored)))
    same(whole(job), tmp_path / job)
    suffix = Path(job).suffix
    beside = {".csv": [f"{job}.json"], ".jsonl": [f"{job}.json"], ".h5": ["invert.png"]}[suffix]
    beside = beside if suffix != ".h5" or job == "invert.h5" else []
    assert sorted(os.listdir(tmp_path)) == sorted([job, *beside])


def test_a_team_resumes_with_another_number_of_processes(team, whole, fitted, folder, tmp_path):
    output = tmp_path / "folder.h5"
    words = [*commands(fitted, folder)["folder.h5"], "-o", output]
    results = team(3, *words, stop={2: 2})
    assert results[2].status == 130
    before = {int(path.stem) for path in Path(f"{output}.partial").glob("*.safetensors")}
    assert {7, 8} <= before  # of 11 batches, the last process has 7 to 10
    # When the launcher starts the command again, --restart does not discard anything.
    results = team(2, *words, "--restart", TORCHELASTIC_RESTART_COUNT="1")
    assert [result.status for result in results] == [0, 0]
    assert sorted(chain(*(result.stored for result in results))) == sorted({*range(11)} - before)
    same(whole("folder.h5"), output)
    assert os.listdir(tmp_path) == ["folder.h5"]


def test_one_process_resumes_what_a_team_began(team, whole, fitted, folder, tmp_path):
    output = tmp_path / "folder.h5"
    words = [*commands(fitted, folder)["folder.h5"], "-o", output]
    assert team(2, *words, stop={1: 1})[1].status == 130
    result = team(2, *words, "--seed", 1)[0]
    assert "folder.h5.partial was started with --seed 0, but now it is 1" in result.err
    result = oodcli(*words)
    assert result.status == 3
    assert "resuming: " in result.err
    same(whole("folder.h5"), output)
    assert team(2, *words, "--restart", "--force")[0].stored == [0, 1, 2, 3, 4]
    same(whole("folder.h5"), output)
    assert os.listdir(tmp_path) == ["folder.h5"]


def test_a_team_must_have_one_job_and_one_folder(team, fitted, folder, tmp_path):
    words = [*commands(fitted, folder)["folder.h5"], "-o", tmp_path / "folder.h5"]
    result = team(2, *words, ranks={1: [*words, "--seed", 1]})[1]
    assert result.status == 1
    assert "the first process of torchrun has --seed 0, but this one 1: give all" in result.err
    # As on a host that does not see the folder.
    (tmp_path / "elsewhere").mkdir()
    elsewhere = [*words[:-1], tmp_path / "elsewhere" / "folder.h5"]
    result = team(2, *words, ranks={1: elsewhere})[1]
    assert result.status == 1
    assert "need an output where all of them see it, or --shard and 'oodcli merge'" in result.err
    assert os.listdir(tmp_path / "elsewhere") == []
    assert not (tmp_path / "folder.h5").exists()


def test_a_team_refuses_what_it_cannot_do(team, fitted, folder, tmp_path):
    checkpoint = fitted / "digits.pt"
    out = ("-o", tmp_path / "x.csv")
    for words, sentence in (
        (("score", checkpoint, folder, "-d", "msp"), "name it with -o"),
        (("score", checkpoint, folder, "-d", "msp", "--shard", "1/2", *out), "without a launcher"),
        (("score", checkpoint, "-", "-d", "msp", *out), "no standard input of their own"),
    ):
        failed = [result for result in team(2, *words) if result.status == 1]
        assert failed
        for result in failed:
            assert sentence in result.err
            assert re.search(r"^oodcli \(rank [01]\): ", result.err, re.M)


def test_a_team_finds_thresholds_and_gates_in_the_whole_stream(team, fitted, folder, tmp_path):
    words = ["score", fitted / "digits.pt", folder, "--batch-size", 4, "-d", "energy"]
    words += ["--contamination", 0.25]
    oodcli(*words, "-o", tmp_path / "one.csv")
    results = team(3, *words, "--max-ood-fraction", 0.1, "-o", tmp_path / "three.csv")
    assert results[0].status == 4
    assert results[1].status == results[2].status == 0
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "three.csv").read_bytes()


def test_processes_that_do_not_come(fitted, tmp_path, monkeypatch):
    """As where somebody's training, which torchrun has started, calls oodcli."""
    module = importlib.import_module("torch.distributed.rendezvous")

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("oodcli.jobs.torchrun.PATIENCE", 0.2)
    monkeypatch.setattr(module, "rendezvous", lambda url: iter([(Store(tmp_path), 0, 2)]))
    result = oodcli("score", fitted / "digits.pt", "noise:uniform?n=5", "-d", "msp", "-o", "x.csv")
    assert result.status == 1
    assert "take TORCHELASTIC_RUN_ID out of its environment" in result.err


DYING = """
import os, signal, sys
from oodcli.jobs.kept import Kept
write = Kept.write
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
log = os.environ["KEPT"] + os.environ["RANK"]
def dying(self, number, batch):
    write(self, number, batch)
    with open(log, "a") as stream:
        stream.write("x")
    if first and os.environ["RANK"] == "1" and number == (6,):
        os.kill(os.getpid(), signal.SIGKILL)
Kept.write = dying
from oodcli.cli import main
main()
"""


def torchrun(size: int, *words: object, script: object = None, **more: str):
    target = ["-m", "oodcli"] if script is None else [script]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    restarts = ["--max-restarts", "2"] if script else []
    return subprocess.run(
        [str(word) for word in (*launcher, "--nproc-per-node", size, *restarts, *target, *words)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **more},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "job"), [(1, "scores.csv"), (2, "invert.h5"), (3, "virtual.h5"), (3, "pool.h5")]
)
def test_torchrun(size, job, whole, fitted, folder, tmp_path):
    result = torchrun(size, *commands(fitted, folder)[job], "-o", tmp_path / job)
    # One process alone is no team: an image that cannot be read is status 3, which torchrun
    # reports as a failure.
    assert (result.returncode == 0) == (size > 1), result.stderr
    assert result.stderr.count(f"wrote {tmp_path / job}") == 1
    same(whole(job), tmp_path / job)


@pytest.mark.slow
def test_a_rank_that_dies_goes_on(whole, fitted, folder, tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(DYING, encoding="utf-8")
    output = tmp_path / "folder.h5"
    words = [*commands(fitted, folder)["folder.h5"], "-o", output]
    result = torchrun(2, *words, script=script, KEPT=str(tmp_path / "kept"))
    assert result.returncode == 0, result.stderr
    same(whole("folder.h5"), output)
    # Nothing is made twice: 11 batches, of which the second process has the last 6.
    assert len((tmp_path / "kept1").read_text()) == 6
    assert len((tmp_path / "kept0").read_text()) == 5
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_a_users_mistake_is_one_sentence_a_process(fitted, tmp_path):
    result = torchrun(
        2, "extract", fitted / "digits.pt", tmp_path / "none", "-o", tmp_path / "x.h5"
    )
    assert result.returncode != 0
    for line in ("oodcli (rank 0): ", "oodcli (rank 1): "):
        assert result.stderr.count(line) <= 1
    assert "oodcli (rank" in result.stderr
    assert 'File "' not in result.stderr.partition("oodcli (rank")[0]
